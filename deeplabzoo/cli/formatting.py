"""Text for terminals: tables that fit the width, wrapped paragraphs, bold headings; whole lines without escapes in pipes."""

import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import TextIO

from deeplabzoo.errors import printable

_MAX_TEXT_WIDTH = 100
"""Columns of wrapped text in pipes, and at most on a terminal."""

_GAP = "  "
_MIN_CELL_WIDTH = 12
"""Columns that a truncated cell keeps."""


def terminal_width() -> int | None:
    """Return the terminal's columns (`COLUMNS` first), or None where stdout is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def bold(text: str) -> str:
    """Return the text in bold on a terminal, unless NO_COLOR (no-color.org) or TERM=dumb is set."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"


def columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = (), shrinkable: Sequence[str] = ()
) -> str:
    """Return a table.

    Args:
        header: Names of the columns.
        rows: Cells of each row.
        right: Names of right-aligned columns.
        shrinkable: Names of columns that are truncated on a narrow terminal, the last one first.
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


def print_field(name: str, text: str, *, file: TextIO | None = None) -> None:
    """Print `text` behind its name; control characters of class and file names are escaped."""
    print(f"{name:<9} {printable(text)}", file=file)


def paragraph(label: str, text: str, *, indent: int = 2, hanging_indent: int = 18) -> str:
    """Return `text` behind a label, wrapped to the terminal with a hanging indent."""
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
