"""Denormal numbers as zero, for as long as it is wanted: a processor's switch that code after it must not inherit."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_SMALLEST = np.float64(5e-324)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Let denormals be zero in this thread, and in worker threads that start inside; afterwards it is as it was before.

    Untrained weights make denormals, and whoever meets more of them would be slowed down many times over.
    """
    flushed_before = not bool(_SMALLEST * 1.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed_before)
