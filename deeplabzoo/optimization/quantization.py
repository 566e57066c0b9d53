"""Post-training quantization to int8 for ONNX Runtime and OpenVINO, calibrated on real images.

Weights are quantized per output channel, activations per tensor (uint8); the range of an activation is the mean over the images
of its minimum and maximum. Depthwise convolutions stay in float32: they are a few per cent of the arithmetic, and the ranges of
their channels differ so much that in int8 they cost more accuracy than all other convolutions together.
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

CalibrationImages = str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Pixels] | npt.NDArray[np.uint8] | torch.Tensor
"""A folder or glob pattern, a list of images (paths or uint8 H x W x 3), a uint8 array N x H x W x 3, or preprocessed images
(float tensor N x C x H x W)."""

MAX_CALIBRATION_IMAGES = 64
"""Images used of a larger set, evenly spread over it; more did not change the mIoU."""


class Calibration:
    """Calibration images; iterate to get preprocessed float32 arrays 1 x C x H x W.

    Args:
        net: The model, whose preprocessing is applied.
        images: The images; at most `MAX_CALIBRATION_IMAGES` of them are used.

    Raises:
        UsageError: There are no images.
        ImageError: A folder or file cannot be read (files: while iterating).
    """

    def __init__(self, net: DeepLab, images: CalibrationImages | None) -> None:
        self.net = net
        self.images = _list_images(images)

    def __len__(self) -> int:
        """Return the number of images used."""
        return len(self.images)

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        """Read, preprocess and yield the images in order."""
        for image in self.images:
            if isinstance(image, torch.Tensor):
                yield image[None].detach().cpu().float().numpy()
            else:
                pixels = image if isinstance(image, np.ndarray) else read_image(image)
                yield prepare(pixels, self.net.preprocessing).tensor_1CHW.numpy()


def _list_images(images: CalibrationImages | None) -> list[Path | Pixels | torch.Tensor]:
    if images is None or (not isinstance(images, str | os.PathLike) and len(images) == 0):
        raise UsageError(
            "precision='int8' needs calibration=: about 50 images of the kind that the model will see, as a folder, a list of "
            "files, or arrays."
        )
    if isinstance(images, str | os.PathLike):
        found: list[Path | Pixels | torch.Tensor] = [source.path for source in find_images([os.fspath(images)])]
    else:
        found = [Path(one) if isinstance(one, str | os.PathLike) else one for one in images]
    if len(found) <= MAX_CALIBRATION_IMAGES:
        return found
    return [found[round(index * (len(found) - 1) / (MAX_CALIBRATION_IMAGES - 1))] for index in range(MAX_CALIBRATION_IMAGES)]


_QUANTIZATION_VERSION = 1
"""Part of the cache key; to be increased when the same images would give another file."""


def quantized_graph(net: DeepLab, graph: Path, images: CalibrationImages | None) -> Path:
    """Return the int8 file of a cached ONNX graph; quantize it if it is not in the cache.

    Args:
        net: The model.
        graph: Its ONNX graph, see `onnx_export.cached_graph`.
        images: Calibration images, or a file that `save_quantized` wrote for this model.

    Raises:
        UsageError: No images, or a file of another model or other versions.
        ImageError: An image cannot be read.
    """
    saved = _saved_quantized_file(images)
    if saved is not None:
        if _facts(saved).get("graph") != graph.stem:
            raise UsageError(f"'{saved}' is not an int8 graph of this model and the installed versions; calibrate again.")
        return saved
    calibration = Calibration(net, images)
    path = graph.with_name(f"{graph.stem}-int8-{fingerprint(calibration)}.onnx")
    if not path.is_file():
        model = quantized_bytes(graph.read_bytes(), calibration, {"graph": graph.stem})
        write_atomically(path, lambda file: file.write(model))
        logger.info(f"int8 graph calibrated on {len(calibration)} images (cached as {path})")
    return path


def save_quantized(net: DeepLab, graph: Path, images: CalibrationImages | None, path: Path) -> None:
    """Write the int8 file of a cached graph to `path`; `calibration=` accepts that file instead of images.

    Args and errors are those of `quantized_graph`.
    """
    model = quantized_graph(net, graph, images).read_bytes()
    write_atomically(path, lambda file: file.write(model))


def quantized_bytes(model: bytes, calibration: Calibration, facts: dict[str, str] | None = None) -> bytes:
    """Return an ONNX file with its convolutions, except depthwise ones, in int8.

    Args:
        model: A float32 ONNX file with one input `image`.
        calibration: The calibration images.
        facts: Metadata added to those of `model`.

    Raises:
        DeepLabZooError: ONNX Runtime is not installed.
    """
    import onnx

    quantization: Any = require_module("onnxruntime.quantization", extra="onnxruntime", purpose="int8")
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
        quantized = onnx.load(target)
    known = {entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props}
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(
        quantized, {**known, "precision": "int8", "calibration": str(len(calibration)), **(facts or {})}
    )
    whole: bytes = quantized.SerializeToString()
    return whole


class _CalibrationReader:
    """Calibration images in the form of ONNX Runtime's CalibrationDataReader, which calls `get_next` until it returns None."""

    def __init__(self, calibration: Calibration) -> None:
        self._images = iter(calibration)
        self._count = len(calibration)

    def __len__(self) -> int:
        return self._count

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        """Return the next input (1 x C x H x W by name), or None at the end."""
        image = next(self._images, None)
        return None if image is None else {"image": image}

    def set_range(self, start_index: int, end_index: int) -> None:
        """Raise UsageError: reading a part of the images (ONNX Runtime's strided calibration) is not supported."""
        raise UsageError(f"Calibration images are read in one pass; the range {start_index} to {end_index} is not supported.")


