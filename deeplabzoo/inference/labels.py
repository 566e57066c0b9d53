"""From the head's small logits to the photo's own pixels: one upsampling, as logits or, without them, as labels.

A photo reaches the network resized, possibly mirrored, and padded at the bottom and right. `Grid` remembers that, and the
way back undoes it: upsample to the network's input as the network itself would, drop the padding, mirror back, and resize
to the photo if it was resized before.

Labels need no full-size logits. One upsampling is fused with the arg-max: cells whose four corners agree are filled, and only
the others are interpolated (`cells`, compiled; `boundaries`, by torch alone). Two upsamplings in a row, logits that are not
finite, and confidence, for which every class counts, are made in bands of rows: interpolation is separable, so the rows are
done first, on the small map, and any band of them can be computed alone. A photo of 24 megapixels and 21 classes would need
2 GB of logits; its labels need 16 MB at a time.

Labels equal the arg-max of torch's interpolation but for pixels where two classes lie within rounding of each other (a few
units in the last place of the largest logit). Equal logits go to the first class; NaN counts as largest, as in torch.argmax.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deeplabzoo import jit
from deeplabzoo.data.images import Labels
from deeplabzoo.errors import UsageError
from deeplabzoo.inference.boundaries import labels_by_boundary
from deeplabzoo.models.bilinear import axis, lerp_rows

BAND_VALUES = 2**22
"""Upsampled logits held at once while labels are made (float32: 16 MB, which allocators reuse without asking the system)."""
COMPILE_AFTER_PIXELS = 2**24
"""Labels made by torch in this process before numba is loaded: it takes longer than a few photos do (64 at 513 x 513)."""

Confidence = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""Probability of each pixel's label, 0...1, H x W."""

_made_by_torch = 0


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


def labels_on_grid(low_1CHW: torch.Tensor, grid: Grid) -> Labels:
    """Return the class with the largest logit for every pixel of the photo (the first of equal ones), H x W.

    uint8, or uint16 above 256 classes.
    """
    return _as_array(_labels(low_1CHW, grid)[0])


def confidence_on_grid(low_1CHW: torch.Tensor, grid: Grid) -> tuple[Labels, Confidence]:
    """Return the labels and the probability of each, float32 H x W: the softmax of the photo-sized logits at that class.

    The probability needs every class at every pixel, so this takes as long as plain upsampling, in bounded memory.
    """
    labels_HW = _empty(grid.original_hw, low_1CHW)
    confidence_HW = torch.empty(grid.original_hw, device=low_1CHW.device)
    rows_1CHW = _rows(low_1CHW.detach().float(), grid)
    for top, bottom in _bands(low_1CHW.shape[1], grid):
        band_CHW = _columns(rows_1CHW[:, :, top:bottom], grid)[0]
        largest_HW, labels_HW[top:bottom] = band_CHW.max(dim=0)
        confidence_HW[top:bottom] = band_CHW.sub_(largest_HW).exp_().sum(dim=0).reciprocal_()
    return _as_array(labels_HW), confidence_HW.cpu().numpy()


def labels_of(low_BCHW: torch.Tensor, size_hw: tuple[int, int], *, align_corners: bool) -> torch.Tensor:
    """Return the arg-max of the logits interpolated to `size_hw`, B x H x W, on their device, without those logits.

    uint8, or int32 above 256 classes (torch can do next to nothing with uint16). Any float type and memory layout; the size
    may be smaller than the logits' own. Raises UsageError for a tensor of another rank or a size below 1.
    """
    return _labels(low_BCHW, _plain(low_BCHW, size_hw, align_corners))


def compile_labels() -> bool:
    """Load the compiled loops now, as for a long run, and return whether there are any; seconds once a machine, then less."""
    global _made_by_torch
    _made_by_torch = COMPILE_AFTER_PIXELS
    if jit.available():
        labels_of(torch.zeros(1, 2, 2, 2), (3, 3), align_corners=False)
    return jit.available()


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


