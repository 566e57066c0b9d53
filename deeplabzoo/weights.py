"""`python -m deeplabzoo.weights list|check|record|table`: the released weights, whether they are still there, their figures.

The manifest is the one place where a figure stands: `record` puts an evaluation report's figure into the row of the very file
that was evaluated, and `table` writes the table of README and docs from the rows, so that no number is typed twice.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deeplabzoo.cli import Parser, run
from deeplabzoo.errors import DownloadError, UsageError
from deeplabzoo.output import write_atomically
from deeplabzoo.plain_json import parse_json

_EPILOG = """examples:
  python -m deeplabzoo.weights list "*_voc*"
  python -m deeplabzoo.weights check
  python -m deeplabzoo.weights check "deeplabv3_resnet*" --download
  python -m deeplabzoo.evaluate deeplabv3_mobilenetv2_voc --data voc --root DIR --json report.json
  python -m deeplabzoo.weights record report.json
  python -m deeplabzoo.weights table --write README.md docs/weights.md
"""


class _Action(Parser):
    """The parser of one action; argparse names it by its full program name, and gives it nothing else that is needed."""

    def __init__(self, prog: str, description: str, **_: Any) -> None:
        super().__init__(prog.removeprefix("python -m deeplabzoo."), description)


def weights_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and list, check, record or tabulate; raises DeepLabZooError where it cannot."""
    args = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    if args.action == "list":
        _list(args.pattern, as_json=args.json)
    elif args.action == "check":
        _check(args.pattern, download=args.download, as_json=args.json)
    elif args.action == "record":
        _record(args.reports)
    else:
        _table(args.write)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 the work failed, 2 the call was wrong."""
    return run(weights_command, argv)


def _parser() -> Parser:
    parser = Parser("weights", "List and check the released weights, record measured figures, write tables from them.", _EPILOG)
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|check|record|table", parser_class=_Action)
    listing = actions.add_parser("list", description="One line per released file.")
    listing.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help='shell pattern, e.g. "*_voc*"')
    listing.add_argument("--json", action="store_true", help="the manifest's rows instead, as a JSON list")
    check = actions.add_parser(
        "check", description="Ask whether every released file is still there, and still the published one."
    )
    check.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help='shell pattern, e.g. "*_voc*"')
    check.add_argument(
        "--download", action="store_true", help="fetch each file, verify it and build its network; the cache is used and kept"
    )
    check.add_argument("--json", action="store_true", help="the answers as a JSON list when all have come")
    record = actions.add_parser(
        "record", description="Put evaluation reports' figures into the rows of the files they measured."
    )
    record.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json", help="what evaluate --json wrote")
    table = actions.add_parser("table", description="Print the table of released weights, or rewrite it inside documents.")
    table.add_argument(
        "--write",
        nargs="+",
        type=Path,
        metavar="FILE.md",
        help="documents with a block `<!-- weights-table:begin -->` … `… :end -->`, or a `measured-table`",
    )
    return parser


def _list(pattern: str, *, as_json: bool) -> None:
    from deeplabzoo.zoo.listing import plain_rows
    from deeplabzoo.zoo.registry import list_weights

    rows = list_weights(pattern)
    if as_json:
        print(json.dumps(plain_rows(rows), indent=2, ensure_ascii=False))
        return
    if not rows:
        raise UsageError(f"No released weights match '{pattern}'; leave the pattern out to see all.")
    for row in rows:
        print(row)


def _check(pattern: str, *, download: bool, as_json: bool) -> None:
    """Print a line a row as the answers come, or all as JSON; raises DownloadError if any file is changed or cannot be had."""
    from deeplabzoo.zoo.checking import check, check_by_download
    from deeplabzoo.zoo.registry import list_weights

    rows = list_weights(pattern)
    if not rows:
        raise UsageError(f"No released weights match '{pattern}'; leave the pattern out to check all.")
    counts: Counter[str] = Counter()
    answers = []
    for answer in check_by_download(rows) if download else check(rows):
        if not as_json:
            print(answer, flush=True)
        answers.append({"weights": answer.row.full_name, "status": answer.status, "detail": answer.detail})
        counts[answer.status] += 1
    if as_json:
        print(json.dumps(answers, indent=2, ensure_ascii=False))
    told = ", ".join(f"{counts[status]} {status}" for status in ("ok", "changed", "unreachable"))
    summary = f"{len(rows)} released files checked: {told}."
    if counts["ok"] < len(rows):
        raise DownloadError(summary)
    if not as_json:
        print(summary)


def _record(reports: Sequence[Path]) -> None:
    from deeplabzoo.say import say
    from deeplabzoo.zoo.manifest import weights_folder
    from deeplabzoo.zoo.measured import record

    manifest = weights_folder() / "manifest.json"
    for report in reports:
        source_tree = manifest.resolve().parents[1]
        kept = report.resolve().relative_to(source_tree).as_posix() if report.resolve().is_relative_to(source_tree) else None
        text, line = record(manifest.read_text(encoding="utf-8"), _read_report(report), kept)
        _write(manifest, text)
        say(line)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' cannot be read as a report: {error}.") from None
    if not isinstance(report, dict):
        raise UsageError(f"'{path}' is not a report: expected what `evaluate --json` writes.")
    return report


def _table(documents: Sequence[Path] | None) -> None:
    from deeplabzoo.zoo.manifest import released
    from deeplabzoo.zoo.table import fill_tables, markdown_table

    rows = tuple(released())
    if not documents:
        print(markdown_table(rows))
        return
    # all are read and checked before the first is written
    texts = {document: fill_tables(document, rows) for document in documents}
    for document, text in texts.items():
        _write(document, text)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    sys.exit(main())
