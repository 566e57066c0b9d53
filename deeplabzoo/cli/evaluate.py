"""`python -m deeplabzoo.evaluate MODEL --data NAME --root DIR`: measure a model on a labelled dataset."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli.parser import Parser, add_device_option, run
from deeplabzoo.data.dataset import DATASET_NAMES, build_dataset
from deeplabzoo.errors import OutputError
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.hub.factory import load_named_model
from deeplabzoo.log import logger

_EPILOG = """\
The score is mIoU in percent: one int64 confusion matrix over all pictures at the labels' own resolution, mean over the
classes whose union is not empty (docs/metrics.md).

example:
  python -m deeplabzoo.evaluate deeplabv3_mobilenetv2_voc --data voc --root ~/data --split val --json report.json
  python -m deeplabzoo.evaluate mine.safetensors --data folder --root my_data --plots plots --palette safe
"""


def evaluate_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, print the table, write the JSON report; raises DeepLabZooError where it cannot."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    if args.json is not None:
        _require_writable(args.json)
    if args.plots is not None:
        _require_plots(args.plots)
    net = load_named_model(args.model, args.weights)

    from deeplabzoo.evaluation.evaluate import evaluate  # after the names are known to be right: torch takes seconds
    from deeplabzoo.evaluation.plots import NUM_WORST_IMAGES, WorstImages, draw_plots

    data = build_dataset(args.data, args.root, args.split, classes=net.classes)
    worst = WorstImages(NUM_WORST_IMAGES, len(data.classes), data.ignore_index) if args.plots is not None else None
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
        seen=worst.add if worst else None,
    )
    report = dataclasses.replace(report, command=shlex.join(["python", "-m", "deeplabzoo.evaluate", *words]))
    print(report.table())
    if args.json is not None:
        write_atomically(args.json, lambda file: file.write(report.to_json().encode()))
    if worst is not None:
        for path in draw_plots(report, worst.ranked(), args.plots, data_palette=data.palette, palette=args.palette):
            logger.info(f"written: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 the work failed, 2 the call was wrong."""
    return run(evaluate_command, argv)


def _parser() -> Parser:
    parser = Parser("evaluate", "Measure a model on labelled pictures: mIoU, per-class IoU, pixel accuracy, Dice.", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help="a name (`deeplabzoo.list_models()`) or a checkpoint file")
    parser.add_argument("--weights", metavar="TAG|FILE", help="which weights of the named model (default: its default tag)")
    parser.add_argument("--data", required=True, metavar="NAME", help=", ".join(DATASET_NAMES))
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
    from deeplabzoo.evaluation.plots import require_matplotlib

    require_matplotlib()
    if folder.is_file():
        raise OutputError(f"The plots cannot be written to '{folder}': it is a file; name a folder.")
    ensure_folder(folder)
