"""`python -m deeplabzoo.weights ACTION`: list, check, verify and record released checkpoints.

Metrics are stored in the manifest only: `record` copies them from an evaluation report into the row of the evaluated file, and
`verify` re-measures them.
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

_EPILOG = """\
examples:
  python -m deeplabzoo.weights list "*_voc*"
  python -m deeplabzoo.weights check
  python -m deeplabzoo.weights check "deeplabv3_resnet*" --download
  python -m deeplabzoo.weights verify deeplabv3plus_mobilenetv2_voc --root ~/data
  python -m deeplabzoo.evaluate deeplabv3_mobilenetv2_voc --data voc --root DIR --json report.json
  python -m deeplabzoo.weights record report.json
"""
_EXAMPLES = {
    "list": 'examples:\n  python -m deeplabzoo.weights list "*_voc*" --json',
    "check": 'examples:\n  python -m deeplabzoo.weights check "deeplabv3_resnet*" --download',
    "verify": "examples:\n  python -m deeplabzoo.weights verify deeplabv3plus_mobilenetv2_voc --root ~/data",
    "record": "examples:\n  python -m deeplabzoo.weights record report.json",
}


class _ActionParser(Parser):
    """The parser of one action; argparse passes its full program name and further arguments, which Parser sets itself."""

    def __init__(self, prog: str, description: str, **_: Any) -> None:
        super().__init__(prog.removeprefix("python -m deeplabzoo."), description, _EXAMPLES[prog.rpartition(" ")[2]])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(weights_command, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    parser = Parser("weights", "List, check, verify and record released checkpoints.", _EPILOG)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="list|check|verify|record", parser_class=_ActionParser
    )
    listing = actions.add_parser("list", description="One line per released file.")
    _add_pattern(listing)
    listing.add_argument("--json", action="store_true", help="print the manifest's rows as a JSON list")
    check = actions.add_parser("check", description="Check that every released file is available and unchanged.")
    _add_pattern(check)
    check.add_argument(
        "--download", action="store_true", help="download each file into the cache, verify it and build its model"
    )
    check.add_argument("--json", action="store_true", help="print the results as a JSON list")
    verify = actions.add_parser("verify", description="Re-measure the metrics of rows; exit code 0 if all are reproduced.")
    verify.add_argument("names", nargs="+", metavar="NAME", help="NAME, NAME.TAG, or a shell pattern of either")
    verify.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that is or directly contains the datasets (default: DEEPLABZOO_DATA)"
    )
    verify.accept_old_spelling("--data", "--root")
    verify.add_argument(
        "--tolerance", type=float, default=0.1, metavar="POINTS", help="largest difference in percentage points"
    )
    add_device_option(verify)
    record = actions.add_parser("record", description="Copy the metrics of reports into the rows of the evaluated files.")
    record.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json", help="written by evaluate --json")
    return parser


def _add_pattern(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help='shell pattern, e.g. "*_voc*"')


def weights_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the action; raises DeepLabZooError on failure."""
    args = build_parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    if args.action == "list":
        _list(args.pattern, as_json=args.json)
    elif args.action == "check":
        _check(args.pattern, download=args.download, as_json=args.json)
    elif args.action == "verify":
        _verify(args)
    else:
        _record(args.reports)
    return 0


def _list(pattern: str, *, as_json: bool) -> None:
    from deeplabzoo.hub.model_info import rows_to_dicts
    from deeplabzoo.hub.registry import list_weights

    rows = list_weights(pattern)
    if as_json:
        print(json.dumps(rows_to_dicts(rows), indent=2, ensure_ascii=False))
        return
    if not rows:
        raise UsageError(f"No released weights match '{pattern}'; omit the pattern to list all.")
    for row in rows:
        print(row)


def _check(pattern: str, *, download: bool, as_json: bool) -> None:
    """Print one line per row, or all as JSON; raises DownloadError for a changed or unavailable file."""
    from deeplabzoo.hub.integrity import check_by_download, check_remote
    from deeplabzoo.hub.registry import list_weights

    rows = list_weights(pattern)
    if not rows:
        raise UsageError(f"No released weights match '{pattern}'; omit the pattern to check all.")
    counts: Counter[str] = Counter()
    results = []
    for check in check_by_download(rows) if download else check_remote(rows):
        if not as_json:
            print(check, flush=True)
        results.append({"weights": check.row.full_name, "status": check.status, "detail": check.detail})
        counts[check.status] += 1
    if as_json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    totals = ", ".join(f"{counts[status]} {status}" for status in ("ok", "changed", "unreachable"))
    summary = f"{len(rows)} released files checked: {totals}."
    if counts["ok"] < len(rows):
        raise DownloadError(summary)
    if not as_json:
        print(summary)


def _verify(args: argparse.Namespace) -> None:
    """Print one line per check, golden logits before metrics; raises WeightsError unless all are reproduced."""
    from deeplabzoo.hub.registry import list_weights

    if not (math.isfinite(args.tolerance) and args.tolerance >= 0):
        raise UsageError(f"--tolerance must be a number of points >= 0, not {args.tolerance}.")
    rows = {row.full_name: row for name in args.names for row in _rows_named(name, list_weights(name))}

    # after the names have been checked: torch takes seconds to import
    from deeplabzoo.evaluation.reproduce import data_folder, verify

    counts: Counter[str] = Counter()
    for row in rows.values():
        for finding in verify(row, data_folder(args.root), tolerance=args.tolerance, device=args.device):
            print(finding, flush=True)
            counts[finding.status] += 1
    summary = (
        f"{counts.total()} checks of {len(rows)} released file{'s' if len(rows) > 1 else ''}: {counts['ok']} reproduced, "
        f"{counts['differs']} different, {counts['unverified']} not verifiable here."
    )
    if counts["ok"] < counts.total():
        raise WeightsError(summary)
    print(summary)


def _rows_named(name: str, rows: list["WeightRow"]) -> list["WeightRow"]:
    if not rows:
        from deeplabzoo.hub.manifest import released

        known = [one for row in released() for one in (row.name, row.full_name)]
        raise UnknownNameError(f"No released checkpoint is named '{name}'.{did_you_mean(name, known)}")
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
        write_atomically(manifest, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
        logger.info(line)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' cannot be read as a report: {error}.") from None
    if not isinstance(report, dict):
        raise UsageError(f"'{path}' is not a report: expected what `evaluate --json` writes.")
    return report