def _plain(low_BCHW: torch.Tensor, size_hw: tuple[int, int], align_corners: bool) -> Grid:
    if low_BCHW.ndim != 4 or min(low_BCHW.shape[1:]) < 1 or min(size_hw) < 1:
        raise UsageError(
            f"Labels are made from logits of shape B x classes x h x w at a size of at least 1 x 1, not from "
            f"{tuple(low_BCHW.shape)} at {tuple(size_hw)}."
        )
    size = (int(size_hw[0]), int(size_hw[1]))
    return Grid(size, size, size, align_corners)


def _labels(low_BCHW: torch.Tensor, grid: Grid) -> torch.Tensor:
    low_BCHW = low_BCHW.detach().float()
    labels_BHW = _empty((low_BCHW.shape[0], *grid.original_hw), low_BCHW)
    if grid.valid_hw == grid.original_hw and _fused(low_BCHW, grid, labels_BHW):
        return labels_BHW.flip(2) if grid.flipped else labels_BHW
    for low_CHW, labels_HW in zip(low_BCHW, labels_BHW, strict=True):
        labels_HW.copy_(_banded(low_CHW[None], grid))
    return labels_BHW


def _banded(low_1CHW: torch.Tensor, grid: Grid) -> torch.Tensor:
    rows_1CHW = _rows(low_1CHW, grid)
    labels_HW = _empty(grid.original_hw, low_1CHW)
    for top, bottom in _bands(low_1CHW.shape[1], grid):
        labels_HW[top:bottom] = _columns(rows_1CHW[:, :, top:bottom], grid).max(dim=1).indices[0]
    return labels_HW


def _fused(low_BCHW: torch.Tensor, grid: Grid, labels_BHW: torch.Tensor) -> bool:
    """Write the labels, not yet mirrored back; return False if they cannot be had this way."""
    rows, columns = (
        axis(small, padded, grid.align_corners).cut(valid)
        for small, padded, valid in zip(low_BCHW.shape[2:], grid.padded_hw, grid.valid_hw, strict=True)
    )
    if low_BCHW.device.type == "cpu" and _worth_compiling(labels_BHW.numel()) and jit.available():
        blocks = importlib.import_module("deeplabzoo.inference.blocks")
        return bool(blocks.labels_by_block(low_BCHW, rows, columns, labels_BHW))
    return labels_by_boundary(low_BCHW, rows, columns, labels_BHW, BAND_VALUES)


def _worth_compiling(pixels: int) -> bool:
    global _made_by_torch
    if _made_by_torch >= COMPILE_AFTER_PIXELS:
        return True
    _made_by_torch += pixels
    return False


def _empty(shape: tuple[int, ...], low_BCHW: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8 if low_BCHW.shape[1] <= 256 else torch.int32, device=low_BCHW.device)


def _as_array(labels_HW: torch.Tensor) -> Labels:
    array_HW: Labels = labels_HW.cpu().numpy()
    return array_HW if array_HW.dtype == np.uint8 else array_HW.astype(np.uint16)


def _bands(classes: int, grid: Grid) -> list[tuple[int, int]]:
    """Ranges of rows of the photo whose logits are at most BAND_VALUES numbers, or one row."""
    height, width = grid.original_hw
    step = max(1, BAND_VALUES // (classes * max(width, grid.padded_hw[1])))
    return [(top, min(top + step, height)) for top in range(0, height, step)]


def _rows(low_1CHW: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Interpolate vertically: 1 x C x h x w -> 1 x C x H x w, still as narrow as the head's output."""
    x = lerp_rows(low_1CHW, axis(low_1CHW.shape[2], grid.padded_hw[0], grid.align_corners).cut(grid.valid_hw[0]))
    return x if grid.valid_hw[0] == grid.original_hw[0] else lerp_rows(x, axis(grid.valid_hw[0], grid.original_hw[0], False))


def _columns(rows_1CHW: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Interpolate horizontally, crop the padding and mirror back: 1 x C x H x w -> 1 x C x H x W."""
    x_CHW = F.interpolate(rows_1CHW[0], size=grid.padded_hw[1], mode="linear", align_corners=grid.align_corners)
    x_CHW = x_CHW[:, :, : grid.valid_hw[1]]
    if grid.flipped:
        x_CHW = x_CHW.flip(2)
    if grid.valid_hw[1] != grid.original_hw[1]:
        x_CHW = F.interpolate(x_CHW, size=grid.original_hw[1], mode="linear", align_corners=False)
    return x_CHW[None]
