"""Export a model to a file: write, verify against the model, measure mIoU, add metadata, move into place, report."""

import copy
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from deeplabzoo.data.dataset import SegmentationDataset
from deeplabzoo.data.image_io import read_image
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.evaluation.report import hardware, image_list_sha256
from deeplabzoo.export.formats import ExportConfig, Format, add_metadata, runner, write
from deeplabzoo.export.parity import AccuracyCheck, measure_miou, preprocessing_for, require_export_parity
from deeplabzoo.files import write_atomically
from deeplabzoo.inference.predictor import unwrap_model
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.optimization.onnx_export import Output
from deeplabzoo.optimization.quantization import Calibration
from deeplabzoo.strict_json import decode_dataclass

KIND = "deeplabzoo.export/1"
"""Value of the field `kind` of a report, which identifies the format of the JSON file."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """The calibration images of an int8 file."""

    images: int
    """Number of images."""
    list_sha256: str
    """SHA-256 of their file names, sorted, each followed by a line feed."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Report of one exported file, as `--json` writes it; docs/export.md is filled from such reports."""

    model: str
    """Name and tag, e.g. `deeplabv3plus_mobilenetv2_voc.v1`."""
    weights_sha256: str | None
    """SHA-256 of the checkpoint; None without one."""
    format: Format
    precision: str
    """`fp32` or `int8`."""
    output: Output
    size: tuple[int, int] | None
    """Fixed (height, width) of the images in pixels; None for dynamic shapes."""
    calibration: CalibrationSet | None
    """None for fp32."""
    proof: str
    """Result of the parity check, see `parity.require_export_parity`."""
    check: AccuracyCheck | None
    """mIoU of model and file; None if not measured."""
    bytes: int
    """Size of the file, with its `.bin` where it has one."""
    seconds: float
    """Duration of the export, checks included."""
    versions: Mapping[str, str]
    """Package -> version."""
    cpu: str
    threads: int
    """CPU threads of torch."""
    date: str
    """ISO 8601, UTC."""
    command: str | None = None
    """The command line, if the export was one."""

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps({"kind": KIND, **dataclasses.asdict(self)}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_export(path: Path) -> Export:
    """Read a report.

    Raises:
        UsageError: The file cannot be read or is not a report of an export.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("kind") != KIND:
            raise ValueError(f"its kind is not {KIND}")
        return decode_dataclass(Export, values, path.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, WeightsError) as error:
        raise UsageError(f"'{path}' is not a report of `python -m deeplabzoo.export --json`: {error}.") from None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that an export may use, by name."""
    found = {"python": platform.python_version()}
    for name in ("deeplabzoo", "torch", "timm", "onnx", "onnxruntime", "openvino", "nncf"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


_NUM_PARITY_IMAGES = 3
"""Real images whose labels are compared before the file is kept."""


def export(
    net: DeepLab,
    config: ExportConfig,
    *,
    check: SegmentationDataset | None = None,
    count: int = 0,
    log_step: Callable[[str, str], None] = lambda what, text: None,
) -> Export:
    """Export a model to `config.out`.

    The file is written atomically, after a parity check on random images and on images of `check` or of the calibration set.

    Args:
        net: The model; it is moved to the CPU and set to eval mode. A model in another type than float32 is exported from a
            float32 copy, since files compute in float32 (or int8).
        config: File, format and options.
        check: Dataset on which mIoU of model and file is measured; None to skip that.
        count: Number of its images, from the first one.
        log_step: Called with (name, result) of each step.

    Raises:
        UsageError: Invalid options, or no calibration images.
        OutputError: The file cannot be written.
        ImageError: An image cannot be read.
        DeepLabZooError: The format does not support the model, a library is missing, or the parity check failed.
    """
    config.check()
    began = time.monotonic()
    net = unwrap_model(net, "export").cpu().eval()
    if any(one.is_floating_point() and one.dtype != torch.float32 for one in net.state_dict().values()):
        net = copy.deepcopy(net).float()
        logger.warning("the model is converted to float32 for export")
    calibration = [] if config.calibrate is None else _calibration_images(net, config.calibrate)
    images = [check[index].image for index in range(min(_NUM_PARITY_IMAGES, len(check)))] if check is not None else []
    images = images or [read_image(path) for path in calibration[:_NUM_PARITY_IMAGES]]
    facts = {"preprocessing": json.dumps(preprocessing_for(net, config.size).to_dict())}
    with tempfile.TemporaryDirectory(dir=config.out.parent, prefix=".deeplabzoo-export-") as folder:
        file = Path(folder) / config.out.name
        write(net, config, file, facts)
        run = runner(config.format, file)
        proof = require_export_parity(net, run, config.output, config.size, images, int8=config.calibrate is not None)
        log_step("parity", proof)
        result = measure_miou(net, run, config.output, config.size, check, count) if check is not None else None
        add_metadata(
            config.format, file, {"proof": proof, **({"check": json.dumps(dataclasses.asdict(result))} if result else {})}
        )
        parts = sorted(Path(folder).iterdir())  # .bin before .xml, so that an .xml always has its weights
        size_bytes = sum(part.stat().st_size for part in parts)
        for part in parts:
            write_atomically(config.out.parent / part.name, partial(_fill, part.read_bytes()))
    machine = hardware(torch.device("cpu"))
    return Export(
        model=_name(net),
        weights_sha256=net.weights_source.get("sha256"),
        format=config.format,
        precision="fp32" if config.calibrate is None else "int8",
        output=config.output,
        size=config.size,
        calibration=CalibrationSet(images=len(calibration), list_sha256=image_list_sha256([path.name for path in calibration]))
        if calibration
        else None,
        proof=proof,
        check=result,
        bytes=size_bytes,
        seconds=round(time.monotonic() - began, 1),
        versions=versions(),
        cpu=machine["cpu"],
        threads=machine["threads"],
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _calibration_images(net: DeepLab, calibrate: str) -> list[Path]:
    return [image for image in Calibration(net, calibrate).images if isinstance(image, Path)]


def _name(net: DeepLab) -> str:
    name, tag = net.weights_source.get("name"), net.weights_source.get("tag")
    return f"{name or net.config.architecture + '_' + short_name(net.config.encoder)}{f'.{tag}' if tag else ''}"


def _fill(content: bytes, file: BinaryIO) -> None:
    file.write(content)
