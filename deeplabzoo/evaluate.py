"""`python -m deeplabzoo.evaluate MODEL --data NAME --root DIR`: measure a model on labelled pictures.

The module itself can be called, like the function `deeplabzoo.evaluate`: importing a submodule puts it into the package under
its name, where the function would otherwise be lost.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deeplabzoo.cli import Parser, add_device_option, named_network, run
from deeplabzoo.data.base import DATA_NAMES, open_data
from deeplabzoo.errors import OutputError
from deeplabzoo.output import ensure_folder, write_atomically
from deeplabzoo.say import say

if TYPE_CHECKING:
    from deeplabzoo.inference.report import Report

_EPILOG = """\
The score is mIoU in percent: one int64 confusion matrix over all pictures at the labels' own resolution, mean over the
classes whose union is not empty (docs/metrics.md).

example:
  python -m deeplabzoo.evaluate deeplabv3_mobilenetv2_voc --data voc --root ~/data --split val --json report.json
  python -m deeplabzoo.evaluate mine.safetensors --data folder --root my_data --plots plots --palette safe
"""


class _CallableModule(ModuleType):
    """Passes a call of the module on to the function that does the work."""

    def __call__(self, *args: Any, **kwargs: Any) -> "Report":
        from deeplabzoo.inference.evaluation import evaluate

        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule


def evaluate_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, print the table, write the JSON report; raises DeepLabZooError where it cannot."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    if args.json is not None:
        _require_writable(args.json)
    if args.plots is not None:
        _require_plots(args.plots)
    net = named_network(args.model, args.weights)

    from deeplabzoo.inference.evaluation import evaluate  # after the names are known to be right: torch takes seconds
    from deeplabzoo.inference.plots import SHOWN, draw_plots
    from deeplabzoo.inference.worst import WorstPictures

    data = open_data(args.data, args.root, args.split, classes=net.classes)
    worst = WorstPictures(SHOWN, len(data.classes), data.ignore_index) if args.plots is not None else None
    report = evaluate(
        net,
        data,
        scales=args.scales,
        flip=args.flip,
        output_stride=args.output_stride,
        limit=args.limit,
        device=args.device,
        model=args.model,
        engine=args.engine,
        precision=args.precision,
        seen=worst.see if worst else None,
    )
    report = dataclasses.replace(report, command=shlex.join(["python", "-m", "deeplabzoo.evaluate", *words]))
    print(report.table())
    if args.json is not None:
        write_atomically(args.json, lambda file: file.write(report.to_json().encode()))
    if worst is not None:
        for path in draw_plots(report, worst.ranked(), args.plots, data_palette=data.palette, palette=args.palette):
            say(f"written: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 the work failed, 2 the call was wrong."""
    return run(evaluate_command, argv)


def _parser() -> Parser:
    parser = Parser("evaluate", "Measure a model on labelled pictures: mIoU, per-class IoU, pixel accuracy, Dice.", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help="a name (`deeplabzoo.list_models()`) or a checkpoint file")
    parser.add_argument("--weights", metavar="TAG|FILE", help="which weights of the named model (default: its default tag)")
    parser.add_argument("--data", required=True, metavar="NAME", help=", ".join(DATA_NAMES))
    parser.add_argument("--root", required=True, metavar="DIR", help="where the data set lies")
    parser.add_argument("--split", default="val", help="val (default), train, test ...; `all` for a folder without splits")
    parser.add_argument(
        "--scales", nargs="+", type=float, default=[1.0], metavar="S", help="average over these scales (default 1)"
    )
    parser.add_argument("--flip", action="store_true", help="average over the mirrored picture, too")
    parser.add_argument(
        "--output-stride", type=int, choices=(8, 16, 32), help="evaluate at this stride instead of the model's own"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures; the report says so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="draw the confusion matrix, IoU by class and the worst pictures there"
    )
    parser.add_argument(
        "--palette",
        choices=("data", "safe"),
        default="data",
        help="colours of the worst pictures: data, the data set's own (default); safe, for any colour vision",
    )
    add_device_option(parser)
    parser.add_argument("--engine", default="torch", help="torch (default), compiled, onnxruntime, openvino or auto (measures)")
    parser.add_argument("--precision", default="fp32", help="fp32 (default), bf16, fp16 or int8, where engine and hardware can")
    return parser


def _require_writable(path: Path) -> None:
    """Find out before the work, not after it, that its result could not be kept."""
    if path.is_dir():
        raise OutputError(f"The report cannot be written to '{path}': it is a folder; give a file name.")
    ensure_folder(path.parent)


def _require_plots(folder: Path) -> None:
    from deeplabzoo.inference.plots import require_matplotlib

    require_matplotlib()
    if folder.is_file():
        raise OutputError(f"The plots cannot be written to '{folder}': it is a file; name a folder.")
    ensure_folder(folder)


if __name__ == "__main__":
    sys.exit(main())
