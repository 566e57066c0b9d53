"""Backends `onnxruntime` and `openvino`: one cached ONNX graph per model, run for every batch and image size on the CPU."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deeplabzoo.errors import UsageError
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.cpu_runtime import flush_denormals
from deeplabzoo.optimization.onnx_export import Runner, cached_graph
from deeplabzoo.optimization.quantization import CalibrationImages, quantized_graph, quantized_model
from deeplabzoo.optional_imports import require_module

Forward = Callable[[torch.Tensor], torch.Tensor]
"""Normalized float images B x C x H x W -> float32 low-resolution logits B x classes x h x w, in channels_last memory."""
ONNXRUNTIME_PRECISIONS = ("fp32", "int8")
OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""Precision -> inference precision hint. Without a hint OpenVINO may choose bf16."""
_MAX_SPECIALIZED = 2
"""Graphs of a fixed size kept at a time; each may hold a copy of the weights."""


def build_onnxruntime(
    net: DeepLab, precision: str = "fp32", *, threads: int | None = None, calibration: CalibrationImages | None = None
) -> Forward:
    """Return the forward pass of `net` in ONNX Runtime.

    Args:
        net: The model, on the CPU.
        precision: fp32 or int8.
        threads: CPU threads; default: those of torch.
        calibration: Real images for int8, see `quantization.quantized_graph`.

    Raises:
        UsageError: Unsupported precision.
        DeepLabZooError: ONNX Runtime is not installed, or the graph does not compute what the model does.
    """
    if precision not in ONNXRUNTIME_PRECISIONS:
        raise UsageError(f"The engine 'onnxruntime' runs {' and '.join(ONNXRUNTIME_PRECISIONS)}, not {precision!r}.")
    require_module("onnxruntime", extra="onnxruntime", purpose="The engine 'onnxruntime'")
    started = time.perf_counter()
    path = cached_graph(net, onnxruntime_runner)
    if precision == "int8":
        path = quantized_graph(net, path, calibration)
    forward = low_resolution_forward(onnxruntime_runner(path, threads=threads))
    logger.info(f"engine onnxruntime, {precision}: ready after {time.perf_counter() - started:.1f} s")
    return forward


def build_openvino(
    net: DeepLab, precision: str = "fp32", *, threads: int | None = None, calibration: CalibrationImages | None = None
) -> Forward:
    """Return the forward pass of `net` in OpenVINO; arguments and errors as of `build_onnxruntime`, and bf16 as a precision."""
    if precision not in OPENVINO_PRECISIONS:
        raise UsageError(f"The engine 'openvino' runs {', '.join(OPENVINO_PRECISIONS)}, not {precision!r}.")
    require_module("openvino", extra="openvino", purpose="The engine 'openvino'")
    started = time.perf_counter()
    path = cached_graph(net, openvino_runner)
    if precision == "int8":
        path = quantized_model(net, path, calibration)
    forward = low_resolution_forward(openvino_runner(path, threads=threads, precision=precision))
    logger.info(f"engine openvino, {precision}: ready after {time.perf_counter() - started:.1f} s")
    return forward


def low_resolution_forward(run: Runner) -> Forward:
    """Return the torch function of a runner whose graph gives low-resolution logits B x h x w x classes."""

    def forward(image_BCHW: torch.Tensor) -> torch.Tensor:
        image = image_BCHW.detach().to("cpu", torch.float32).contiguous()
        return torch.from_numpy(run(image.numpy())).permute(0, 3, 1, 2)

    return forward


class SizeSpecializedRunner:
    """Runs every size in a graph with dynamic shapes, and from its second image on in a graph of that fixed size.

    Both runtimes run fixed sizes 5 to 10 % faster. Any number of threads may call, if the runners allow it.

    Args:
        open_graph: Returns a runner: for all sizes if its argument is None, else for exactly that shape B x C x H x W.
    """

    def __init__(self, open_graph: Callable[[tuple[int, ...] | None], Runner]) -> None:
        self._open_graph = open_graph
        self._any_size = open_graph(None)
        self._last: tuple[int, ...] | None = None
        self._specialized: OrderedDict[tuple[int, ...], Runner] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, image_BCHW: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
        """Return the graph's output for one batch."""
        return self._runner_for(image_BCHW.shape)(image_BCHW)

    def _runner_for(self, shape: tuple[int, ...]) -> Runner:
        with self._lock:
            if shape in self._specialized:
                self._specialized.move_to_end(shape)
            elif shape == self._last:
                self._specialized[shape] = self._open_graph(shape)
                if len(self._specialized) > _MAX_SPECIALIZED:
                    self._specialized.popitem(last=False)
            self._last = shape
            return self._specialized.get(shape, self._any_size)


def onnxruntime_runner(model: Path | bytes, *, threads: int | None = None) -> Runner:
    """Open a graph in ONNX Runtime on the CPU; returns a function from the array `image` to the first output.

    Denormal numbers are flushed to zero: an untrained MobileViT has so many that it would run twelve times slower. ONNX Runtime
    leaves this setting in the thread that opens a graph; `flush_denormals` restores it.
    """
    ort = require_module("onnxruntime", extra="onnxruntime", purpose="Running ONNX")
    source: Any = model if isinstance(model, bytes) else str(model)

    def open_graph(shape: tuple[int, ...] | None) -> Runner:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        if shape is not None:
            for axis, length in zip(("batch", "height", "width"), (shape[0], *shape[2:]), strict=True):
                options.add_free_dimension_override_by_name(axis, length)
        with flush_denormals():
            session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

        def run(image: Any) -> Any:
            with flush_denormals():
                return session.run(None, {"image": image})[0]

        return run

    return SizeSpecializedRunner(open_graph)


def openvino_runner(model: Path | bytes, *, threads: int | None = None, precision: str = "fp32") -> Runner:
    """Compile a graph with OpenVINO for the CPU; returns a function from the array `image` to a copy of the first output."""
    ov = require_module("openvino", extra="openvino", purpose="Running OpenVINO")
    core: Any = ov.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[precision],
        "CPU_DENORMALS_OPTIMIZATION": True,
    }

    def open_graph(shape: tuple[int, ...] | None) -> Runner:
        graph = core.read_model(model if isinstance(model, bytes) else str(model))
        if shape is not None:
            graph.reshape(list(shape))
        with flush_denormals():
            request = core.compile_model(graph, "CPU", settings).create_infer_request()
        lock = threading.Lock()  # a request takes one image at a time and refuses others; all cores work on that one

        def run(image: Any) -> Any:
            with lock, flush_denormals():
                return request.infer({0: image})[0].copy()

        return run

    return SizeSpecializedRunner(open_graph)
