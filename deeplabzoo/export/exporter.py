"""One export from top to bottom: write beside the place, open, compare, measure, describe, move there."""

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
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.optimization.onnx_export import Output
from deeplabzoo.optimization.quantization import Calibration
from deeplabzoo.strict_json import decode_dataclass

# What an export wrote and what was seen of it, as plain data: `--json` of the command, from which docs/export.md is filled.


KIND = "deeplabzoo.export/1"
"""What the first field of a report says, so that other JSON files are not taken for one."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """The photos that an int8 file was fitted to."""

    images: int
    list_sha256: str
    """Over their file names, sorted, each followed by a line feed."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """One written file: what it is, the proof that it passed, and its mIoU beside the network's where that was measured."""

    model: str
    weights_sha256: str | None
    """Of the file that the network was read from; None where there was none."""
    format: Format
    precision: str
    """`fp32` or `int8`."""
    output: Output
    size: tuple[int, int] | None
    """(height, width) of the only image it takes; None for open sizes."""
    calibration: CalibrationSet | None
    proof: str
    check: AccuracyCheck | None
    bytes: int
    """Of the file, with its `.bin` where it has one."""
    seconds: float
    """From the first step to the file in its place, checks included."""
    versions: Mapping[str, str]
    cpu: str
    threads: int
    date: str
    """ISO 8601, UTC."""
    command: str | None = None

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps({"kind": KIND, **dataclasses.asdict(self)}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_export(path: Path) -> Export:
    """Return the report that a file holds; raises UsageError for what is none."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("kind") != KIND:
            raise ValueError(f"its kind is not {KIND}")
        return decode_dataclass(Export, values, path.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, WeightsError) as error:
        raise UsageError(f"'{path}' is not a report of `python -m deeplabzoo.export --json`: {error}.") from None


def versions() -> dict[str, str]:
    """Return the releases of what took part in an export, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("deeplabzoo", "torch", "timm", "onnx", "onnxruntime", "openvino", "nncf"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


_NUM_PARITY_IMAGES = 3
"""Real photos whose labels are compared before the file counts."""


def export(
    net: DeepLab,
    config: ExportConfig,
    *,
    check: SegmentationDataset | None = None,
    count: int = 0,
    log_step: Callable[[str, str], None] = lambda what, text: None,
) -> Export:
    """Write `config.out`, measure it on the first `count` pictures of `check`, and return what was made and seen.

    `log_step(what, text)` is called with each step's outcome. The file appears whole, after it gave the network's answers on random
    images and on photos of `check` or of the calibration folder, or not at all. Raises what the steps raise.
    """
    config.check()
    began = time.monotonic()
    net = net.cpu().eval()
    calibration = [] if config.calibrate is None else _calibration_images(net, config.calibrate)
    images = [check[index].image for index in range(min(_NUM_PARITY_IMAGES, len(check)))] if check is not None else []
    images = images or [read_image(path) for path in calibration[:_NUM_PARITY_IMAGES]]
    facts = {"preprocessing": json.dumps(preprocessing_for(net, config.size).to_dict())}
    with tempfile.TemporaryDirectory(dir=config.out.parent, prefix=".deeplabzoo-export-") as folder:
        file = Path(folder) / config.out.name
        write(net, config, file, facts)
        run = runner(config.format, file)
        proof = require_export_parity(net, run, config.output, config.size, images, int8=config.calibrate is not None)
        log_step("proof", proof)
        result = measure_miou(net, run, config.output, config.size, check, count) if check is not None else None
        add_metadata(
            config.format, file, {"proof": proof, **({"check": json.dumps(dataclasses.asdict(result))} if result else {})}
        )
        parts = sorted(Path(folder).iterdir())  # .bin before .xml: the one that is opened comes last
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
