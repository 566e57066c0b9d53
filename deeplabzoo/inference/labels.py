"""From the head's small logits to the photo's own pixels: one upsampling, as logits or, in bands, as labels.

A photo reaches the network resized, possibly mirrored, and padded at the bottom and right. `Grid` remembers that, and the
way back undoes it: upsample to the network's input as the network itself would, drop the padding, mirror back, and resize
to the photo if it was resized before.

Bilinear interpolation is separable, so the rows are done first, on the small map, and the columns last. Any band of rows can
therefore be computed alone, and because each output value is made by the same operations on the same numbers, labels made in
bands equal the argmax of the whole logits exactly. A photo of 24 megapixels and 21 classes would need 2 GB of logits; its
labels need 16 MB at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deeplabzoo.data.images import Labels

BAND_VALUES = 2**22
"""Upsampled logits held at once while labels are made (float32: 16 MB, which allocators reuse without asking the system)."""


@dataclass(frozen=True)
class Grid:
    """Where the network's output lies in the photo; sizes are (height, width) in pixels."""

    padded_hw: tuple[int, int]
    valid_hw: tuple[int, int]
    original_hw: tuple[int, int]
    align_corners: bool
    """How the network upsamples; the resize from `valid_hw` to `original_hw` always maps pixel areas (align_corners False)."""
    flipped: bool = False


def upsampled_logits(low_1CHW: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return float32 logits at the photo's own size, 1 x classes x H x W."""
    return _columns(_rows(low_1CHW.float(), grid), grid)


def labels_in_bands(low_1CHW: torch.Tensor, grid: Grid, *, band_values: int = BAND_VALUES) -> Labels:
    """Return the class with the largest logit for every pixel of the photo (the first of equal ones), H x W.

    uint8, or uint16 above 256 classes. Memory is bounded by `band_values` whatever the photo's size.
    """
    height, width = grid.original_hw
    classes = low_1CHW.shape[1]
    rows_1CHW = _rows(low_1CHW.float(), grid)
    labels_HW = np.empty((height, width), np.uint8 if classes <= 256 else np.uint16)
    step = max(1, band_values // (classes * max(width, grid.padded_hw[1])))
    for top in range(0, height, step):
        band_1CHW = _columns(rows_1CHW[:, :, top : top + step], grid)
        labels_HW[top : top + step] = band_1CHW.max(dim=1).indices[0].cpu().numpy()
    return labels_HW


@dataclass(frozen=True)
class ClassArea:
    """How much of a photo one class covers; `share` is in 0...1."""

    index: int
    name: str
    pixels: int
    share: float


def class_areas(labels_HW: Labels, classes: Sequence[str]) -> list[ClassArea]:
    """Return the classes that occur, largest area first (equal ones in class order)."""
    counts = np.zeros(len(classes), np.int64)
    for row in labels_HW:  # by row, as bincount makes 64-bit copies
        counts += np.bincount(row, minlength=len(classes))
    found = sorted(np.flatnonzero(counts).tolist(), key=lambda index: -int(counts[index]))
    return [ClassArea(index, classes[index], int(counts[index]), int(counts[index]) / labels_HW.size) for index in found]


def _rows(low_1CHW: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Interpolate vertically: 1 x C x h x w -> 1 x C x H x w, still as narrow as the head's output."""
    x = _lerp_rows(low_1CHW, grid.padded_hw[0], grid.align_corners)[:, :, : grid.valid_hw[0]]
    return x if grid.valid_hw[0] == grid.original_hw[0] else _lerp_rows(x, grid.original_hw[0], align_corners=False)


def _lerp_rows(x_1CHW: torch.Tensor, height: int, align_corners: bool) -> torch.Tensor:
    source = x_1CHW.shape[2]
    position = torch.arange(height, dtype=torch.float64)
    if align_corners:
        position *= (source - 1) / max(height - 1, 1)
    else:
        position = ((position + 0.5) * (source / height) - 0.5).clamp_(min=0)
    above = position.long().clamp_(max=source - 1)
    below = (above + 1).clamp_(max=source - 1)
    weight_H1 = (position - above)[:, None].to(torch.float32).to(x_1CHW.device)
    upper = x_1CHW.index_select(2, above.to(x_1CHW.device))
    lower = x_1CHW.index_select(2, below.to(x_1CHW.device))
    return upper.mul_(1 - weight_H1).add_(lower.mul_(weight_H1))


def _columns(rows_1CHW: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Interpolate horizontally, crop the padding and mirror back: 1 x C x H x w -> 1 x C x H x W."""
    x_CHW = F.interpolate(rows_1CHW[0], size=grid.padded_hw[1], mode="linear", align_corners=grid.align_corners)
    x_CHW = x_CHW[:, :, : grid.valid_hw[1]]
    if grid.flipped:
        x_CHW = x_CHW.flip(2)
    if grid.valid_hw[1] != grid.original_hw[1]:
        x_CHW = F.interpolate(x_CHW, size=grid.original_hw[1], mode="linear", align_corners=False)
    return x_CHW[None]
