"""Keep what a network frees for its next call: on Linux, giving it back to the system costs as much time as some convolutions.

glibc returns large blocks to the kernel at once, and the kernel clears each page anew when it is touched again.
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
"""Numbers of mallopt's parameters (malloc.h)."""
_MAX_INT32 = 2**31 - 1
_MMAP_THRESHOLD_BYTES = 32 * 2**20
"""Bytes; the most that glibc accepts. Larger blocks are mapped by themselves, where huge pages make clearing cheap."""
KEEP_MEMORY_VARIABLE = "DEEPLABZOO_KEEP_MEMORY"
"""Environment variable; 0 leaves the process's allocator as it is."""


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks of up to 32 MB in the process; returns whether it did.

    It holds for the whole process, from the first optimised network or training run on: the process does not shrink between
    calls. Elsewhere than on glibc, or with DEEPLABZOO_KEEP_MEMORY=0, nothing is changed.
    """
    if os.environ.get(KEEP_MEMORY_VARIABLE) == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _MAX_INT32))


# Denormal numbers as zero, for as long as it is wanted: a processor's switch that code after it must not inherit.


_SMALLEST_DENORMAL = np.float64(5e-324)


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Let denormals be zero in this thread, and in worker threads that start inside; afterwards it is as it was before.

    Untrained weights make denormals, and whoever meets more of them would be slowed down many times over.
    """
    flushed_before = not bool(_SMALLEST_DENORMAL * 1.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed_before)
