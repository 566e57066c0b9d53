"""Text for terminals: tables that fit the width, wrapped paragraphs, bold headings; plain and whole in pipes and files."""

import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence

_MAX_TEXT_WIDTH = 100
"""Width in columns of wrapped text where there is no terminal to ask, and at most anywhere: longer lines are hard to read."""

_GAP = "  "

_MIN_CELL_WIDTH = 12
"""Columns that a shortened cell keeps at least."""


def terminal_width() -> int | None:
    """Return the terminal's columns (`COLUMNS` first), or None where stdout is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def bold(text: str) -> str:
    """Return the text in bold on a terminal, unless NO_COLOR (no-color.org) or TERM=dumb says not to."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"


def columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = (), shrinkable: Sequence[str] = ()
) -> str:
    """Return a table whose columns named in `right` are flush right.

    On a terminal that is too narrow the columns named in `shrinkable` are cut with an ellipsis, the last named first.
    """
    widths = [max(map(len, cells)) for cells in zip(header, *rows, strict=True)]
    available = terminal_width()
    if available is not None:
        excess = sum(widths) + len(_GAP) * (len(widths) - 1) - available
        for name in reversed(shrinkable):
            index = header.index(name)
            cut = min(max(excess, 0), max(widths[index] - max(_MIN_CELL_WIDTH, len(name)), 0))
            widths[index] -= cut
            excess -= cut

    def line(cells: Sequence[str]) -> str:
        fitted = [_truncate(cell, width) for cell, width in zip(cells, widths, strict=True)]
        padded = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(fitted, widths, header, strict=True)
        ]
        return _GAP.join(padded).rstrip()

    return "\n".join([bold(line(header)), *map(line, rows)])


def paragraph(label: str, text: str, *, indent: int = 2, hanging_indent: int = 18) -> str:
    """Return `text` wrapped to the terminal behind a label; lines after the first begin where the first text began."""
    width = min(terminal_width() or _MAX_TEXT_WIDTH, _MAX_TEXT_WIDTH)
    first = f"{' ' * indent}{label}".ljust(hanging_indent)
    filled = textwrap.fill(
        text,
        max(width, hanging_indent + _MIN_CELL_WIDTH),
        initial_indent=first if first.endswith(" ") or not label else f"{first} ",
        subsequent_indent=" " * hanging_indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled or first.rstrip()


def _truncate(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"
