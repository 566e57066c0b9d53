"""`python -m deeplabzoo.weights ACTION`: the released weights, whether they are still there and still as good, their figures.

The manifest is the one place where a figure stands: `record` puts an evaluation report's figure into the row of the very file
that was evaluated, `verify` measures it again, and `table` writes the table of README and docs from the rows, so that no
number is typed twice.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeplabzoo.cli.parser import Parser, add_device_option, run
from deeplabzoo.errors import DownloadError, UnknownNameError, UsageError, WeightsError, did_you_mean
from deeplabzoo.files import write_atomically
from deeplabzoo.strict_json import parse_json

if TYPE_CHECKING:
    from deeplabzoo.hub.manifest import WeightRow


_EPILOG = """examples:
  python -m deeplabzoo.weights list "*_voc*"
  python -m deeplabzoo.weights check
  python -m deeplabzoo.weights check "deeplabv3_resnet*" --download
  python -m deeplabzoo.weights verify deeplabv3plus_mobilenetv2_voc --data ~/data
  python -m deeplabzoo.evaluate deeplabv3_mobilenetv2_voc --data voc --root DIR --json report.json
  python -m deeplabzoo.weights record report.json
  python -m deeplabzoo.weights table --write README.md docs/weights.md
"""


class _Action(Parser):
    """The parser of one action; argparse names it by its full program name, and gives it nothing else that is needed."""

    def __init__(self, prog: str, description: str, **_: Any) -> None:
        super().__init__(prog.removeprefix("python -m deeplabzoo."), description)


def weights_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and list, check, verify, record or tabulate; raises DeepLabZooError where it cannot."""
    args = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    if args.action == "list":
        _list(args.pattern, as_json=args.json)
    elif args.action == "check":
        _check(args.pattern, download=args.download, as_json=args.json)
    elif args.action == "verify":
        _verify(args)
    elif args.action == "record":
        _record(args.reports)
    else:
        _table(args.write)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 the work failed, 2 the call was wrong."""
    return run(weights_command, argv)


def _parser() -> Parser:
    parser = Parser("weights", "List, check and verify the released weights, record measured figures, write tables.", _EPILOG)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="list|check|verify|record|table", parser_class=_Action
    )
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
    _add_verify(actions.add_parser("verify", description="Measure the figures of rows again; 0 if every one is as stated."))
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


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("names", nargs="+", metavar="NAME", help="a name, NAME.TAG, or a shell pattern of either")
    verify.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the folder that is, or directly contains, the data sets (default: DEEPLABZOO_DATA)",
    )
    verify.add_argument(
        "--tolerance", type=float, default=0.1, metavar="POINTS", help="largest difference of a figure in points (default 0.1)"
    )
    add_device_option(verify)


def _list(pattern: str, *, as_json: bool) -> None:
    from deeplabzoo.hub.model_info import rows_to_dicts
    from deeplabzoo.hub.registry import list_weights

    rows = list_weights(pattern)
    if as_json:
        print(json.dumps(rows_to_dicts(rows), indent=2, ensure_ascii=False))
        return
    if not rows:
        raise UsageError(f"No released weights match '{pattern}'; leave the pattern out to see all.")
    for row in rows:
        print(row)


def _check(pattern: str, *, download: bool, as_json: bool) -> None:
    """Print a line a row as the answers come, or all as JSON; raises DownloadError if any file is changed or cannot be had."""
    from deeplabzoo.hub.integrity import check_by_download, check_remote
    from deeplabzoo.hub.registry import list_weights

    rows = list_weights(pattern)
    if not rows:
        raise UsageError(f"No released weights match '{pattern}'; leave the pattern out to check all.")
    counts: Counter[str] = Counter()
    answers = []
    for answer in check_by_download(rows) if download else check_remote(rows):
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


def _verify(args: argparse.Namespace) -> None:
    """Print a finding as it comes, golden logits before figures; raises WeightsError unless every one is as it was stated."""
    from deeplabzoo.hub.registry import list_weights

    if not (math.isfinite(args.tolerance) and args.tolerance >= 0):
        raise UsageError(f"--tolerance must be a number of points from 0, not {args.tolerance}.")
    rows = {row.full_name: row for name in args.names for row in _rows_named(name, list_weights(name))}

    from deeplabzoo.evaluation.reproduce import (  # after the names are known to be right: torch takes seconds
        data_folder,
        verify,
    )

    counts: Counter[str] = Counter()
    for row in rows.values():
        for finding in verify(row, data_folder(args.data), tolerance=args.tolerance, device=args.device):
            print(finding, flush=True)
            counts[finding.status] += 1
    summary = (
        f"of {counts.total()} statements on {len(rows)} released file{'s' if len(rows) > 1 else ''} {counts['ok']} hold, "
        f"{counts['differs']} differ{'s' if counts['differs'] == 1 else ''}, {counts['unverified']} cannot be verified here."
    )
    if counts["ok"] < counts.total():
        raise WeightsError(summary)
    print(summary)


def _rows_named(name: str, rows: list["WeightRow"]) -> list["WeightRow"]:
    if not rows:
        from deeplabzoo.hub.manifest import released

        known = [one for row in released() for one in (row.name, row.full_name)]
        raise UnknownNameError(f"No released weights are called '{name}'.{did_you_mean(name, known)}")
    return rows


def _record(reports: Sequence[Path]) -> None:
    from deeplabzoo.hub.manifest import weights_folder
    from deeplabzoo.log import logger
    from deeplabzoo.publish.manifest_row import add_report

    manifest = weights_folder() / "manifest.json"
    for report in reports:
        source_tree = manifest.resolve().parents[1]
        kept = report.resolve().relative_to(source_tree).as_posix() if report.resolve().is_relative_to(source_tree) else None
        text, line = add_report(manifest.read_text(encoding="utf-8"), _read_report(report), kept)
        _write(manifest, text)
        logger.info(line)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' cannot be read as a report: {error}.") from None
    if not isinstance(report, dict):
        raise UsageError(f"'{path}' is not a report: expected what `evaluate --json` writes.")
    return report


def _table(documents: Sequence[Path] | None) -> None:
    from deeplabzoo.hub.manifest import released
    from tools.docs.tables import fill_tables, markdown_table

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
