"""Keep what a network frees for its next call: on Linux, giving it back to the system costs as much time as some convolutions.

glibc returns large blocks to the kernel at once, and the kernel clears each page anew when it is touched again.
"""

import ctypes
import functools
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of mallopt's parameters (malloc.h)."""
_NEVER = 2**31 - 1
_LARGEST_ON_THE_HEAP = 32 * 2**20
"""Bytes; the most that glibc accepts. Larger blocks are mapped by themselves, where huge pages make clearing cheap."""
SWITCH = "DEEPLABZOO_KEEP_MEMORY"
"""Environment variable; 0 leaves the process's allocator as it is."""


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks of up to 32 MB in the process; returns whether it did.

    It holds for the whole process, from the first optimised network or training run on: the process does not shrink between
    calls. Elsewhere than on glibc, or with DEEPLABZOO_KEEP_MEMORY=0, nothing is changed.
    """
    if os.environ.get(SWITCH) == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_ON_THE_HEAP)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
