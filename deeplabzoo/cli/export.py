"""`python -m deeplabzoo.export MODEL --format onnx --out FILE`: a model as a verified file for another runtime."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli.formatting import print_field
from deeplabzoo.cli.parser import STDOUT, Parser, add_json_option, load_named_model, run, write_json
from deeplabzoo.errors import UsageError, did_you_mean
from deeplabzoo.files import ensure_folder

_FORMATS = ("onnx", "torch-export", "openvino", "executorch")
_OUTPUTS = ("logits", "argmax", "uint8")
_EPILOG = """\
The file takes `image`, float32 B x 3 x H x W normalised as its metadata `preprocessing` describes, and returns at the image's \
size `logits` (B x classes x H x W), `argmax` (class indices, int32) or `uint8` (class indices as bytes). docs/export.md runs \
one with onnxruntime and numpy only.

The outputs are verified against PyTorch on random images, and on the images of --check or --calibrate, before the file \
counts as written.

examples:
  python -m deeplabzoo.export deeplabv3plus_mobilenetv2_voc --format onnx --out voc.onnx
  python -m deeplabzoo.export deeplabv3plus_mobilenetv2_voc --format onnx --int8 --calibrate photos/ --out voc_int8.onnx
  python -m deeplabzoo.export mine.safetensors --format openvino --size 513 513 --check voc:50 --root ~/data --out mine.xml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(export_command, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    parser = Parser("export", "Export a model for another runtime, and verify its outputs against PyTorch.", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help="model name (`python -m deeplabzoo.list`) or checkpoint file")
    parser.add_argument("--weights", metavar="TAG|FILE", help="checkpoint of the named model (default: its default tag)")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=", ".join(_FORMATS))
    parser.add_argument("--out", required=True, metavar="FILE", help="ends in .onnx, .pt2, .xml or .pte; its folder must exist")
    parser.add_argument("--output", choices=_OUTPUTS, default="logits", help="model output")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--dynamic", action="store_true", help="any batch, height and width (the default)")
    sizes.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="one fixed image size (executorch: always)")
    parser.add_argument("--dynamic-batch", action="store_true", help="with --size: keep the batch size dynamic")
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set, 11 to 21 (default 18)")
    parser.add_argument("--int8", action="store_true", help="convolutions in int8, calibrated on the images of --calibrate")
    parser.add_argument(
        "--calibrate", metavar="DIR", help="images for --int8 (folder, pattern or .txt list); not those of --check"
    )
    parser.add_argument(
        "--check", metavar="DATA:N", help="evaluate file and model on the first N images of a dataset, e.g. voc:50"
    )
    parser.add_argument("--root", metavar="DIR", help="folder of the dataset of --check")
    parser.add_argument("--split", default="val", help="split of the dataset of --check")
    add_json_option(parser, "what was exported and measured")
    return parser


def export_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, write and verify the file, print what was verified; raises DeepLabZooError on failure."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    if args.format not in _FORMATS:
        _refuse_format(args.format)
    if args.int8 != (args.calibrate is not None):
        raise UsageError("--int8 and --calibrate DIR go together: int8 is calibrated on images of the kind that will be seen.")
    if args.check is not None and args.root is None:
        raise UsageError("--check needs --root, the folder of the dataset.")
    checked = _parse_check(args.check) if args.check else None
    if args.json not in (None, STDOUT):
        ensure_folder(Path(args.json).parent)

    from deeplabzoo.export.formats import ExportConfig  # after the arguments have been checked: torch takes seconds to import
    from deeplabzoo.optimization.onnx_export import OPSET

    size = tuple(args.size) if args.size else None
    config = ExportConfig(
        format=args.format,
        out=Path(args.out),
        output=args.output,
        size=size,
        opset=args.opset or OPSET,
        dynamic_batch=args.dynamic_batch,
        calibrate=args.calibrate,
    )
    config.check()
    net = load_named_model(args.model, args.weights)

    from deeplabzoo.data.dataset import build_dataset
    from deeplabzoo.export.exporter import export

    def show(name: str, text: str) -> None:
        print_field(name, text, file=sys.stderr if args.json == STDOUT else sys.stdout)

    data = build_dataset(checked[0], args.root, args.split, classes=net.classes) if checked else None
    exported = export(net, config, check=data, count=checked[1] if checked else 0, log_step=show)
    if exported.check is not None:
        show("check", str(exported.check))
    show("written", f"{config.out}, {exported.bytes / 1e6:.1f} MB")
    if args.json is not None:
        report = dataclasses.replace(exported, command=shlex.join(["python", "-m", "deeplabzoo.export", *arguments]))
        write_json(args.json, report.to_json())
    return 0


def _refuse_format(name: str) -> None:
    from deeplabzoo.export.formats import UNSUPPORTED_FORMATS

    if name in UNSUPPORTED_FORMATS:
        raise UsageError(
            f"The format '{name}' is not supported: {UNSUPPORTED_FORMATS[name]}; --format onnx is read by most runtimes."
        )
    raise UsageError(f"Unknown format '{name}'; expected one of {', '.join(_FORMATS)}.{did_you_mean(name, _FORMATS)}")


def _parse_check(check: str) -> tuple[str, int]:
    name, colon, number = check.partition(":")
    if not colon or not number.isdigit() or int(number) < 1:
        raise UsageError(f"--check '{check}' must be a dataset and a number of images, such as voc:50.")
    return name, int(number)
