"""`python -m deeplabzoo.list [PATTERN]`: which models there are, and what each costs and scores, in one table."""

import json
import sys
from collections.abc import Sequence

from deeplabzoo.cli.formatting import columns
from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.hub.model_info import SORTS, ModelListing, list_entries, metric_conditions, require_matches

_HEADER = ("name", "M params", "GFLOPs", "stride", "MB", "mIoU %", "licence", "how found")
_EPILOG = """\
GFLOPs are counted for a photo of 513 x 513 at the stride beside them, two for each multiplication with its addition; models
without weights have 21 classes. mIoU is the best figure of the model's files, and compares only with one that was found the
same way. An empty cell is not known. On a terminal the last columns are cut to its width; a pipe gets them whole.

examples:
  deeplabzoo list "deeplabv3plus_*" --output-stride 8 --sort flops
  deeplabzoo list --data voc --sort miou
  deeplabzoo list "*mobilenet*" --weights --json
"""


def list_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print what matches; raises UsageError where nothing does."""
    args = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    lines = list_entries(args.pattern, output_stride=args.output_stride, data=args.data, weights=args.weights, sort=args.sort)
    if args.names:
        print("\n".join(line.name for line in lines))
    elif args.json:
        print(json.dumps([line.to_dict() for line in lines], indent=2, ensure_ascii=False))
    else:
        require_matches(lines, args.pattern)
        right = ("M params", "GFLOPs", "stride", "MB", "mIoU %")
        print(columns(_HEADER, [_cells(line) for line in lines], right=right, shrinkable=("licence", "how found")))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 the call was wrong or nothing matches."""
    return run(list_command, argv)


def _parser() -> Parser:
    parser = Parser("list", "List models, or released weights, with what one chooses by.", _EPILOG)
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help='shell pattern, e.g. "deeplabv3plus_*"')
    parser.add_argument(
        "--output-stride", type=int, choices=(8, 16, 32), help="only models that run at it, and figures found at it"
    )
    parser.add_argument("--data", metavar="NAME", choices=tuple(CLASS_LISTS), help="only models trained on it: voc, ade20k ...")
    parser.add_argument("--sort", choices=SORTS, default="name", help="best mIoU first, least of anything else (default name)")
    parser.add_argument("--weights", action="store_true", help="a line for each released file instead of each model")
    parser.add_argument("--json", action="store_true", help="a JSON list; empty where nothing matches")
    parser.add_argument("--names", action="store_true", help="names alone, a line each; none where nothing matches")
    return parser


def _cells(line: ModelListing) -> list[str]:
    return [
        line.name,
        _number(line.params, 1e6, 2),
        _number(line.flops, 1e9, 1),
        str(line.output_stride or ""),
        _number(line.bytes, 1e6, 1),
        f"{line.metric.value:.2f}" if line.metric else "",
        line.row.license.weights if line.row else "",
        _metric_source(line),
    ]


def _metric_source(line: ModelListing) -> str:
    if line.metric is not None:
        return metric_conditions(line.metric)
    if line.row is None:
        return "no weights released"
    elsewhere = any(metric.name == "mIoU" for metric in line.row.metrics)
    return f"no figure at stride {line.output_stride}" if elsewhere else "no figure"


def _number(value: int | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"
