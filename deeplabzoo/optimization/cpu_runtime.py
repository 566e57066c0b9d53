"""CPU settings of the process: keep freed memory for the next call (glibc), and flush denormal floats to zero.

glibc returns large blocks to the kernel when they are freed, and the kernel clears every page when it is used again. For the
activations of a model that costs as much time as some convolutions.
"""

import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt (malloc.h)."""
_MAX_INT32 = 2**31 - 1
_MMAP_THRESHOLD_BYTES = 32 * 2**20
"""The largest value that glibc accepts. Larger blocks still get their own mapping, where huge pages make clearing cheap."""
KEEP_MEMORY_VARIABLE = "DEEPLABZOO_KEEP_MEMORY"
"""Environment variable; 0 leaves the allocator of the process unchanged."""


@functools.cache
def keep_freed_memory() -> bool:
    """Set glibc's allocator to keep freed blocks of up to 32 MB in the process.

    The setting applies to the whole process, from the first optimized model or training run on: its memory does not shrink
    between calls. On other C libraries, or with DEEPLABZOO_KEEP_MEMORY=0, nothing is changed.

    Returns:
        Whether the allocator was set.
    """
    if os.environ.get(KEEP_MEMORY_VARIABLE) == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt  # of the C library that is already loaded; Python has no binding for it
    return bool(mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _MAX_INT32))


_SMALLEST_DENORMAL = np.float64(5e-324)


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Flush denormals to zero inside the context, in this thread and in threads started there; then restore the setting.

    Random weights produce denormals, with which CPUs compute many times slower.
    """
    flushed_before = not bool(_SMALLEST_DENORMAL * 1.0)  # torch has no getter for this CPU flag
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed_before)
