"""Where bilinear interpolation reads: for every output row or column the two source ones, and their weights.

The positions are computed in float32 with torch's own formula, so that the weights equal torch's bit by bit on the CPU. Rows
are interpolated first, on the small map, and columns last; every path to labels does the same operations in this order.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class InterpolationAxis:
    """One direction of an upsampling (or downsampling): output n lies between source `above[n]` and the one after it."""

    source: int
    above: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    """Weight of the later of the two, 0...1; beyond the last source place there is nothing, so its weight does not matter."""
    starts: npt.NDArray[np.int32]
    """Outputs `starts[i]` to `starts[i + 1]` have `above` equal to i."""

    def cut(self, size: int) -> "InterpolationAxis":
        """Return the first `size` outputs."""
        return InterpolationAxis(self.source, self.above[:size], self.weights[:size], np.minimum(self.starts, np.int32(size)))


@functools.lru_cache(maxsize=64)
def interpolation_axis(source: int, target: int, align_corners: bool) -> InterpolationAxis:
    """Return how `source` places are interpolated to `target` ones."""
    output = np.arange(target, dtype=np.float32)
    if align_corners:
        position = output * (np.float32(source - 1) / np.float32(max(target - 1, 1)))
    else:
        position = np.maximum(
            np.float32(source) / np.float32(target) * (output + np.float32(0.5)) - np.float32(0.5), np.float32(0)
        )
    above = np.minimum(position.astype(np.int32), np.int32(source - 1))
    weights = np.clip(position - above.astype(np.float32), 0, 1).astype(np.float32)
    return InterpolationAxis(source, above, weights, np.searchsorted(above, np.arange(source + 1)).astype(np.int32))


def axis_at(positions: npt.NDArray[np.float64], source: int) -> InterpolationAxis:
    """Return how `source` places are interpolated at any ascending positions from 0 on, in units of places."""
    above = np.minimum(positions.astype(np.int32), np.int32(source - 1))
    starts = np.searchsorted(above, np.arange(source + 1)).astype(np.int32)
    return InterpolationAxis(source, above, (positions - above).astype(np.float32), starts)


def interpolate(x: torch.Tensor, axis: InterpolationAxis, dim: int) -> torch.Tensor:
    """Return `x`, whose dimension `dim` has `axis.source` places, interpolated linearly along that dimension."""
    above = torch.from_numpy(axis.above).long()
    below = (above + 1).clamp_(max=axis.source - 1)
    weight = torch.from_numpy(axis.weights).to(x.device).view(-1, *[1] * (x.ndim - 1 - dim))
    before = x.index_select(dim, above.to(x.device))
    after = x.index_select(dim, below.to(x.device))
    return before.mul_(1 - weight).add_(after.mul_(weight))


def interpolate_rows(x_1CHW: torch.Tensor, rows: InterpolationAxis) -> torch.Tensor:
    """Interpolate vertically: 1 x C x h x w -> 1 x C x H x w."""
    return interpolate(x_1CHW, rows, 2)


def upsample_rows(x_BCHW: torch.Tensor, size_hw: tuple[int, int], rows: slice, *, align_corners: bool) -> torch.Tensor:
    """Return `rows` of the map interpolated to `size_hw`, B x C x rows x W, of its type, in channels_last memory."""
    height, width = size_hw
    down = interpolation_axis(x_BCHW.shape[2], height, align_corners)
    above, weights = torch.from_numpy(down.above[rows]).long(), torch.from_numpy(down.weights[rows])
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    upper = x_BHWC.index_select(1, above)
    lower = x_BHWC.index_select(1, (above + 1).clamp_(max=down.source - 1))
    lerped_BCHW = torch.lerp(upper, lower, weights[:, None, None].to(x_BCHW.dtype)).permute(0, 3, 1, 2)
    return F.interpolate(lerped_BCHW, size=(len(above), width), mode="bilinear", align_corners=align_corners)
