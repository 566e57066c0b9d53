"""`python -m deeplabzoo.export MODEL --format onnx --out FILE`: a network as a file for another runtime, proven."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.errors import UsageError, did_you_mean
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.hub.factory import load_named_model

_FORMATS = ("onnx", "torch-export", "openvino", "executorch")
_OUTPUTS = ("logits", "argmax", "uint8")
_EPILOG = """\
The file takes `image`, float32 B x 3 x H x W as its metadata `preprocessing` says, and answers at the image's size: `logits`
(B x classes x H x W), `argmax` (class numbers, int32) or `uint8` (class numbers in a byte). docs/export.md runs one with
onnxruntime and numpy alone.

Before it counts as written it has given the network's answers on random images, and on photos of --check or --calibrate.

examples:
  python -m deeplabzoo.export deeplabv3plus_mobilenetv2_voc --format onnx --out voc.onnx
  python -m deeplabzoo.export deeplabv3plus_mobilenetv2_voc --format onnx --int8 --calibrate photos/ --out voc_int8.onnx
  python -m deeplabzoo.export mine.safetensors --format openvino --size 513 513 --check voc:50 --root ~/data --out mine.xml
"""


def export_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, write the file, prove it and say what was proven; raises DeepLabZooError where it cannot."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    _require_supported_format(args.format)
    if args.int8 != (args.calibrate is not None):
        raise UsageError(
            "--int8 and --calibrate DIR go together: eight bits are fitted to photos of the kind that will be seen."
        )
    if args.check is not None and args.root is None:
        raise UsageError("--check needs --root, the folder that holds the data set.")
    if args.json is not None:
        ensure_folder(args.json.parent)

    from deeplabzoo.data.dataset import build_dataset
    from deeplabzoo.export.exporter import export  # after the options are known to go together: torch takes seconds
    from deeplabzoo.export.formats import ExportConfig

    size = tuple(args.size) if args.size else None
    config = ExportConfig(format=args.format, out=Path(args.out), output=args.output, size=size, calibrate=args.calibrate)
    config.check()
    checked = _parse_check(args.check) if args.check else None
    net = load_named_model(args.model, args.weights)
    data = build_dataset(checked[0], args.root, args.split, classes=net.classes) if checked else None
    made = export(net, config, check=data, count=checked[1] if checked else 0, log_step=_line)
    if made.check is not None:
        _line("check", str(made.check))
    _line("written", f"{config.out}, {made.bytes / 1e6:.1f} MB")
    if args.json is not None:
        report = dataclasses.replace(made, command=shlex.join(["python", "-m", "deeplabzoo.export", *words]))
        write_atomically(args.json, lambda file: file.write(report.to_json().encode()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 the work failed, 2 the call was wrong."""
    return run(export_command, argv)


def _parser() -> Parser:
    parser = Parser("export", "Write a model for another runtime, and prove that it gives the same answers.", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help="a name (`deeplabzoo.list_models()`) or a checkpoint file")
    parser.add_argument("--weights", metavar="TAG|FILE", help="which weights of the named model (default: its default tag)")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=", ".join(_FORMATS))
    parser.add_argument("--out", required=True, metavar="FILE", help="ends in .onnx, .pt2, .xml or .pte; its folder must exist")
    parser.add_argument("--output", choices=_OUTPUTS, default="logits", help="what the file answers (default logits)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--dynamic", action="store_true", help="any batch, height and width (the default)")
    sizes.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="one image of this size alone (executorch: always)"
    )
    parser.add_argument("--int8", action="store_true", help="convolutions in 8 bits, fitted to the photos of --calibrate")
    parser.add_argument(
        "--calibrate", metavar="DIR", help="photos for --int8 (folder, pattern or .txt list); not those of --check"
    )
    parser.add_argument("--check", metavar="DATA:N", help="measure file and model on the first N pictures, e.g. voc:50")
    parser.add_argument("--root", metavar="DIR", help="where the data set of --check lies")
    parser.add_argument("--split", default="val", help="of the data set of --check (default val)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was made and measured there, too")
    return parser


def _require_supported_format(name: str) -> None:
    from deeplabzoo.export.formats import UNSUPPORTED_FORMATS

    if name in UNSUPPORTED_FORMATS:
        raise UsageError(
            f"The format '{name}' is not offered: {UNSUPPORTED_FORMATS[name]}; --format onnx is read by most runtimes."
        )
    if name not in _FORMATS:
        raise UsageError(f"Unknown format '{name}'; expected one of {', '.join(_FORMATS)}.{did_you_mean(name, _FORMATS)}")


def _parse_check(check: str) -> tuple[str, int]:
    name, colon, number = check.partition(":")
    if not colon or not number.isdigit() or int(number) < 1:
        raise UsageError(f"--check '{check}' must be a data set and a number of pictures, such as voc:50.")
    return name, int(number)


def _line(what: str, text: str) -> None:
    print(f"{what:<9} {text}")
