"""Benchmark records: measured rows with the conditions to judge and reproduce them; tables and charts of records."""

import dataclasses
import datetime
import importlib.metadata
import io
import itertools
import json
import os
import platform
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from deeplabzoo.benchmark import library
from deeplabzoo.errors import UsageError
from deeplabzoo.evaluation.report import hardware
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.git import current_commit

RECORDS = Path("benchmarks")
"""Folder of `--json auto`, below the current folder."""
KIND = "deeplabzoo.benchmark/1"
"""First field of a record, which identifies the file format."""
_LIBRARIES = (
    "deeplabzoo",
    "torch",
    "torchvision",
    "timm",
    "segmentation-models-pytorch",
    "transformers",
    "onnxruntime",
    "openvino",
    "numba",
    "torchmetrics",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of several measurements."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of one or more values; quartiles by the inclusive method of `statistics.quantiles`."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: one of our backends alone, or interleaved with one peer.

    `ratio` is above 1 if ours is better: the peer's time over ours, pair by pair, or the peer's memory over ours.
    """

    name: str
    """Model, or a short description of what was run."""
    task: str
    """What was measured: `image -> labels`, `image -> logits`, `peak memory`, `confusion matrix`, ..."""
    side: str
    """Our backend and precision."""
    threads: int
    peer: str | None = None
    """The peer, and how it was run."""
    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    batch: int = 1
    pairs: int = 1
    """Interleaved runs of each side."""
    ms: Spread | None = None
    """Milliseconds per call of ours."""
    peer_ms: Spread | None = None
    ratio: Spread | None = None
    agreement: float | None = None
    """Share of equal labels of both sides on the measured input, 0 to 1."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Other values with their unit in the name (`images_per_s`, `peak_mb`, `gflop`, `share_of_gemm_peak`)."""
    note: str = ""

    @classmethod
    def paired(cls, own_times_ms: Sequence[float], peer_times_ms: Sequence[float] | None, **facts: Any) -> Self:
        """Return a row from interleaved times A B A B …; ratios are taken pair by pair, so that drift cancels."""
        ratio = None
        if peer_times_ms is not None:
            ratio = Spread.of([theirs / ours for ours, theirs in zip(own_times_ms, peer_times_ms, strict=True)])
        return cls(
            pairs=len(own_times_ms),
            ms=Spread.of(own_times_ms),
            peer_ms=None if peer_times_ms is None else Spread.of(peer_times_ms),
            ratio=ratio,
            **facts,
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """Rows of one run with the conditions to judge and reproduce them."""

    rows: tuple[Row, ...]
    command: str
    precision: str
    """Of our backends, joined by `+`."""
    layout: str
    """Memory layout of our backends' tensors."""
    threads: int
    seed: int
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Switches that change times: denormals, TF32."""
    date: str
    """ISO 8601, UTC."""
    commit: str | None

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps({"kind": KIND, **dataclasses.asdict(self)}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the record atomically; raises OutputError."""
        text = self.to_json()
        write_atomically(path, lambda file: file.write(text.encode()))

    def file_name(self) -> str:
        """Return `<date>_<hardware>_<torch>_<precision>_<layout>.json`."""
        where = str(self.hardware.get("gpu") or self.hardware["cpu"])
        parts = (self.date[:10], f"{where}-{self.threads}t", f"torch-{self.versions['torch']}", self.precision, self.layout)
        return "_".join(re.sub(r"[^A-Za-z0-9.+]+", "-", part).strip("-").lower() for part in parts) + ".json"


def conditions(device: torch.device) -> dict[str, Any]:
    """Return the fields of a Record that describe the machine and the installation."""
    return {
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": hardware(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
    }


def reproduce_command(module: str, arguments: Sequence[str]) -> str:
    """Return the command of a record; the dataset folder of this machine is written as `$DEEPLABZOO_DATA`."""
    command = shlex.join(["python", "-m", module, *arguments])
    folder = os.environ.get("DEEPLABZOO_DATA")
    return command.replace(folder, "$DEEPLABZOO_DATA") if folder else command


def all_threads_flush_denormals() -> bool:
    """Whether torch's worker threads flush denormals to zero, found by computing with denormals in all of them."""
    tiny = torch.full((1 << 22,), 1e-39)
    return not bool((tiny * 1.0).any())


def runtime_settings(peaks: Mapping[str, float]) -> dict[str, Any]:
    """Return the switches that move a time, as a Record keeps them; `peaks` are GEMM GFLOP/s by number of threads."""
    return {
        "denormals": "zero in every thread" if all_threads_flush_denormals() else "zero in the main thread alone",
        "gemm_gflop_per_s": dict(peaks),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def read_record(path: Path) -> Record:
    """Read a record; raises UsageError for any other file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("kind") != KIND:
            raise ValueError(f"its kind is not {KIND}")
        rows = tuple(_row(row) for row in values.pop("rows"))
        return Record(rows=rows, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{path}' is not a record of `python -m deeplabzoo.benchmark --json`: {error}.") from None


def _row(values: dict[str, Any]) -> Row:
    for name in ("ms", "peer_ms", "ratio"):
        if values[name] is not None:
            values[name] = Spread(**values[name])
    if values["size"] is not None:
        values["size"] = tuple(values["size"])
    return Row(**values)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record_path(json: str | None, record: Record) -> Path | None:
    """Return the file to write; `auto` makes a name from the conditions, numbered if it exists."""
    if json is None:
        return None
    path = Path(json) if json != "auto" else RECORDS / record.file_name()
    ensure_folder(path.parent)
    if json != "auto":
        return path
    numbered = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists())


# Records as tables, aligned for a terminal or as Markdown.

BLOCK = "speed-table"
_HEADER = ("model", "task", "size", "batch", "ours", "ms", "peer", "ms", "ratio", "labels equal", "of GEMM peak", "peak MB")


def text_table(rows: Sequence[Row]) -> str:
    """Return rows aligned for a terminal, without empty columns."""
    header, cells = _nonempty_columns(rows)
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *cells]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def record_table(record: Record, name: str) -> str:
    """Return one record as Markdown: its conditions, its rows and the command that reproduces them."""
    where = record.hardware.get("gpu") or record.hardware["cpu"]
    versions = ", ".join(f"{library} {version}" for library, version in record.versions.items())
    made = (record.commit or "unknown").partition(" ")
    conditions = (
        f"`{name}`: {where}, {count_noun(record.threads, 'thread')}; {versions}; {record.date[:10]}, "
        f"commit {f'{made[0][:12]} {made[2]}'.strip()}; {_settings(record)}."
    )
    header, cells = _nonempty_columns(record.rows)
    lines = [table_line(header), table_line(["---"] * len(header)), *map(table_line, cells)]
    notes = [f"- {note}" for note in dict.fromkeys(f"{row.name}: {row.note}" for row in record.rows if row.note)]
    return "\n".join([conditions, "", *lines, "", *notes, *([""] if notes else []), f"Reproduce: `{record.command}`"])


def records_table(folder: Path) -> str:
    """Return all records of a folder, sorted by file name; raises UsageError for a JSON file that is not a record."""
    tables = [record_table(read_record(path), path.name) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(tables) or "No run is recorded yet."


def _nonempty_columns(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    cells = [_cells(row) for row in rows]
    kept = [index for index in range(len(_HEADER)) if any(line[index] for line in cells)]
    return tuple(_HEADER[index] for index in kept), [tuple(line[index] for index in kept) for line in cells]


def _cells(row: Row) -> tuple[str, ...]:
    figures = row.figures
    share, peak, peer_peak = (figures.get(name) for name in ("share_of_gemm_peak", "peak_mb", "peer_peak_mb"))
    return (
        row.name,
        row.task,
        f"{row.size[0]}x{row.size[1]}" if row.size else "",
        str(row.batch) if row.size else "",
        row.side,
        _milliseconds(row.ms),
        row.peer or "",
        _milliseconds(row.peer_ms),
        _ratio(row.ratio),
        "" if row.agreement is None else f"{100 * row.agreement:.3f} %",
        "" if share is None else f"{100 * share:.0f} %",
        "" if peak is None else f"{peak:.0f}" + ("" if peer_peak is None else f" against {peer_peak:.0f}"),
    )


def _milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return ""
    digits = 2 if spread.median < 10 else 1 if spread.median < 100 else 0
    return f"{spread.median:.{digits}f}"


def _ratio(spread: Spread | None) -> str:
    """Return the median with the quartiles, or a single measurement alone."""
    if spread is None:
        return ""
    if spread.low == spread.high:
        return f"{spread.median:.2f}"
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _settings(record: Record) -> str:
    """Return the switches as text; TF32 applies to GPUs only."""
    peaks = ", ".join(f"{speed:.0f} GFLOP/s with {count_noun(int(n), 'thread')}" for n, speed in _peaks(record).items())
    parts = [f"denormals flushed to {record.settings['denormals']}", f"GEMM peak {peaks}"]
    if record.hardware.get("gpu"):
        parts += [f"TF32 in {what}: {record.settings[f'tf32_{what}']}" for what in ("matmul", "convolutions")]
    return "; ".join(parts)


def _peaks(record: Record) -> dict[str, float]:
    return dict(record.settings["gemm_gflop_per_s"])


def count_noun(number: int, noun: str) -> str:
    """Return e.g. `1 thread`, `2 threads`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table_line(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


# A record as a chart.

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito's palette for any colour vision."""
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
_BAR = 0.8


def draw_chart(record: Record, path: Path) -> None:
    """Write a PNG of the ratios with quartiles: a group of bars per model and task, a bar per peer and backend.

    Raises UsageError without any ratio or matplotlib, and OutputError.
    """
    rows = [row for row in record.rows if row.ratio is not None]
    if not rows:
        raise UsageError("--chart draws ratios to peers, and no row has one; add --peers, or omit --chart.")
    library("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(map(_group, rows)))
    sides = list(dict.fromkeys(map(_against, rows)))
    height = _BAR / len(sides)
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(rows) + 0.3 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for index, (side, colour, hatch) in enumerate(zip(sides, itertools.cycle(_COLOURS), itertools.cycle(_HATCHES))):
        own = [row for row in rows if _against(row) == side]
        places = [groups.index(_group(row)) + height * (index - (len(sides) - 1) / 2) for row in own]
        medians = [row.ratio.median for row in own if row.ratio]
        axes.barh(places, medians, height * 0.9, xerr=_whiskers(own), label=side, edgecolor="white", color=colour, hatch=hatch)
        for place, row in zip(places, own, strict=True):
            if row.ratio:
                axes.text(row.ratio.high, place, f" {row.ratio.median:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("speed-up over the peer, or memory ratio (above 1: ours is better); whiskers are quartiles")
    where = record.hardware.get("gpu") or f"{record.hardware['cpu']}, {record.threads} thread{'s' * (record.threads != 1)}"
    axes.set_title(f"deeplabzoo and its peers, same weights\n{where}, torch {record.versions['torch']}, {record.date[:10]}")
    figure.legend(fontsize=8, loc="outside lower center")
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)  # type: ignore[no-untyped-call]
    write_atomically(path, lambda file: file.write(image.getvalue()))


def _group(row: Row) -> str:
    size = f"\n{row.size[0]}x{row.size[1]}, batch {row.batch}" if row.size else ""
    return f"{row.name}\n{row.task}{size}"


def _against(row: Row) -> str:
    return f"{row.side} against {row.peer}"


def _whiskers(rows: Sequence[Row]) -> list[list[float]]:
    spreads = [row.ratio for row in rows if row.ratio]
    return [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]
