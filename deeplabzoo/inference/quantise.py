"""Networks in 8-bit integers: convolutions fitted to real photos, what is sensitive left in float32.

Weights per output channel, activations per tensor (uint8), ranges the mean over the photos of each photo's extremes. Depthwise
convolutions stay in float32: they are a few per cent of the arithmetic, and their channels differ so much in range that in
8 bits they cost more accuracy than all other convolutions together.
"""

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deeplabzoo.errors import UsageError
from deeplabzoo.inference.calibration import Calibration, CalibrationImages
from deeplabzoo.inference.optional import require
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.output import write_atomically
from deeplabzoo.say import say

_RECIPE = 1
"""Raised when the same photos give another file."""


def quantised_graph(net: DeepLab, graph: Path, images: CalibrationImages | None) -> Path:
    """Return the 8-bit form of a cached graph, made of `images` where it is not there yet.

    `images` may also be a file that `save_quantised` wrote for this network. Raises UsageError without images, or for a file of
    another network; ImageError for pictures that cannot be read.
    """
    saved = _saved_file(images)
    if saved is not None:
        if _facts(saved).get("graph") != graph.stem:
            raise UsageError(f"'{saved}' is not an int8 graph of this network and these versions; calibrate again.")
        return saved
    calibration = Calibration(net, images)
    path = graph.with_name(f"{graph.stem}-int8-{fingerprint(calibration)}.onnx")
    if not path.is_file():
        model = quantised_bytes(graph.read_bytes(), calibration, {"graph": graph.stem})
        write_atomically(path, lambda file: file.write(model))
        say(f"int8 graph calibrated on {len(calibration)} photos (kept as {path})")
    return path


def save_quantised(net: DeepLab, graph: Path, images: CalibrationImages | None, path: Path) -> None:
    """Write the 8-bit form of a cached graph to `path`, which `calibration=` takes in the place of photos later."""
    model = quantised_graph(net, graph, images).read_bytes()
    write_atomically(path, lambda file: file.write(model))


def quantised_bytes(model: bytes, calibration: Calibration, facts: dict[str, str] | None = None) -> bytes:
    """Return an ONNX file with its convolutions in 8 bits; its own metadata stay, `facts` are added to them."""
    import onnx

    quantization: Any = require("onnxruntime.quantization", extra="onnxruntime", purpose="Quantising")
    proto = onnx.load_from_string(model)
    depthwise = [node.name for node in proto.graph.node if node.op_type == "Conv" and _groups(node) > 1]
    with tempfile.TemporaryDirectory() as folder, _silent():
        target = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            proto,
            target,
            _Reader(calibration),
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


class _Reader:
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


def _saved_file(images: CalibrationImages | None) -> Path | None:
    path = Path(images) if isinstance(images, str | Path) else None
    return path if path is not None and path.suffix == ".onnx" and path.is_file() else None


def _facts(path: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def fingerprint(calibration: Calibration) -> str:
    """Return a name for a recipe and its photos: the same for the same prepared pixels."""
    digest = hashlib.sha256(str(_RECIPE).encode())
    for image in calibration:
        digest.update(str(image.shape).encode() + image.tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _silent() -> Iterator[None]:
    """Keep back ONNX Runtime's advice to preprocess the model first, which has been done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
