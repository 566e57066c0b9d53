"""Peak memory of a call above what was there before it: resident memory on a CPU, torch's allocations on a GPU."""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from deeplabzoo.errors import UsageError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_of(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return `loaded_mb` (before the call) and `peak_mb` (how far the call rose above it); libraries should run already.

    Freed memory is given back first, so that the call cannot hide in what loading left behind. Raises UsageError on a CPU
    under a system that does not say a process's peak.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return _megabytes(before, torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, AttributeError):  # glibc alone keeps what was freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident("VmRSS")
    _CLEAR.write_text(_RESET_PEAK)
    call()
    return _megabytes(before, _resident("VmHWM"))


def _megabytes(before: int, peak: int) -> dict[str, float]:
    return {"loaded_mb": before / 1e6, "peak_mb": (peak - before) / 1e6}


def _resident(field: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        raise UsageError("Peak memory is read from /proc/self/status, which only Linux has; leave --memory out.") from None
