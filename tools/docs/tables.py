"""Tables of released checkpoints in documents: `python -m tools.docs.tables --write README.md docs/weights.md`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.errors import UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.hub.model_info import metric_conditions

BEGIN, END = "<!-- weights-table:begin -->", "<!-- weights-table:end -->"
_ALL, _MEASURED = "weights-table", "measured-table"
_HEADER = ("checkpoint", "classes", "mIoU", "evaluation protocol", "file", "licence")


def markdown_table(rows: Sequence[WeightRow]) -> str:
    """Return one line per released checkpoint; metrics of one file are stacked, each with its protocol."""
    lines = [_line(_HEADER), _line(["---"] * len(_HEADER)), *(_line(_cells(row)) for row in rows)]
    return "\n".join(lines)


def fill_tables(document: Path, rows: Sequence[WeightRow]) -> str:
    """Return a document's text with its blocks filled: `weights-table` with all rows, `measured-table` with the measured ones.

    Raises UsageError for a document that cannot be read or has neither block.
    """
    measured = [row for row in rows if row.verified == "measured here"]
    text = _text(document)
    if f"<!-- {_MEASURED}:begin -->" in text:
        text = _replaced(document, text, markdown_table(measured), _MEASURED)
        if BEGIN not in text:
            return text
    return _replaced(document, text, markdown_table(rows), _ALL)


def replace_block(document: Path, table: str, block: str = _ALL) -> str:
    """Return a document's text with the table between the two marks of a block, `<!-- BLOCK:begin -->` and `… :end -->`.

    Raises UsageError for a document that cannot be read or has not exactly one such block.
    """
    return _replaced(document, _text(document), table, block)


def _text(document: Path) -> str:
    try:
        return document.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"'{document}' cannot be read: {error}.") from None


def _replaced(document: Path, text: str, table: str, block: str) -> str:
    begins, ends = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    before, begin, rest = text.partition(begins)
    _, end, after = rest.partition(ends)
    if not begin or not end or begins in after or ends in before:
        raise UsageError(f"'{document}' must hold one block `{begins}` … `{ends}`, in this order.")
    return f"{before}{begins}\n{table}\n{ends}{after}"


def _cells(row: WeightRow) -> list[str]:
    metrics = [metric for metric in row.metrics if metric.name == "mIoU"]
    return [
        f"`{row.full_name}`{' (default)' if row.default else ''}",
        f"{row.config.num_classes} ({row.data})",
        "<br>".join(f"{metric.value:.2f} {metric.unit}" for metric in metrics) or "none",
        "<br>".join(metric_conditions(metric) for metric in metrics) or row.verified,
        f"{row.bytes / 1e6:.1f} MB, {row.source.kind}" if row.bytes else f"{row.source.kind}, size not published",
        row.license.weights,
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def tables_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line; print the table of all checkpoints, or write the tables into documents."""
    parser = Parser("tables", "Write the tables of released checkpoints into documents.")
    parser.prog = "python -m tools.docs.tables"
    parser.add_argument(
        "--write",
        nargs="+",
        type=Path,
        metavar="FILE.md",
        help="documents with a block `<!-- weights-table:begin -->` … `<!-- weights-table:end -->`, or a `measured-table`",
    )
    documents, rows = parser.parse_args(argv).write, tuple(released())
    if not documents:
        print(markdown_table(rows))
        return 0
    # all documents are read and checked before the first is written
    texts = {document: fill_tables(document, rows) for document in documents}
    for document, text in texts.items():
        write_atomically(document, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(tables_command, argv)


if __name__ == "__main__":
    sys.exit(main())
