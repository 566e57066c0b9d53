"""`python -m deeplabzoo.evaluate MODEL --data NAME --root DIR`: metrics of a model on a labelled dataset."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli.parser import (
    OUTPUT_STRIDES,
    STDOUT,
    Parser,
    add_backend_option,
    add_device_option,
    add_json_option,
    add_precision_option,
    load_named_model,
    run,
    write_json,
)
from deeplabzoo.cli.predict import TILE
from deeplabzoo.errors import OutputError, printable
from deeplabzoo.files import ensure_folder
from deeplabzoo.log import logger

_EPILOG = """\
The score is mIoU in percent: one int64 confusion matrix over all images at the labels' own resolution, mean over the classes \
whose union is not empty (docs/metrics.md).

examples:
  python -m deeplabzoo.evaluate deeplabv3_mobilenetv3_voc --data voc --root ~/data --split val --json report.json
  python -m deeplabzoo.evaluate mine.safetensors --data folder --root my_data --plots plots --palette safe
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(evaluate_command, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    from deeplabzoo.data.dataset import DATASET_NAMES

    parser = Parser("evaluate", "Measure a model on a labelled dataset: mIoU, per-class IoU, pixel accuracy and Dice.", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help="model name (`python -m deeplabzoo.list`) or checkpoint file")
    parser.add_argument("--weights", metavar="TAG|FILE", help="checkpoint of the named model (default: its default tag)")
    parser.add_argument("--data", required=True, metavar="NAME", help=f"dataset: {', '.join(DATASET_NAMES)}")
    parser.add_argument("--root", required=True, metavar="DIR", help="folder of the dataset")
    parser.add_argument("--split", default="val", help="val, train, test …; `all` for a folder without splits")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0], metavar="S", help="average logits over these scales")
    parser.add_argument("--flip", action="store_true", help="average over the mirrored image, too")
    parser.add_argument(
        "--output-stride", type=int, choices=OUTPUT_STRIDES, help="evaluate at this stride instead of the model's own"
    )
    parser.add_argument(
        "--tile",
        type=int,
        nargs="?",
        const=TILE,
        metavar="SIDE",
        help=f"cut images into overlapping tiles at their own resolution (SIDE in pixels, default {TILE}), as predict "
        "--tile does; without it only images are cut that predict cuts by default",
    )
    parser.add_argument(
        "--overlap", type=int, metavar="N", help="with --tile: pixels that neighbours share (a quarter of SIDE)"
    )
    parser.add_argument("--scale", type=float, metavar="S", help="with --tile: resize images by this factor first (default 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images; recorded in the report")
    add_json_option(parser, "the whole report")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw confusion matrix, IoU by class and the worst images")
    parser.add_argument(
        "--palette",
        choices=("data", "safe"),
        default="data",
        help="colours of the worst images: data, those of the dataset; safe, for any colour vision",
    )
    add_device_option(parser)
    add_backend_option(parser, "torch")
    add_precision_option(parser)
    return parser


def evaluate_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, print the table, write the JSON report; raises DeepLabZooError on failure."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    if args.json not in (None, STDOUT):
        _require_writable(Path(args.json))
    if args.plots is not None:
        _require_plots(args.plots)
    net = load_named_model(args.model, args.weights)

    from deeplabzoo.data.dataset import build_dataset
    from deeplabzoo.evaluation.evaluate import evaluate
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
        engine=args.backend,
        precision=args.precision,
        seen=worst.add if worst else None,
        tile="auto" if args.tile is None else args.tile,
        overlap=args.overlap,
        scale=args.scale,
    )
    report = dataclasses.replace(report, command=shlex.join(["python", "-m", "deeplabzoo.evaluate", *arguments]))
    # class names come from files: control characters in them must not reach the terminal
    table = "\n".join(map(printable, report.table().split("\n")))
    print(table, file=sys.stderr if args.json == STDOUT else sys.stdout)
    if args.json is not None:
        write_json(args.json, report.to_json())
    if worst is not None:
        for path in draw_plots(report, worst.ranked(), args.plots, data_palette=data.palette, palette=args.palette):
            logger.info(f"wrote {path}")
    return 0


def _require_writable(path: Path) -> None:
    """Raise OutputError before the evaluation, not after it, if the report cannot be written."""
    if path.is_dir():
        raise OutputError(f"The report cannot be written to '{path}': it is a folder; give a file name.")
    ensure_folder(path.parent)


def _require_plots(folder: Path) -> None:
    from deeplabzoo.evaluation.plots import require_matplotlib

    require_matplotlib()
    if folder.is_file():
        raise OutputError(f"The plots cannot be written to '{folder}': it is a file; name a folder.")
    ensure_folder(folder)
