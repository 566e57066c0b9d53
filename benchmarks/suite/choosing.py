"""`python -m benchmarks.suite.choosing --write docs/choosing.md`: charts of accuracy against GFLOPs and time.

GFLOPs come from the counted table, accuracy from the manifest, times from the records in benchmarks/.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.suite.recorded_times import Times, recorded_times
from deeplabzoo.benchmark import library
from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.hub.model_info import get_cost
from deeplabzoo.hub.registry import list_weights
from tools.docs.tables import replace_block

if TYPE_CHECKING:
    from matplotlib.axes import Axes


BLOCK = "choosing"
_MIN_POINTS = 8
"""Checkpoints that a dataset needs for a chart."""
_MIN_TIMED_POINTS = 3
_STYLES = {"deeplabv3": ("#0072B2", "o"), "deeplabv3plus": ("#D55E00", "^")}
"""Colour (Okabe and Ito's) and marker of an architecture: distinguishable without colour, too."""


@dataclass(frozen=True)
class Choice:
    """One released checkpoint at one output stride: its cost, its mIoU and where that comes from."""

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
    """Return every single-scale, unflipped mIoU of the manifest with counted GFLOPs, best first within its dataset."""
    found = []
    for row in list_weights():
        for metric in row.metrics:
            stride = metric.output_stride or row.config.output_stride
            cost = get_cost(row.full_name)
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


def pareto_front(of_one_dataset: Sequence[Choice]) -> list[Choice]:
    """Return the Pareto-optimal checkpoints, cheapest first; only those evaluated on a whole split."""
    best: list[Choice] = []
    for one in sorted((one for one in of_one_dataset if not one.subset), key=lambda one: (one.gflops, -one.miou)):
        if not best or one.miou > best[-1].miou:
            best.append(one)
    return best


def choosing_command(argv: Sequence[str] | None = None) -> int:
    """Draw the charts beside the document and write its block; raises UsageError for an invalid record, OutputError."""
    parser = Parser("choosing", "Charts of accuracy against GFLOPs and, where recorded, against time.")
    parser.prog = "python -m benchmarks.suite.choosing"
    parser.add_argument("--records", type=Path, default=Path("benchmarks"), help="folder of the records")
    parser.add_argument(
        "--write", type=Path, default=Path("docs/choosing.md"), metavar="DOCUMENT", help="document with the block"
    )
    args = parser.parse_args(argv)
    images = args.write.parent / "images"
    ensure_folder(images)
    all_of_them = choices()
    for data in datasets_with_chart(all_of_them):
        of_data = [one for one in all_of_them if one.data == data]
        flops = [one.gflops for one in of_data]
        _draw(of_data, pareto_front(of_data), flops, "GFLOPs at 513 x 513 (log)", data, images / f"choosing_{data}.png")
    times = recorded_times(args.records)
    for data, points in timed(all_of_them, times).items():
        assert times is not None, "points have times"
        ms = [times.by_file[one.name].ms for one in points]
        label = f"ms per image of about 513 x 513, fastest backend (log); {times.machine}"
        _draw(points, points, ms, label, data, images / f"choosing_{data}_time.png")
    text = replace_block(args.write, block(all_of_them, times), BLOCK)
    write_atomically(args.write, lambda file: file.write(text.encode()))
    return 0


def datasets_with_chart(all_choices: Sequence[Choice]) -> list[str]:
    """Return the datasets with enough checkpoints for a chart, the largest first."""
    files = {data: len({one.name for one in all_choices if one.data == data}) for data in {one.data for one in all_choices}}
    return sorted((data for data, count in files.items() if count >= _MIN_POINTS), key=lambda data: (-files[data], data))


def timed(all_choices: Sequence[Choice], times: Times | None) -> dict[str, list[Choice]]:
    """Return the choices with recorded times, fastest first, by dataset; only datasets with enough of them."""
    if times is None:
        return {}
    strides = {row.full_name: row.config.output_stride for row in list_weights()}
    points = [one for one in all_choices if one.name in times.by_file and one.output_stride == strides[one.name]]
    points.sort(key=lambda one: times.by_file[one.name].ms)
    by_data = {data: [one for one in points if one.data == data] for data in dict.fromkeys(one.data for one in points)}
    return {data: chosen for data, chosen in by_data.items() if len(chosen) >= _MIN_TIMED_POINTS}


def block(all_choices: Sequence[Choice], times: Times | None) -> str:
    """Return the block of the document: the charts and the Pareto-optimal checkpoints of every dataset."""
    with_times = timed(all_choices, times)
    parts = []
    for data in datasets_with_chart(all_choices):
        of_data = [one for one in all_choices if one.data == data]
        parts += [f"### {data}", f"![mIoU against GFLOPs, {data}](images/choosing_{data}.png)"]
        parts.append("\n".join(_table(pareto_front(of_data))))
    for data, points in with_times.items():
        assert times is not None, "points have times"
        parts += [
            f"### {data}, by time",
            f"Measured on {times.machine}: the fastest float32 backend of each checkpoint that has a record.",
        ]
        parts += [f"![mIoU against time, {data}](images/choosing_{data}_time.png)", "\n".join(_time_table(points, times))]
    if not with_times:
        parts.append("No chart of times: benchmarks/ has too few records from image to labels of these checkpoints.")
    return "\n\n".join(parts)


def _table(best: Sequence[Choice]) -> Iterator[str]:
    yield "| | Pareto-optimal checkpoint | mIoU % | stride | GFLOPs | origin |"
    yield "|---|---|---|---|---|---|"
    for number, one in enumerate(best, 1):
        origin = "measured here" if one.measured else "published"
        yield f"| {number} | `{one.name}` | {one.miou:.2f} | {one.output_stride} | {one.gflops:.1f} | {origin} |"


def _time_table(points: Sequence[Choice], times: Times) -> Iterator[str]:
    yield "| | checkpoint | mIoU % | stride | ms | backend |"
    yield "|---|---|---|---|---|---|"
    for number, one in enumerate(points, 1):
        time = times.by_file[one.name]
        yield f"| {number} | `{one.name}` | {one.miou:.2f} | {one.output_stride} | {time.ms:.0f} | {time.side} |"


def _draw(
    points: Sequence[Choice], numbered: Sequence[Choice], xs: Sequence[float], xlabel: str, data: str, path: Path
) -> None:
    """Write a chart as PNG; `numbered` are the points of the table, in its order."""
    library("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

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
    _number(axes, points, numbered, xs)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.14, y=0.12)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(f"mIoU on {data}, % (single scale)")
    axes.set_title("numbers as in the table", fontsize=8, loc="right", color="#555555")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    sink = io.BytesIO()
    FigureCanvasAgg(figure).print_png(sink)  # type: ignore[no-untyped-call]
    write_atomically(path, lambda file: file.write(sink.getvalue()))


def _number(axes: "Axes", points: Sequence[Choice], numbered: Sequence[Choice], xs: Sequence[float]) -> None:
    """Write the table's numbers beside its points."""
    for one, x in zip(points, xs, strict=True):
        if one in numbered:
            number = str(list(numbered).index(one) + 1)
            axes.annotate(number, (x, one.miou), xytext=(0, 6), textcoords="offset points", fontsize=9, ha="center")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(choosing_command, argv)


if __name__ == "__main__":
    sys.exit(main())
