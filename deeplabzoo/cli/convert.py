"""`python -m deeplabzoo.convert FILE --out model.safetensors`: convert a checkpoint to or from another library."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deeplabzoo.cli.formatting import print_field
from deeplabzoo.cli.parser import OUTPUT_STRIDES, Parser, run
from deeplabzoo.errors import ImageError, OutputError, UsageError
from deeplabzoo.files import ensure_folder

if TYPE_CHECKING:
    from deeplabzoo.checkpoints.types import Checkpoint
    from deeplabzoo.models.deeplab import DeepLab


_EPILOG = """\
FILE is a checkpoint that `deeplabzoo.load` reads (.pth, .pt, .bin, .safetensors, .tflite), a folder with \
model.safetensors and config.json, or hf-hub:owner/name[@revision].

--to writes what the library's own class loads: torchvision and smp a state dict (.pth or .safetensors), smp and transformers \
a folder with its settings, if PATH has no such suffix. A model that the library would compute differently is refused.

The written file is read back and must give the same tensors and the same logits.

examples:
  python -m deeplabzoo.convert deeplabv3_resnet101_coco-586e9e4e.pth --out resnet101.safetensors
  python -m deeplabzoo.convert last.ckpt --out mine.safetensors --precision fp16 --image street.jpg
  python -m deeplabzoo.convert mine.safetensors --to smp --out for_smp
  python -m deeplabzoo.convert mine.safetensors --to torchvision --output-stride 8 --out mine.pth
"""


def convert_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, read the checkpoint, describe it, write it and verify what was written."""
    args = build_parser().parse_args(argv)
    out = Path(args.out)
    if args.to and args.precision != "fp32":
        raise UsageError("--precision is for deeplabzoo checkpoints; omit it with --to.")
    _check_paths(args.file, out, args.image, args.to)
    file, net, changes = _read(args.file, args.name, args.output_stride)
    _describe(file, net, changes)
    back = _write_foreign(net, out, args.to) if args.to else _write_own(file, net, out, args.precision)
    if args.image:
        _predict(back, args.image, out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(convert_command, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    parser = Parser("convert", "Convert a third-party checkpoint to deeplabzoo, or one of deeplabzoo back.", _EPILOG)
    parser.add_argument("file", metavar="FILE", help="checkpoint, folder or hf-hub: address")
    parser.add_argument("--out", required=True, metavar="PATH", help="the file to write; its folder must exist")
    parser.add_argument("--name", metavar="NAME", help="model that it is, for bare state dicts")
    parser.add_argument(
        "--image", metavar="IMAGE", help="segment this image with the written file; the overlay is written beside it"
    )
    parser.add_argument(
        "--output-stride", type=int, choices=OUTPUT_STRIDES, help="convert the model to this output stride first"
    )
    parser.add_argument("--to", choices=("torchvision", "smp", "transformers"), help="library to write for instead")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the written file")
    return parser


def _check_paths(source: str, out: Path, image: str | None, to: str | None) -> None:
    """Raise before anything is read if the result cannot be written, or would overwrite an input."""
    if not out.parent.is_dir():
        raise OutputError(f"The folder '{out.parent}' of --out does not exist; create it, or name another.")
    if to is None and out.is_dir():
        raise OutputError(f"--out '{out}' is a folder; name a file in it, such as '{out / 'model.safetensors'}'.")
    if to is None and out.suffix != ".safetensors":
        raise UsageError(f"--out '{out}' must end in .safetensors.")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"--out '{out}' is a folder that is not empty; name an empty or new one.")
    read = Path(source)
    inputs = {
        path.resolve()
        for path in (read, read / "model.safetensors", read / "pytorch_model.bin", *([Path(image)] if image else []))
    }
    for result in (out, *([_overlay_path(out)] if image else [])):
        if result.resolve() in inputs:
            raise UsageError(f"The result '{result}' would overwrite an input; name another --out.")
    if image and not Path(image).is_file():
        raise ImageError(f"'{image}' does not exist; check the path.")
    ensure_folder(out.parent)


def _read(source: str, name: str | None, output_stride: int | None) -> tuple["Checkpoint", "DeepLab", tuple[str, ...]]:
    from deeplabzoo.checkpoints.build import ModelOverrides, build_from_checkpoint
    from deeplabzoo.hub.factory import open_checkpoint
    from deeplabzoo.models.names import parse_name

    parsed = parse_name(name) if name else None
    file = open_checkpoint(source)
    net, changes = build_from_checkpoint(file, parsed, ModelOverrides(output_stride=output_stride))
    net.weights_source = dict(file.source)
    return file, net, changes


def _describe(file: "Checkpoint", net: "DeepLab", changes: Sequence[str]) -> None:
    from deeplabzoo.models.encoder_table import short_name
    from deeplabzoo.models.heads import resolve_atrous_rates

    config = net.config
    parameters = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    rates = ", ".join(map(str, resolve_atrous_rates(config))) or "none"
    released = f", released as {file.label}" if file.source.get("name") else ""
    names = ", ".join(net.classes[:6]) + (", ..." if net.num_classes > 6 else "")
    print_field("origin", f"{file.format_name}, sha256 {file.source['sha256'][:12]}{released}")
    print_field("model", f"{config.architecture}_{short_name(config.encoder)}, {parameters:.2f} M parameters")
    print_field("geometry", f"output stride {config.output_stride}, atrous rates {rates}, {config.in_chans} input channels")
    print_field("classes", f"{net.num_classes}: {names}")
    print_field("notes", "; ".join((*file.remarks, *changes)) or "nothing dropped, nothing assumed")


def _write_own(file: "Checkpoint", net: "DeepLab", out: Path, precision: str) -> "DeepLab":
    import torch

    from deeplabzoo.checkpoints.conversion import write_verified_checkpoint
    from deeplabzoo.hub.http_download import sha256_of

    dtype = torch.float16 if precision == "fp16" else torch.float32
    back, parity = write_verified_checkpoint(net, out, extra={**file.source, "origin": file.format_name}, dtype=dtype)
    print_field("written", f"{out}, {out.stat().st_size / 1e6:.1f} MB, {precision}, sha256 {sha256_of(out)[:12]}")
    print_field("parity", str(parity))
    return back


def _write_foreign(net: "DeepLab", out: Path, to: str) -> "DeepLab":
    from deeplabzoo.checkpoints.conversion import LIBRARIES, is_folder_target, read_exported, write_exported

    exported = LIBRARIES[to](net)
    write_exported(exported, out, to)
    back, parity = read_exported(exported, net, out)
    print_field("dropped", "; ".join(exported.notes))
    print_field("written", str(out))
    print_field("parity", str(parity))
    print_field("load with", exported.folder.format(folder=repr(str(out))) if is_folder_target(out) else exported.build)
    return back


def _predict(net: "DeepLab", image: str, out: Path) -> None:
    from deeplabzoo.inference.predictor import Predictor
    from deeplabzoo.inference.visualization import percent

    result = Predictor(net, "cpu")(image)
    overlay = _overlay_path(out)
    result.save(overlay, "overlay")
    shares = ", ".join(f"{area.name} {percent(area.share)}" for area in result.found())
    print_field("image", f"{Path(image).name}: {shares} -> {overlay}")


def _overlay_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}_overlay.png")
