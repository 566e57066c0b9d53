"""OpenVINO's kernels under our label maps, fed with the same graph as ONNX Runtime."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.errors import UsageError
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.backends.onnxruntime_backend import SizeSpecializedRunner
from deeplabzoo.optimization.cpu_runtime import flush_denormals
from deeplabzoo.optimization.onnx_export import Runner, cached_graph
from deeplabzoo.optimization.quantization import CalibrationImages, quantised_model
from deeplabzoo.optional_imports import require_module

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""Ours -> what OpenVINO computes in where the graph itself says nothing. Left alone it may choose bf16 in silence."""


def build(
    net: DeepLab, precision: str = "fp32", *, threads: int | None = None, calibration: CalibrationImages | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from a normalize_images float image B x C x H x W to float32 low-resolution logits B x classes x h x w.

    As `onnx_runtime.build`, with the same options and errors; `bf16` too, which pays where the processor has it.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"The engine 'openvino' runs {', '.join(PRECISIONS)}, not {precision!r}.")
    require_module("openvino", extra="openvino", purpose="The engine 'openvino'")
    started = time.perf_counter()
    path = cached_graph(net, openvino_runner)
    if precision == "int8":
        path = quantised_model(net, path, calibration)
    run = openvino_runner(path, threads=threads, precision=precision)
    logger.info(f"engine openvino, {precision}: ready after {time.perf_counter() - started:.1f} s")

    def forward(image_BCHW: torch.Tensor) -> torch.Tensor:
        image = image_BCHW.detach().to("cpu", torch.float32).contiguous()
        return torch.from_numpy(run(image.numpy())).permute(0, 3, 1, 2)

    return forward


def openvino_runner(model: Path | bytes, *, threads: int | None = None, precision: str = "fp32") -> Runner:
    """Compile a graph with OpenVINO for the CPU; the function returned maps the array `image` to a copy of the first output."""
    ov = require_module("openvino", extra="openvino", purpose="Running OpenVINO")
    core: Any = ov.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "CPU_DENORMALS_OPTIMIZATION": True,
    }

    def open_graph(shape: tuple[int, ...] | None) -> Runner:
        graph = core.read_model(model if isinstance(model, bytes) else str(model))
        if shape is not None:
            graph.reshape(list(shape))
        with flush_denormals():
            request = core.compile_model(graph, "CPU", settings).create_infer_request()
        turn = threading.Lock()  # a request takes one picture at a time and refuses others; all cores work on that one

        def run(image: Any) -> Any:
            with turn, flush_denormals():
                return request.infer({0: image})[0].copy()

        return run

    return SizeSpecializedRunner(open_graph)
