"""Depthwise 3x3 convolutions at large rates, tap by tap: oneDNN's fast kernel ends where the padding gets wide.

At output stride 16 a map of a 512-pixel photo is 32 cells wide, so at rate 36 all taps but the centre one lie on padding, and
at rate 12 four in nine products are with zeros. Each tap is one scaled addition over the cells where it lies on the map.
"""

import itertools

import torch

_LEAST_RATE = 12
_LEAST_CHANNELS = 1024
"""Below either, oneDNN was as fast or faster on the processor where this was measured (AVX-512, 32 to 65 cells a side)."""


def goes_by_taps(channels: int, kernel: tuple[int, int], stride: tuple[int, int], rate: tuple[int, int]) -> bool:
    """Whether a depthwise convolution is one of those that are faster tap by tap."""
    return (
        kernel == (3, 3) and stride == (1, 1) and rate[0] == rate[1] and rate[0] >= _LEAST_RATE and channels >= _LEAST_CHANNELS
    )


def convolve_by_taps(x_BCHW: torch.Tensor, weight_C133: torch.Tensor, bias_C: torch.Tensor | None, rate: int) -> torch.Tensor:
    """Return the depthwise convolution with zeros around, of the input's size and type; summed in float32, channels_last."""
    x = x_BCHW.contiguous(memory_format=torch.channels_last).float()
    taps_33C11 = weight_C133.float().permute(2, 3, 0, 1)[..., None].contiguous()
    out = x * taps_33C11[1, 1]
    if bias_C is not None:
        out += bias_C.float()[:, None, None]
    for row, column in itertools.product(range(3), repeat=2):
        (into_rows, from_rows), (into_columns, from_columns) = (
            _overlap(size, rate * (tap - 1)) for size, tap in zip(x.shape[-2:], (row, column), strict=True)
        )
        if (row, column) != (1, 1) and into_rows.stop > into_rows.start and into_columns.stop > into_columns.start:
            out[:, :, into_rows, into_columns].addcmul_(x[:, :, from_rows, from_columns], taps_33C11[row, column])
    return out.to(x_BCHW.dtype)


def _overlap(size: int, offset: int) -> tuple[slice, slice]:
    """Return the cells whose neighbour at `offset` lies on the map, and those neighbours."""
    start, stop = max(0, -offset), size - max(0, offset)
    return slice(start, stop), slice(start + offset, stop + offset)
