"""The words of the comparison's command line."""

from pathlib import Path

from deeplabzoo.benchmarking.scaling import MEGAPIXELS
from deeplabzoo.benchmarking.sides import PEERS, TASKS
from deeplabzoo.cli import Parser, add_device_option

_EPILOG = """\
MODEL is a name of the zoo, a checkpoint, or a network of SMP with its defaults: smp:deeplabv3plus_resnet50.

  python -m deeplabzoo.benchmark deeplabv3_mobilenetv3_voc --peers torchvision,onnxruntime --size 513 513 --json auto
  python -m deeplabzoo.benchmark --train --threads 2          a training step (its own options: --train --help)
  python -m deeplabzoo.benchmark --scaling --threads 1 --chart scaling.png
  python -m deeplabzoo.benchmark table --write docs/speed.md  the recorded runs as tables
"""


def comparison_parser() -> Parser:
    """Return the parser of everything but `--train` and `table`."""
    parser = Parser("benchmark", "Speed and memory of models, against other libraries with the same weights.", _EPILOG)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="what to run")
    parser.add_argument("--peers", default="", metavar="A,B", help=f"of {', '.join(PEERS)} (default: nobody)")
    parser.add_argument(
        "--engine",
        nargs="+",
        default=["torch"],
        help="ours: plain, torch, compiled, onnxruntime, openvino, or ENGINE:PRECISION",
    )
    parser.add_argument(
        "--precision", nargs="+", default=["fp32"], help="of each engine: fp32, bf16, fp16, int8 (default fp32)"
    )
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="photos that int8 is fitted to")
    parser.add_argument("--peer-precision", default="fp32", help="fp32, or autocast to bf16 or fp16 (default fp32)")
    parser.add_argument(
        "--size", nargs="+", type=int, default=[513, 513], metavar="PIXELS", help="height width, in pairs (default 513 513)"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="pictures a call (default 1)")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="default: both")
    add_device_option(parser)
    parser.add_argument("--threads", type=int, metavar="N", default=2, help="of every side on a CPU (default 2)")
    parser.add_argument(
        "--pairs", type=int, metavar="N", default=7, help="turns of each side; 0 with --memory: no times (default 7)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of pictures, and of weights where none are at hand (default 0)"
    )
    parser.add_argument("--memory", action="store_true", help="also peak memory, each side in a process of its own")
    parser.add_argument(
        "--labels", nargs="+", type=Path, metavar="PHOTO", help="upsampling and arg-max alone, MODELs' own logits"
    )
    parser.add_argument("--confusion", nargs="+", type=Path, metavar="MASK", help="counting label maps alone (label PNGs)")
    parser.add_argument(
        "--data", metavar="DIR", help="pictures for training, against torchvision's transforms: VOC's folder, or `made`"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="time and memory against a picture's area, from file to file in tiles"
    )
    parser.add_argument(
        "--megapixels", nargs="+", type=float, default=list(MEGAPIXELS), metavar="N", help="areas of --scaling (default to 100)"
    )
    parser.add_argument(
        "--seams", nargs="+", type=Path, metavar="PHOTO", help="labels in tiles against labels of the whole photo, MODELs' own"
    )
    parser.add_argument(
        "--mosaics", nargs=2, metavar=("DATA", "ROOT"), help="the same, and mIoU, on mosaics of a labelled data set's frames"
    )
    parser.add_argument("--note", default="", metavar="TEXT", help="words that the rows of --scaling and --seams carry")
    parser.add_argument("--json", metavar="FILE", help="write the record; auto: benchmarks/<date>_<hardware>_….json")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write the ratios as a PNG")
    return parser
