"""What the machine can do at best, and what a network asks of it: two numbers that say how far a speed is from the limit."""

import os
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_SIDE = 1536
"""Of the square matrices: large enough that all of it is arithmetic."""
_SIDE_GPU = 8192
_REPEATS = 7


def gemm_peak(device: torch.device, threads: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the giga floating-point operations a second of a large matrix product: the median of some.

    On a CPU with so many threads (torch's number is given back); on a GPU `threads` does not matter.
    """
    side = _SIDE_GPU if device.type == "cuda" else _SIDE
    left, right = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = [_seconds(left, right, device) for _ in range(_REPEATS + 1)][1:]
    finally:
        torch.set_num_threads(before)
    return 2 * side**3 / statistics.median(seconds) / 1e9


def gemm_peaks(device: torch.device, threads: int) -> dict[str, float]:
    """Return the float32 peak by number of threads: one, and as many as are used."""
    counts = {1, threads} if device.type == "cpu" else {threads}
    return {str(count): round(gemm_peak(device, count), 1) for count in sorted(counts) if count <= (os.cpu_count() or count)}


@torch.no_grad()
def gflop_of(net: nn.Module, image_BCHW: torch.Tensor) -> float:
    """Return giga floating-point operations of one forward pass (a multiply and an add are two), as torch counts them.

    Dense: taps of atrous convolutions that lie on padding are counted though a good kernel leaves them out.
    """
    with FlopCounterMode(display=False) as counter:
        net(image_BCHW)
    return float(counter.get_total_flops()) / 1e9


def _seconds(left: torch.Tensor, right: torch.Tensor, device: torch.device) -> float:
    begun = time.perf_counter()
    left @ right
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
