"""`python -m deeplabzoo.list [PATTERN]`: models with their parameters, GFLOPs and mIoU in one table."""

import json
import sys
from collections.abc import Sequence

from deeplabzoo.cli.formatting import columns
from deeplabzoo.cli.parser import OUTPUT_STRIDES, Parser, run
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.hub.model_info import SORTS, ModelListing, list_entries, metric_conditions, require_matches

_HEADER = ("name", "M params", "GFLOPs", "stride", "MB", "mIoU %", "licence", "evaluation protocol")
_EPILOG = """\
GFLOPs are counted for an image of 513 x 513 at the output stride in the same line, a multiply-add as two; models without \
weights have 21 classes. mIoU is that of the checkpoint which a name alone loads, at a single scale where known; \
--checkpoints lists the others. Compare it only with one of the same evaluation protocol. An empty cell is unknown. \
On a terminal the last columns are cut to its width; a pipe gets whole lines.

examples:
  python -m deeplabzoo.list "deeplabv3plus_*" --output-stride 8 --sort flops
  python -m deeplabzoo.list --data voc --sort miou
  python -m deeplabzoo.list "*mobilenet*" --checkpoints --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(list_command, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    parser = Parser("list", "List models, or released checkpoints, with parameters, GFLOPs and mIoU.", _EPILOG)
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help='shell pattern, e.g. "deeplabv3plus_*"')
    parser.add_argument(
        "--output-stride", type=int, choices=OUTPUT_STRIDES, help="only models that run at it, and metrics measured at it"
    )
    parser.add_argument("--data", metavar="NAME", choices=tuple(CLASS_LISTS), help="only models trained on it: voc, ade20k …")
    parser.add_argument("--sort", choices=SORTS, default="name", help="mIoU descending, everything else ascending")
    parser.add_argument("--checkpoints", action="store_true", help="one line per released checkpoint instead of per model")
    parser.accept_old_spelling("--weights", "--checkpoints")
    parser.add_argument("--json", action="store_true", help="print a JSON list; empty without a match")
    parser.add_argument("--names", action="store_true", help="print names only, one per line; none without a match")
    return parser


def list_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print what matches; raises UsageError without a match."""
    args = build_parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    entries = list_entries(
        args.pattern, output_stride=args.output_stride, data=args.data, weights=args.checkpoints, sort=args.sort
    )
    if args.names:
        print("\n".join(entry.name for entry in entries))
    elif args.json:
        print(json.dumps([entry.to_dict() for entry in entries], indent=2, ensure_ascii=False))
    else:
        require_matches(entries, args.pattern)
        right = ("M params", "GFLOPs", "stride", "MB", "mIoU %")
        print(columns(_HEADER, [_cells(entry) for entry in entries], right=right, shrinkable=("licence", _HEADER[-1])))
    return 0


def _cells(entry: ModelListing) -> list[str]:
    return [
        entry.name,
        _number(entry.params, 1e6, 2),
        _number(entry.flops, 1e9, 1),
        str(entry.output_stride or ""),
        _number(entry.bytes, 1e6, 1),
        f"{entry.metric.value:.2f}" if entry.metric else "",
        entry.row.license.weights if entry.row else "",
        _protocol(entry),
    ]


def _protocol(entry: ModelListing) -> str:
    if entry.metric is not None:
        return metric_conditions(entry.metric)
    if entry.row is None:
        return "no weights released"
    elsewhere = any(metric.name == "mIoU" for metric in entry.row.metrics)
    return f"not measured at stride {entry.output_stride}" if elsewhere else "not measured"


def _number(value: int | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"
