"""`python -m benchmarks.suite table --write DOCUMENT …`: write the recorded runs as tables into documents."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.suite import demo_table, exports_table, large_images_table
from deeplabzoo.benchmark import training
from deeplabzoo.benchmark.record import BLOCK, records_table
from deeplabzoo.cli.parser import Parser
from deeplabzoo.errors import UsageError
from deeplabzoo.files import write_atomically
from tools.docs.tables import replace_block

_TRAINING = "training"
"""Folder of the records of training steps below the others."""


def tables(records: Path) -> Mapping[str, str]:
    """Return every table by the name of its block in documents; raises UsageError for an invalid record."""
    return {
        BLOCK: records_table(records),
        training.BLOCK: training.records_table(records / _TRAINING),
        demo_table.BLOCK: demo_table.demo_table(records / demo_table.FOLDER),
        exports_table.BLOCK: exports_table.exports_table(records / exports_table.FOLDER),
        **large_images_table.large_images_tables(records / large_images_table.FOLDER),
    }


def fill(document: Path, by_block: Mapping[str, str]) -> None:
    """Write the tables into the marked blocks of a document; raises UsageError for a document without one, OutputError."""
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"'{document}' cannot be read: {error}.") from None
    blocks = [block for block in by_block if f"<!-- {block}:begin -->" in text]
    if not blocks:
        raise UsageError(f"'{document}' has no block `<!-- {BLOCK}:begin -->` … `<!-- {BLOCK}:end -->` for a table.")
    for block in blocks:
        new = replace_block(document, by_block[block], block).encode()
        write_atomically(document, lambda file, new=new: file.write(new))  # type: ignore[misc]


def table_command(argv: Sequence[str]) -> int:
    """Print the tables, or write them into the marked blocks of documents."""
    parser = Parser("benchmark", "The recorded benchmarks as Markdown.")
    parser.prog = "python -m benchmarks.suite table"
    parser.add_argument("--records", type=Path, metavar="DIR", default=Path("benchmarks"), help="folder of the records")
    parser.add_argument("--write", type=Path, nargs="+", metavar="DOCUMENT", help="documents with marked blocks")
    args = parser.parse_args(argv)
    by_block = tables(args.records)
    if not args.write:
        print("\n\n".join(by_block.values()))
        return 0
    for document in args.write:
        fill(document, by_block)
    return 0