def _groups(node: Any) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "group"), 1)


def _saved_quantized_file(images: CalibrationImages | None) -> Path | None:
    path = Path(images) if isinstance(images, str | Path) else None
    return path if path is not None and path.suffix == ".onnx" and path.is_file() else None


def _facts(path: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def fingerprint(calibration: Calibration) -> str:
    """Return a hexadecimal name for the calibration: equal for equal preprocessed pixels in equal order."""
    digest = hashlib.sha256(str(_QUANTIZATION_VERSION).encode())
    for image in calibration:
        digest.update(str(image.shape).encode() + image.tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _quiet_onnxruntime() -> Iterator[None]:
    """Suppress log messages of ONNX Runtime's quantizer: it advises to preprocess the model first, which has been done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# int8 for OpenVINO, quantized by NNCF, which also corrects the bias of rounding.
#
# The int8 file of ONNX Runtime gives wrong labels in OpenVINO 2026.4. Depthwise convolutions stay in float32 here, too: in int8
# the labels are wrong.


def quantized_model(net: DeepLab, graph: Path, images: CalibrationImages | None) -> Path:
    """Return the int8 OpenVINO file (.xml with .bin beside it) of a cached ONNX graph; quantize it if it is not in the cache.

    Args:
        net: The model.
        graph: Its ONNX graph, see `onnx_export.cached_graph`.
        images: Calibration images.

    Raises:
        UsageError: No images.
        ImageError: An image cannot be read.
        DeepLabZooError: OpenVINO or NNCF is not installed.
    """
    calibration = Calibration(net, images)
    path = graph.with_name(f"{graph.stem}-int8-{fingerprint(calibration)}.xml")
    if not path.is_file():
        save_model(quantize_for_openvino(graph, calibration), path)
        logger.info(f"OpenVINO int8 model calibrated on {len(calibration)} images (cached as {path})")
    return path


def quantize_for_openvino(graph: Path | bytes, calibration: Calibration) -> Any:
    """Return an `openvino.Model` of an ONNX graph (path or file content) with all but depthwise convolutions in int8."""
    ov = require_module("openvino", extra="openvino", purpose="Running OpenVINO")
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # NNCF prints progress bars to standard output
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
    """Write an `openvino.Model` as `path` (.xml) and its weights beside it (.bin), each atomically; the .xml last."""
    ov = require_module("openvino", extra="openvino", purpose="Writing OpenVINO")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / path.name
        ov.save_model(model, written, compress_to_fp16=False)
        for part in (written.with_suffix(".bin"), written):
            write_atomically(path.with_suffix(part.suffix), partial(_copy, part))


def _copy(part: Path, file: BinaryIO) -> None:
    with part.open("rb") as source:
        shutil.copyfileobj(source, file)
