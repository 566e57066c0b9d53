"""What the machine can do at best, and what a network asks of it: two numbers that say how far a speed is from the limit."""

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_SIDE = 1536
"""Of the square matrices: large enough that all of it is arithmetic."""
_SIDE_GPU = 8192
_SIDE_CONV = 48
"""Of the map on which the same product is done as a 1x1 convolution: 48 x 48 cells, 1536 channels."""
_REPEATS = 7


def gemm_peak(device: torch.device, threads: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the giga floating-point operations a second of a large matrix product: the median of some.

    On a CPU with so many threads (torch's number is given back), and the better of torch's two libraries: its matrix product
    (MKL, which is slow on other makers' processors) and the same as a 1x1 convolution (oneDNN). On a GPU `threads` does not
    matter.
    """
    side = _SIDE_GPU if device.type == "cuda" else _SIDE
    left, right = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    products: list[tuple[float, Callable[[], object]]] = [(2 * side**3, lambda: left @ right)]
    if device.type == "cpu":
        image = torch.rand(1, side, _SIDE_CONV, _SIDE_CONV, dtype=dtype).contiguous(memory_format=torch.channels_last)
        products.append((2 * side**2 * _SIDE_CONV**2, lambda: F.conv2d(image, left[:, :, None, None])))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return max(flop / _median_seconds(product, device) for flop, product in products) / 1e9
    finally:
        torch.set_num_threads(before)


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


def _median_seconds(product: Callable[[], object], device: torch.device) -> float:
    seconds = []
    with torch.inference_mode():
        for _ in range(_REPEATS + 1):
            begun = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])
