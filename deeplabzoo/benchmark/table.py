"""Records as tables: aligned for a terminal, Markdown for documents; every number in them is read from a record."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.benchmark import library
from deeplabzoo.benchmark.record import Record, Row, Spread, read_record
from deeplabzoo.errors import UsageError
from deeplabzoo.files import write_atomically

BLOCK = "speed-table"
_HEADER = ("model", "task", "size", "batch", "ours", "ms", "peer", "ms", "ratio", "labels equal", "of GEMM peak", "peak MB")


def text_table(rows: Sequence[Row]) -> str:
    """Return rows aligned for a terminal, without the columns that none of them fills."""
    header, cells = _nonempty_columns(rows)
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *cells]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def record_table(record: Record, name: str) -> str:
    """Return one record as Markdown: its conditions in a sentence, its rows, the command that measures them again."""
    where = record.hardware.get("gpu") or record.hardware["cpu"]
    versions = ", ".join(f"{library} {version}" for library, version in record.versions.items())
    made = (record.commit or "unknown").partition(" ")
    conditions = (
        f"`{name}`: {where}, {_count(record.threads, 'thread')}; {versions}; {record.date[:10]}, "
        f"commit {f'{made[0][:12]} {made[2]}'.strip()}; {_settings(record)}."
    )
    header, cells = _nonempty_columns(record.rows)
    lines = [_line(header), _line(["---"] * len(header)), *map(_line, cells)]
    notes = [f"- {note}" for note in dict.fromkeys(f"{row.name}: {row.note}" for row in record.rows if row.note)]
    return "\n".join([conditions, "", *lines, "", *notes, *([""] if notes else []), f"Reproduce: `{record.command}`"])


def records_table(folder: Path) -> str:
    """Return all records of a folder in the order of their names; raises UsageError for a JSON file that is none."""
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
    """Return the median with the quartiles, or the figure alone where it was found once."""
    if spread is None:
        return ""
    if spread.low == spread.high:
        return f"{spread.median:.2f}"
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _settings(record: Record) -> str:
    """Return the switches in words; TF32 is a matter of GPUs."""
    peaks = ", ".join(f"{speed:.0f} GFLOP/s with {_count(int(n), 'thread')}" for n, speed in _peaks(record).items())
    words = [f"denormals flushed to {record.settings['denormals']}", f"GEMM peak {peaks}"]
    if record.hardware.get("gpu"):
        words += [f"TF32 in {what}: {record.settings[f'tf32_{what}']}" for what in ("matmul", "convolutions")]
    return "; ".join(words)


def _peaks(record: Record) -> dict[str, float]:
    return dict(record.settings["gemm_gflop_per_s"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


# A record as a picture: how many times as fast (or small) as each peer, with the quartiles as whiskers.


_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito's, which people with any colour vision tell apart."""
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
_BAR = 0.8


def draw_chart(record: Record, path: Path) -> None:
    """Write a PNG with a group of bars a model and task, a bar a peer and side of ours.

    Raises UsageError where no row has a ratio, or matplotlib is missing, and OutputError.
    """
    rows = [row for row in record.rows if row.ratio is not None]
    if not rows:
        raise UsageError("A chart shows ratios, and no row has a peer; name some with --peers, or leave --chart out.")
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
    axes.set_xlabel("times as fast as the peer, or as small (above 1: ours is better); whiskers are quartiles")
    where = record.hardware.get("gpu") or f"{record.hardware['cpu']}, {record.threads} thread{'s' * (record.threads != 1)}"
    axes.set_title(f"deeplabzoo against its peers, same weights\n{where}, torch {record.versions['torch']}, {record.date[:10]}")
    figure.legend(fontsize=8, loc="outside lower center")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)  # type: ignore[no-untyped-call]
    write_atomically(path, lambda file: file.write(picture.getvalue()))


def _group(row: Row) -> str:
    size = f"\n{row.size[0]}x{row.size[1]}, batch {row.batch}" if row.size else ""
    return f"{row.name}\n{row.task}{size}"


def _against(row: Row) -> str:
    return f"{row.side} against {row.peer}"


def _whiskers(rows: Sequence[Row]) -> list[list[float]]:
    spreads = [row.ratio for row in rows if row.ratio]
    return [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]
