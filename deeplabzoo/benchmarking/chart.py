"""A record as a picture: how many times as fast (or small) as each peer, with the quartiles as whiskers."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.benchmarking.libraries import library
from deeplabzoo.benchmarking.record import Record, Row
from deeplabzoo.errors import UsageError
from deeplabzoo.output import write_atomically

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
