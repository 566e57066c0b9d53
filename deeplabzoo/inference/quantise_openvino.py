"""8-bit networks for OpenVINO, made by its own quantiser (NNCF), which corrects the bias that rounding leaves.

ONNX Runtime's 8-bit file is not used here: OpenVINO 2026.4 gives wrong labels for it. Depthwise convolutions stay in float32
for the reason given in `quantise`; with them in 8 bits the labels are wrong here, too.
"""

import logging
import shutil
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from deeplabzoo.inference.calibration import Calibration, CalibrationImages
from deeplabzoo.inference.optional import require
from deeplabzoo.inference.quantise import fingerprint
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.output import write_atomically
from deeplabzoo.say import say


def quantised_model(net: DeepLab, graph: Path, images: CalibrationImages | None) -> Path:
    """Return OpenVINO's 8-bit form (.xml, its weights beside it) of a cached graph, made of `images` where it is not there yet.

    Raises UsageError without images, ImageError for pictures that cannot be read, DeepLabZooError where NNCF is missing.
    """
    calibration = Calibration(net, images)
    path = graph.with_name(f"{graph.stem}-int8-{fingerprint(calibration)}.xml")
    if not path.is_file():
        save_model(quantised(graph, calibration), path)
        say(f"OpenVINO int8 model calibrated on {len(calibration)} photos (kept as {path})")
    return path


def quantised(graph: Path | bytes, calibration: Calibration) -> Any:
    """Return the `openvino.Model` of an ONNX graph with all but depthwise convolutions in 8 bits."""
    ov = require("openvino", extra="openvino", purpose="Running OpenVINO")
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # its progress bars are not the answer of a command
        warnings.simplefilter("ignore")
        nncf = require("nncf", extra="openvino", purpose="int8 with OpenVINO")
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
    ov = require("openvino", extra="openvino", purpose="Writing OpenVINO")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / path.name
        ov.save_model(model, written, compress_to_fp16=False)
        for part in (written.with_suffix(".bin"), written):
            write_atomically(path.with_suffix(part.suffix), partial(_copy, part))


def _copy(part: Path, file: BinaryIO) -> None:
    with part.open("rb") as source:
        shutil.copyfileobj(source, file)
