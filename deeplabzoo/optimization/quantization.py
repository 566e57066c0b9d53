"""Networks in 8-bit integers: convolutions fitted to real photos, what is sensitive left in float32.

Weights per output channel, activations per tensor (uint8), ranges the mean over the photos of each photo's extremes. Depthwise
convolutions stay in float32: they are a few per cent of the arithmetic, and their channels differ so much in range that in
8 bits they cost more accuracy than all other convolutions together.
"""

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from deeplabzoo.data.image_io import Pixels, read_image
from deeplabzoo.data.image_sources import find_images
from deeplabzoo.errors import UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optional_imports import require_module
from deeplabzoo.processing.preprocessing import prepare

# Real photos as a quantiser wants them: what the user gave, prepared as the weights expect it, one at a time.


CalibrationImages = str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Pixels] | npt.NDArray[np.uint8] | torch.Tensor
"""A folder or pattern, a list of photos (paths or uint8 H x W x 3), an array N x H x W x 3, or prepared images N x C x H x W
(a float tensor)."""

MAX_CALIBRATION_IMAGES = 64
"""Photos used of a larger folder, spread over it; more did not move the figures."""


class Calibration:
    """The pictures that a quantised network is fitted to; iterate to get prepared arrays 1 x C x H x W."""

    def __init__(self, net: DeepLab, images: CalibrationImages | None) -> None:
        """Find the pictures; raises UsageError where there are none, ImageError where a folder or file cannot be read."""
        self.net = net
        self.images = _list_images(images)

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.images)

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        """Read, prepare and yield them in order."""
        for image in self.images:
            if isinstance(image, torch.Tensor):
                yield image[None].detach().cpu().float().numpy()
            else:
                pixels = image if isinstance(image, np.ndarray) else read_image(image)
                yield prepare(pixels, self.net.preprocessing).tensor_1CHW.numpy()


def _list_images(images: CalibrationImages | None) -> list[Path | Pixels | torch.Tensor]:
    if images is None or (not isinstance(images, str | os.PathLike) and len(images) == 0):
        raise UsageError(
            "precision='int8' needs calibration=, some twenty or more photos of the kind that the network will see: "
            "a folder, a list of files, or arrays."
        )
    if isinstance(images, str | os.PathLike):
        found: list[Path | Pixels | torch.Tensor] = [source.path for source in find_images([os.fspath(images)])]
    else:
        found = [Path(one) if isinstance(one, str | os.PathLike) else one for one in images]
    if len(found) <= MAX_CALIBRATION_IMAGES:
        return found
    return [found[round(index * (len(found) - 1) / (MAX_CALIBRATION_IMAGES - 1))] for index in range(MAX_CALIBRATION_IMAGES)]


_QUANTIZATION_VERSION = 1
"""Raised when the same photos give another file."""


def quantised_graph(net: DeepLab, graph: Path, images: CalibrationImages | None) -> Path:
    """Return the 8-bit form of a cached graph, made of `images` where it is not there yet.

    `images` may also be a file that `save_quantised` wrote for this network. Raises UsageError without images, or for a file of
    another network; ImageError for pictures that cannot be read.
    """
    saved = _saved_quantized_file(images)
    if saved is not None:
        if _facts(saved).get("graph") != graph.stem:
            raise UsageError(f"'{saved}' is not an int8 graph of this network and these versions; calibrate again.")
        return saved
    calibration = Calibration(net, images)
    path = graph.with_name(f"{graph.stem}-int8-{fingerprint(calibration)}.onnx")
    if not path.is_file():
        model = quantised_bytes(graph.read_bytes(), calibration, {"graph": graph.stem})
        write_atomically(path, lambda file: file.write(model))
        logger.info(f"int8 graph calibrated on {len(calibration)} photos (kept as {path})")
    return path


def save_quantised(net: DeepLab, graph: Path, images: CalibrationImages | None, path: Path) -> None:
    """Write the 8-bit form of a cached graph to `path`, which `calibration=` takes in the place of photos later."""
    model = quantised_graph(net, graph, images).read_bytes()
    write_atomically(path, lambda file: file.write(model))


