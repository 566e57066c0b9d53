"""Backends `torch` and `compiled`: the fused model run by torch's own kernels, eagerly or compiled by Inductor."""

import threading
import time
from collections.abc import Callable

import torch

from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.cpu_runtime import keep_freed_memory
from deeplabzoo.optimization.fused_model import FusedModel, build_fused_model
from deeplabzoo.optimization.onednn import prepack

Forward = Callable[[torch.Tensor], torch.Tensor]
"""Normalized float images B x C x H x W -> float32 low-resolution logits B x classes x h x w, in channels_last memory."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_torch(net: DeepLab, precision: str = "fp32") -> Forward:
    """Return the forward pass of the fused model on the device of `net`; ready in a fraction of a second, for every size.

    Raises:
        UsageError: The hardware lacks the precision or would only emulate it.
    """
    started = time.perf_counter()
    dtype = require_precision("torch", precision, net.device)
    with torch.inference_mode():
        fused = build_fused_model(net).to(dtype)
        if net.device.type == "cpu":
            prepack(fused)
            keep_freed_memory()
    logger.info(f"engine torch, {precision}: ready after {1000 * (time.perf_counter() - started):.0f} ms")
    return _with_casts(fused, net.device, dtype)


def build_compiled(net: DeepLab, precision: str = "fp32", *, size: tuple[int, int] | None = None) -> Forward:
    """Return the forward pass of the fused model, compiled by Inductor with constant weights: for many images of few sizes.

    Compilation needs a C++ compiler and takes half a minute to minutes in each process: Inductor caches kernels on disk, but no
    graph with weights. A second input size is compiled once more, with dynamic shapes.

    Args:
        net: The model.
        precision: fp32, bf16 or fp16.
        size: (height, width) of the image that it is compiled for before this returns; default: that of the preprocessing.

    Raises:
        UsageError: The hardware lacks the precision or would only emulate it.
        DeepLabZooError: The compiler fails, now or at a new size.
    """
    started = time.perf_counter()
    dtype = require_precision("compiled", precision, net.device)
    with torch.inference_mode():
        fused = build_fused_model(net).to(dtype)
    forward = _with_casts(_compile_frozen(fused), net.device, dtype)
    height, width = size or net.preprocessing.size
    _compile_now(forward, torch.zeros(1, net.config.in_chans, height, width))
    logger.info(f"engine compiled, {precision}: ready for {width} x {height} after {time.perf_counter() - started:.0f} s")
    seen = {(1, height, width)}

    def logging_forward(image_BCHW: torch.Tensor) -> torch.Tensor:
        batch, _, *sides = image_BCHW.shape
        if (batch, *sides) not in seen:
            if len(seen) == 1:
                logger.info(f"engine compiled: new size {batch} x {sides[1]} x {sides[0]}; compiling once more for all sizes")
            low_BCHW = _compile_now(forward, image_BCHW)
            seen.add((batch, sides[0], sides[1]))
            return low_BCHW
        return forward(image_BCHW)

    return logging_forward


def require_precision(engine: str, precision: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of a precision; raises UsageError where it does not exist or is no faster than float32."""
    if precision not in PRECISIONS:
        raise UsageError(f"The engine '{engine}' runs {', '.join(PRECISIONS)}, not {precision!r}.")
    if device.type == "cpu" and precision == "fp16":
        raise UsageError("fp16 is no faster than fp32 on a CPU; use precision='bf16' where the CPU has it, or 'fp32'.")
    if device.type == "cpu" and precision == "bf16" and not _cpu_has_bf16():
        raise UsageError("This CPU has no bf16 arithmetic (AVX512-BF16 or AMX) and would only emulate it; use 'fp32'.")
    return PRECISIONS[precision]


def _cpu_has_bf16() -> bool:
    # private in torch; absent in some versions
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def _with_casts(forward: FusedModel | Forward, device: torch.device, dtype: torch.dtype) -> Forward:
    def run(image_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = forward(image_BCHW.to(device, dtype))
            return logits.float()

    return run


def _compile_now(forward: Forward, image_BCHW: torch.Tensor) -> torch.Tensor:
    try:
        return forward(image_BCHW)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler stack raises errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        height, width = image_BCHW.shape[-2:]
        raise DeepLabZooError(
            f"The model could not be compiled for {width} x {height} ({reason}); use engine='torch'."
        ) from error


def _compile_frozen(fused: FusedModel) -> Forward:
    """Return the model compiled at its calls, with its weights as constants, which lets Inductor pack them for oneDNN.

    `freezing` is a global setting of Inductor, not an option of `torch.compile`: dynamo reads it before options apply.
    """
    import torch._inductor.config as inductor  # seconds, and only needed here

    compiled = torch.compile(fused)
    lock = threading.Lock()  # the setting is global: the first thread to leave would reset it for one that still compiles

    def forward(image_BCHW: torch.Tensor) -> torch.Tensor:
        with lock, inductor.patch(freezing=True):
            logits: torch.Tensor = compiled(image_BCHW)
            return logits

    return forward
