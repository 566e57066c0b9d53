"""`python -m deeplabzoo.benchmarking.choosing --write docs/choosing.md`: accuracy against cost, drawn from what is recorded.

Arithmetic comes from the counted table, accuracy from the manifest, times from the records in benchmarks/. Where no time is
recorded there is no chart of times, and the page says so.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deeplabzoo.benchmarking.libraries import library
from deeplabzoo.benchmarking.record import KIND, Record, read_record
from deeplabzoo.cli import Parser, run
from deeplabzoo.output import ensure_folder, write_atomically
from deeplabzoo.zoo.costs import cost_of
from deeplabzoo.zoo.registry import list_weights
from deeplabzoo.zoo.table import replace_block

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLOCK = "choosing"
_TASK = "image -> labels"
_FEWEST = 8
"""A chart of fewer files tells nothing that the table of weights does not."""
_STYLES = {"deeplabv3": ("#0072B2", "o"), "deeplabv3plus": ("#D55E00", "^")}
"""Colour (Okabe and Ito's) and marker of an architecture: told apart without colours, too."""


@dataclass(frozen=True)
class Choice:
    """One released file at one stride: what it costs, and how good it was found, in the words of its figure."""

    name: str
    """`name.tag`."""
    architecture: str
    data: str
    miou: float
    """Percent."""
    measured: bool
    """Here, and not by its publisher."""
    subset: bool
    output_stride: int
    gflops: float
    """At 513 x 513."""


def choices() -> list[Choice]:
    """Return every single-scale, unflipped mIoU of the manifest whose arithmetic is counted, best first within its data."""
    found = []
    for row in list_weights():
        for metric in row.metrics:
            stride = metric.output_stride or row.config.output_stride
            cost = cost_of(row.full_name)
            flops = cost.flops.get(stride) if cost else None
            if metric.name != "mIoU" or len(metric.scales) != 1 or metric.flip or not flops:
                continue
            found.append(
                Choice(
                    name=row.full_name,
                    architecture=row.config.architecture,
                    data=row.data,
                    miou=metric.value,
                    measured=metric.origin == "measured",
                    subset=metric.subset is not None,
                    output_stride=stride,
                    gflops=flops / 1e9,
                )
            )
    return sorted(found, key=lambda one: (one.data, -one.miou, one.name))


def efficient(of_one_data: Sequence[Choice]) -> list[Choice]:
    """Return those that no cheaper one equals or beats, cheapest first; whole published or measured splits alone."""
    best: list[Choice] = []
    for one in sorted((one for one in of_one_data if not one.subset), key=lambda one: (one.gflops, -one.miou)):
        if not best or one.miou > best[-1].miou:
            best.append(one)
    return best


def choosing_command(argv: Sequence[str] | None = None) -> int:
    """Draw the charts beside the document and write its block; raises UsageError for what is no record, OutputError."""
    parser = Parser("benchmarking.choosing", "Accuracy against arithmetic and, where recorded, against time.")
    parser.add_argument("--records", type=Path, default=Path("benchmarks"), help="folder of the records (default benchmarks)")
    parser.add_argument("--write", type=Path, default=Path("docs/choosing.md"), metavar="DOCUMENT", help="with the block")
    args = parser.parse_args(argv)
    pictures = args.write.parent / "images"
    ensure_folder(pictures)
    all_of_them = choices()
    for data in charted(all_of_them):
        of_data = [one for one in all_of_them if one.data == data]
        _draw(of_data, [one.gflops for one in of_data], "GFLOPs at 513 x 513 (log)", data, pictures / f"choosing_{data}.png")
    timed = times(args.records)
    for data, points in _timed_charts(all_of_them, timed).items():
        ms = [timed[one.name, one.output_stride] for one in points]
        _draw(points, ms, f"ms an image, {_conditions(args.records)} (log)", data, pictures / f"choosing_{data}_time.png")
    text = replace_block(args.write, block(all_of_them, timed), BLOCK)
    write_atomically(args.write, lambda file: file.write(text.encode()))
    return 0


def charted(of_all: Sequence[Choice]) -> list[str]:
    """Return the data that enough files were scored on to draw a chart, the largest first."""
    files = {data: len({one.name for one in of_all if one.data == data}) for data in {one.data for one in of_all}}
    return sorted((data for data, count in files.items() if count >= _FEWEST), key=lambda data: (-files[data], data))


def block(of_all: Sequence[Choice], timed: dict[tuple[str, int], float]) -> str:
    """Return the block of the document: for every data set its charts and the files that no cheaper one equals."""
    with_times = _timed_charts(of_all, timed)
    parts = []
    for data in charted(of_all):
        of_data = [one for one in of_all if one.data == data]
        parts += [f"### {data}", f"![mIoU against arithmetic, {data}](images/choosing_{data}.png)"]
        if data in with_times:
            parts.append(f"![mIoU against time, {data}](images/choosing_{data}_time.png)")
        parts.append("\n".join(_table(efficient(of_data))))
    if not with_times:
        parts.append(
            "No chart of times stands here: benchmarks/ holds no record of enough of these files' times from image to labels."
        )
    return "\n\n".join(parts)


def times(records: Path) -> dict[tuple[str, int], float]:
    """Return the fastest recorded milliseconds from image to labels by (name.tag, stride), of the newest record alone.

    Records of several machines are never mixed in one chart.
    """
    newest = _newest(records)
    found: dict[tuple[str, int], float] = {}
    if newest is None:
        return found
    rows = {row.full_name: row for row in list_weights()} | {row.name: row for row in list_weights() if row.default}
    for one in newest.rows:
        if one.task != _TASK or one.ms is None or one.batch != 1 or one.name not in rows:
            continue
        row = rows[one.name]
        key = (row.full_name, row.config.output_stride)
        found[key] = min(one.ms.median, found.get(key, float("inf")))
    return found


def _newest(records: Path) -> Record | None:
    """Return the newest record that has times from image to labels."""
    files = [path for path in sorted(records.glob("**/*.json")) if KIND in path.read_text(encoding="utf-8")[:200]]
    timed = [record for record in map(read_record, files) if any(row.task == _TASK and row.ms for row in record.rows)]
    return max(timed, key=lambda record: record.date, default=None)


def _conditions(records: Path) -> str:
    newest = _newest(records)
    assert newest is not None, "called where times were found"
    where = newest.hardware.get("gpu") or f"{newest.hardware['cpu']}, {newest.threads} threads"
    return f"{where}, {newest.date[:10]}"


def _timed_charts(of_all: Sequence[Choice], timed: dict[tuple[str, int], float]) -> dict[str, list[Choice]]:
    points = [one for one in of_all if (one.name, one.output_stride) in timed]
    return {data: [one for one in points if one.data == data] for data in charted(points)}


def _table(best: Sequence[Choice]) -> Iterator[str]:
    yield "| | no cheaper file is as good | mIoU % | stride | GFLOPs | figure |"
    yield "|---|---|---|---|---|---|"
    for number, one in enumerate(best, 1):
        origin = "measured here" if one.measured else "published"
        yield f"| {number} | `{one.name}` | {one.miou:.2f} | {one.output_stride} | {one.gflops:.1f} | {origin} |"


def _draw(points: Sequence[Choice], xs: Sequence[float], xlabel: str, data: str, path: Path) -> None:
    library("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    for architecture, (colour, marker) in _STYLES.items():
        for measured in (False, True):
            chosen = [i for i, one in enumerate(points) if (one.architecture, one.measured) == (architecture, measured)]
            if not chosen:
                continue
            axes.scatter(
                [xs[i] for i in chosen],
                [points[i].miou for i in chosen],
                marker=marker,
                s=42,
                edgecolors=colour,
                facecolors=colour if measured else "white",
                label=f"{'DeepLabV3+' if architecture.endswith('plus') else 'DeepLabV3'}, "
                f"{'measured here' if measured else 'published'}",
            )
    _number_the_best(axes, points, xs)
    axes.set_xscale("log")
    axes.margins(x=0.14, y=0.12)
    axes.set_xlabel(f"{xlabel}; numbers as in the table")
    axes.set_ylabel(f"mIoU on {data}, % (single scale)")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    sink = io.BytesIO()
    FigureCanvasAgg(figure).print_png(sink)  # type: ignore[no-untyped-call]
    write_atomically(path, lambda file: file.write(sink.getvalue()))


def _number_the_best(axes: "Axes", points: Sequence[Choice], xs: Sequence[float]) -> None:
    """Write the table's numbers beside its points."""
    numbers = {one: number for number, one in enumerate(efficient(points), 1)}
    for one, x in zip(points, xs, strict=True):
        if one in numbers:
            axes.annotate(str(numbers[one]), (x, one.miou), xytext=(0, 6), textcoords="offset points", fontsize=9, ha="center")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(choosing_command, argv)


if __name__ == "__main__":
    sys.exit(main())