def quantised_bytes(model: bytes, calibration: Calibration, facts: dict[str, str] | None = None) -> bytes:
    """Return an ONNX file with its convolutions in 8 bits; its own metadata stay, `facts` are added to them."""
    import onnx

    quantization: Any = require_module("onnxruntime.quantization", extra="onnxruntime", purpose="Quantising")
    proto = onnx.load_from_string(model)
    depthwise = [node.name for node in proto.graph.node if node.op_type == "Conv" and _groups(node) > 1]
    with tempfile.TemporaryDirectory() as folder, _quiet_onnxruntime():
        target = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            proto,
            target,
            _CalibrationReader(calibration),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=depthwise,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={"CalibMovingAverage": True},
        )
        quantised = onnx.load(target)
    known = {entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props}
    del quantised.metadata_props[:]
    onnx.helper.set_model_props(
        quantised, {**known, "precision": "int8", "calibration": str(len(calibration)), **(facts or {})}
    )
    whole: bytes = quantised.SerializeToString()
    return whole


class _CalibrationReader:
    """Feeds ONNX Runtime's calibration, which asks for one batch after another until there is none."""

    def __init__(self, calibration: Calibration) -> None:
        self._images = iter(calibration)
        self._count = len(calibration)

    def __len__(self) -> int:
        return self._count

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        """Return the next feed, or None at the end."""
        image = next(self._images, None)
        return None if image is None else {"image": image}

    def set_range(self, start_index: int, end_index: int) -> None:
        """Refuse to be read in parts; raises UsageError."""
        raise UsageError(f"Calibration photos are read in one pass, not from {start_index} to {end_index}.")


def _groups(node: Any) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "group"), 1)


def _saved_quantized_file(images: CalibrationImages | None) -> Path | None:
    path = Path(images) if isinstance(images, str | Path) else None
    return path if path is not None and path.suffix == ".onnx" and path.is_file() else None


def _facts(path: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def fingerprint(calibration: Calibration) -> str:
    """Return a name for a recipe and its photos: the same for the same prepared pixels."""
    digest = hashlib.sha256(str(_QUANTIZATION_VERSION).encode())
    for image in calibration:
        digest.update(str(image.shape).encode() + image.tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _quiet_onnxruntime() -> Iterator[None]:
    """Keep back ONNX Runtime's advice to preprocess the model first, which has been done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# 8-bit networks for OpenVINO, made by its own quantiser (NNCF), which corrects the bias that rounding leaves.
#
# ONNX Runtime's 8-bit file is not used here: OpenVINO 2026.4 gives wrong labels for it. Depthwise convolutions stay in float32
# for the reason given in `quantise`; with them in 8 bits the labels are wrong here, too.


def quantised_model(net: DeepLab, graph: Path, images: CalibrationImages | None) -> Path:
    """Return OpenVINO's 8-bit form (.xml, its weights beside it) of a cached graph, made of `images` where it is not there yet.

    Raises UsageError without images, ImageError for pictures that cannot be read, DeepLabZooError where NNCF is missing.
    """
    calibration = Calibration(net, images)
    path = graph.with_name(f"{graph.stem}-int8-{fingerprint(calibration)}.xml")
    if not path.is_file():
        save_model(quantised(graph, calibration), path)
        logger.info(f"OpenVINO int8 model calibrated on {len(calibration)} photos (kept as {path})")
    return path


def quantised(graph: Path | bytes, calibration: Calibration) -> Any:
    """Return the `openvino.Model` of an ONNX graph with all but depthwise convolutions in 8 bits."""
    ov = require_module("openvino", extra="openvino", purpose="Running OpenVINO")
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # its progress bars are not the answer of a command
        warnings.simplefilter("ignore")
        nncf = require_module("nncf", extra="openvino", purpose="int8 with OpenVINO")
        nncf.set_log_level(logging.ERROR)
        return nncf.quantize(
            ov.Core().read_model(graph if isinstance(graph, bytes) else str(graph)),
            nncf.Dataset(list(calibration)),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
            ignored_scope=nncf.IgnoredScope(types=["GroupConvolution"], validate=False),
        )


def save_model(model: Any, path: Path) -> None:
    """Write an `openvino.Model` as `path` (.xml) and its weights beside it (.bin); the .xml comes last, when both are whole."""
    ov = require_module("openvino", extra="openvino", purpose="Writing OpenVINO")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / path.name
        ov.save_model(model, written, compress_to_fp16=False)
        for part in (written.with_suffix(".bin"), written):
            write_atomically(path.with_suffix(part.suffix), partial(_copy, part))


def _copy(part: Path, file: BinaryIO) -> None:
    with part.open("rb") as source:
        shutil.copyfileobj(source, file)
