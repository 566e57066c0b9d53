"""ONNX Runtime's kernels under our label maps: one graph for every batch and size, kept on disk."""

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
from deeplabzoo.optimization.quantization import CalibrationImages, quantised_graph
from deeplabzoo.optional_imports import require_module

# A graph whose sizes are open, and a closed one for each size that comes back: engines plan those 5 to 10 % better.


_KEPT = 2
"""Closed graphs kept at a time; each may hold a copy of the weights."""


class SizeSpecializedRunner:
    """Runs every size at once, and from its second picture on in a graph that was made for that size alone.

    `open_graph(shape)` returns a runner: for any size where `shape` is None, else for exactly that B x C x H x W. Any number of
    threads may call at once, if the runners allow it.
    """

    def __init__(self, open_graph: Callable[[tuple[int, ...] | None], Runner]) -> None:
        self._open_graph = open_graph
        self._any_size = open_graph(None)
        self._last: tuple[int, ...] | None = None
        self._closed: OrderedDict[tuple[int, ...], Runner] = OrderedDict()
        self._choosing = threading.Lock()

    def __call__(self, image_BCHW: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
        """Return the graph's output for one batch."""
        return self._runner_for(image_BCHW.shape)(image_BCHW)

    def _runner_for(self, shape: tuple[int, ...]) -> Runner:
        with self._choosing:
            if shape in self._closed:
                self._closed.move_to_end(shape)
            elif shape == self._last:
                self._closed[shape] = self._open_graph(shape)
                if len(self._closed) > _KEPT:
                    self._closed.popitem(last=False)
            self._last = shape
            return self._closed.get(shape, self._any_size)


PRECISIONS = ("fp32", "int8")


def build(
    net: DeepLab, precision: str = "fp32", *, threads: int | None = None, calibration: CalibrationImages | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from a normalize_images float image B x C x H x W to float32 low-resolution logits B x classes x h x w.

    The logits lie in channels_last memory. `threads` is torch's own count unless given. `int8` needs `calibration`, real
    photos as `quantise.quantised_graph` takes them. Raises UsageError for a precision that it has not, DeepLabZooError where
    the library is missing or the graph does not compute what the network does.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"The engine 'onnxruntime' runs {' and '.join(PRECISIONS)}, not {precision!r}.")
    require_module("onnxruntime", extra="onnxruntime", purpose="The engine 'onnxruntime'")
    started = time.perf_counter()
    path = cached_graph(net, session_runner)
    if precision == "int8":
        path = quantised_graph(net, path, calibration)
    run = onnxruntime_forward(path, threads=threads)
    logger.info(f"engine onnxruntime, {precision}: ready after {time.perf_counter() - started:.1f} s")
    return run


def onnxruntime_forward(model: Path | bytes, *, threads: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function of `build` for a graph that is at hand."""
    run = session_runner(model, threads=threads)

    def forward(image_BCHW: torch.Tensor) -> torch.Tensor:
        image = image_BCHW.detach().to("cpu", torch.float32).contiguous()
        return torch.from_numpy(run(image.numpy())).permute(0, 3, 1, 2)

    return forward


def session_runner(model: Path | bytes, *, threads: int | None = None) -> Runner:
    """Open a graph in ONNX Runtime, on the CPU; the function returned maps the array `image` to the first output.

    Denormal numbers count as zero: an untrained MobileViT makes so many that it would run twelve times slower. ONNX Runtime
    leaves the thread that opens a graph so, which is undone.
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
