"""ONNX Runtime's kernels under our label maps: one graph for every batch and size, kept on disk."""

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
from deeplabzoo.inference.quantise import quantised_graph
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.say import say

PRECISIONS = ("fp32", "int8")


def build(
    net: DeepLab, precision: str = "fp32", *, threads: int | None = None, calibration: CalibrationImages | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from a normalised float image B x C x H x W to float32 low-resolution logits B x classes x h x w.

    The logits lie in channels_last memory. `threads` is torch's own count unless given. `int8` needs `calibration`, real
    photos as `quantise.quantised_graph` takes them. Raises UsageError for a precision that it has not, DeepLabZooError where
    the library is missing or the graph does not compute what the network does.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"The engine 'onnxruntime' runs {' and '.join(PRECISIONS)}, not {precision!r}.")
    require("onnxruntime", extra="onnxruntime", purpose="The engine 'onnxruntime'")
    started = time.perf_counter()
    path = cached_graph(net, session_runner)
    if precision == "int8":
        path = quantised_graph(net, path, calibration)
    run = low_resolution(path, threads=threads)
    say(f"engine onnxruntime, {precision}: ready after {time.perf_counter() - started:.1f} s")
    return run


def low_resolution(model: Path | bytes, *, threads: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
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
    ort = require("onnxruntime", extra="onnxruntime", purpose="Running ONNX")
    source: Any = model if isinstance(model, bytes) else str(model)

    def open_graph(shape: tuple[int, ...] | None) -> Runner:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        if shape is not None:
            for axis, length in zip(("batch", "height", "width"), (shape[0], *shape[2:]), strict=True):
                options.add_free_dimension_override_by_name(axis, length)
        with denormals_flushed():
            session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

        def run(image: Any) -> Any:
            with denormals_flushed():
                return session.run(None, {"image": image})[0]

        return run

    return BySize(open_graph)
