"""Mixed precision where the device gains from it, and nowhere else without being asked."""

import torch

from deeplabzoo.errors import UsageError
from deeplabzoo.say import say


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the type of the forward pass's products on this device, or None for plain float32.

    `auto` is bf16 on GPUs that compute it natively, fp16 on older ones, and off on CPUs and Apple GPUs. bf16 on a CPU is done
    when asked for, and said: without special instructions it is several times slower. Raises UsageError for fp16 on a CPU.
    """
    if amp == "off" or (amp == "auto" and device.type != "cuda"):
        return None
    if amp == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and amp == "fp16":
        raise UsageError("fp16 trains on GPUs only; on this CPU use amp=off.")
    if device.type == "cpu":
        say("amp: bf16 on a CPU, as asked; without AMX or AVX512-BF16 it is slower than amp=off")
    return torch.bfloat16 if amp == "bf16" else torch.float16


def gradient_scaler(dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler that keeps small fp16 gradients from vanishing; it does nothing in other types."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
