"""ONNX Runtime and OpenVINO as their users run them: the peer's network exported with full-size logits, arg-max in numpy.

Both are told the number of threads, to compute in float32, and to let denormals be zero.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deeplabzoo.benchmarking.libraries import library

Floats = npt.NDArray[np.float32]
Run = Callable[[Floats], Floats]


def write_onnx(net: nn.Module, image_BCHW: torch.Tensor, path: Path) -> None:
    """Export a network with torch's own exporter for images of one shape; raises UsageError where onnxscript is missing."""
    library("onnxscript")
    exporters = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in exporters]
    for logger in exporters:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the exporter's own deprecations, which are not the reader's business
            torch.onnx.export(
                net,
                (image_BCHW,),
                str(path),
                dynamo=True,
                input_names=["image"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    finally:
        for logger, level in zip(exporters, levels, strict=True):
            logger.setLevel(level)


def onnxruntime_run(path: Path, threads: int) -> Run:
    """Return image_BCHW -> logits_BCHW by ONNX Runtime on the CPU with its default optimisations."""
    ort = library("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image_BCHW: Floats) -> Floats:
        logits_BCHW: Floats = session.run(None, {"image": image_BCHW})[0]
        return logits_BCHW

    return run


def openvino_run(path: Path, threads: int) -> Run:
    """Return image_BCHW -> logits_BCHW by OpenVINO on the CPU, for latency."""
    openvino = library("openvino")
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "CPU_DENORMALS_OPTIMIZATION": True,
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(image_BCHW: Floats) -> Floats:
        logits_BCHW: Floats = compiled(image_BCHW)[0]
        return logits_BCHW

    return run


RUNTIMES: dict[str, Callable[[Path, int], Run]] = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}
"""By the name that `--peers` has for them."""
