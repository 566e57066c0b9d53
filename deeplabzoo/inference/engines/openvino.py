"""OpenVINO's kernels under our label maps, fed with the same graph as ONNX Runtime."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.errors import UsageError
from deeplabzoo.inference.calibration import CalibrationImages
from deeplabzoo.inference.denormals import denormals_flushed
from deeplabzoo.inference.engines.by_size import BySize
from deeplabzoo.inference.graph_cache import cached_graph
from deeplabzoo.inference.onnx_graph import Runner
from deeplabzoo.inference.optional import require
from deeplabzoo.inference.quantise_openvino import quantised_model
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.say import say

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""Ours -> what OpenVINO computes in where the graph itself says nothing. Left alone it may choose bf16 in silence."""


def build(
    net: DeepLab, precision: str = "fp32", *, threads: int | None = None, calibration: CalibrationImages | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from a normalised float image B x C x H x W to float32 low-resolution logits B x classes x h x w.

    As `onnx_runtime.build`, with the same options and errors; `bf16` too, which pays where the processor has it.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"The engine 'openvino' runs {', '.join(PRECISIONS)}, not {precision!r}.")
    require("openvino", extra="openvino", purpose="The engine 'openvino'")
    started = time.perf_counter()
    path = cached_graph(net, compiled_runner)
    if precision == "int8":
        path = quantised_model(net, path, calibration)
    run = compiled_runner(path, threads=threads, precision=precision)
    say(f"engine openvino, {precision}: ready after {time.perf_counter() - started:.1f} s")

    def forward(image_BCHW: torch.Tensor) -> torch.Tensor:
        image = image_BCHW.detach().to("cpu", torch.float32).contiguous()
        return torch.from_numpy(run(image.numpy())).permute(0, 3, 1, 2)

    return forward


def compiled_runner(model: Path | bytes, *, threads: int | None = None, precision: str = "fp32") -> Runner:
    """Compile a graph with OpenVINO for the CPU; the function returned maps the array `image` to a copy of the first output."""
    ov = require("openvino", extra="openvino", purpose="Running OpenVINO")
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
        with denormals_flushed():
            request = core.compile_model(graph, "CPU", settings).create_infer_request()
        turn = threading.Lock()  # a request takes one picture at a time and refuses others; all cores work on that one

        def run(image: Any) -> Any:
            with turn, denormals_flushed():
                return request.infer({0: image})[0].copy()

        return run

    return BySize(open_graph)
