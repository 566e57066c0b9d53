"""torch's own kernels under our inference form: ready in a fraction of a second, for every size and device."""

import time
from collections.abc import Callable

import torch

from deeplabzoo.errors import UsageError
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.cpu_runtime import keep_freed_memory
from deeplabzoo.optimization.fused_model import FusedModel, build_fused_model
from deeplabzoo.optimization.onednn import prepack

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(net: DeepLab, precision: str = "fp32") -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from a normalize_images float image B x C x H x W to float32 low-resolution logits B x classes x h x w.

    It runs on the device that the network is on, in inference mode. Raises UsageError for a precision that this hardware has
    not or would only emulate.
    """
    started = time.perf_counter()
    device = next(net.parameters()).device
    dtype = require_precision("torch", precision, device)
    with torch.inference_mode():
        form = build_fused_model(net).to(dtype)
        if device.type == "cpu":
            prepack(form)
            keep_freed_memory()
    logger.info(f"engine torch, {precision}: ready after {1000 * (time.perf_counter() - started):.0f} ms")
    return wrap_forward(form, device, dtype)


def wrap_forward(
    form: FusedModel | Callable[[torch.Tensor], torch.Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `form` with its input brought to its device and precision, and its logits to float32."""

    def forward(image_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = form(image_BCHW.to(device, dtype))
            return logits.float()

    return forward


def require_precision(engine: str, precision: str, device: torch.device) -> torch.dtype:
    """Return torch's type for a precision; raises UsageError where it would be no faster than float32, or does not exist."""
    if precision not in PRECISIONS:
        raise UsageError(f"The engine '{engine}' runs {', '.join(PRECISIONS)}, not {precision!r}.")
    if device.type == "cpu" and precision == "fp16":
        raise UsageError("fp16 is no faster than fp32 on a processor; take precision='bf16' where it has it, or 'fp32'.")
    if device.type == "cpu" and precision == "bf16" and not _processor_has_bf16():
        raise UsageError("This processor has no bf16 arithmetic (AVX512-BF16 or AMX) and would only emulate it; use 'fp32'.")
    return PRECISIONS[precision]


def _processor_has_bf16() -> bool:
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)
