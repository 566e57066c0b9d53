"""From the head's small logits to the photo's own pixels: one upsampling, as logits or, without them, as labels.

A photo reaches the network resized, possibly mirrored, and padded at the bottom and right. `OutputGeometry` remembers that, and the
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

from deeplabzoo import numba_jit
from deeplabzoo.data.image_io import Labels
from deeplabzoo.errors import UsageError
from deeplabzoo.models.interpolation import InterpolationAxis, interpolate_rows, interpolation_axis

# Labels from small logits by torch alone: fill the cells whose corners agree, interpolate only the pixels of the others.
#
# What `cells` does pixel by pixel in compiled loops is done here with whole tensors, on any device. See `cells` for why it is
# exact.


MAX_BOUNDARY_FRACTION = 0.25
"""Share of cells above which interpolating everything is cheaper than gathering single pixels (measured on noise)."""


def upsample_argmax_by_boundary(
    low_BCHW: torch.Tensor, rows: InterpolationAxis, columns: InterpolationAxis, labels_BHW: torch.Tensor, band_values: int
) -> bool:
    """Write the first largest class of every upsampled pixel; return False, nothing written, where that would not pay.

    `low_BCHW` holds float32 logits on the labels' device; if they are not finite, False is returned, too. At most about
    `band_values` float32 values are held at once, in each of five temporary tensors.
    """
    batch, classes, h, w = low_BCHW.shape
    device = low_BCHW.device
    winners_Bhw = low_BCHW.argmax(dim=1)
    right = _shifted(winners_Bhw, 2)
    boundary_Bhw = (winners_Bhw != right) | (winners_Bhw != _shifted(winners_Bhw, 1)) | (winners_Bhw != _shifted(right, 1))
    if not bool(low_BCHW.sum().isfinite() & (boundary_Bhw.float().mean() <= MAX_BOUNDARY_FRACTION)):
        return False
    winners_Bhw = winners_Bhw.to(labels_BHW.dtype)
    places_NC = low_BCHW.permute(0, 2, 3, 1).reshape(-1, classes)
    above_H, down_H = torch.from_numpy(rows.above).long().to(device), torch.from_numpy(rows.weights).to(device)
    left_W, along_W = torch.from_numpy(columns.above).long().to(device), torch.from_numpy(columns.weights).to(device)
    at_once = max(1, band_values // classes)
    step = max(1, at_once // max(1, batch * len(left_W)))
    for top in range(0, len(above_H), step):
        above = above_H[top : top + step]
        band_BHW = winners_Bhw[:, above][:, :, left_W]
        boundary_N3 = boundary_Bhw[:, above][:, :, left_W].nonzero()
        for start in range(0, len(boundary_N3), at_once):
            b, y, x = boundary_N3[start : start + at_once].unbind(1)
            i, j = above[y], left_W[x]
            under, beside = (i + 1).clamp_(max=h - 1), (j + 1).clamp_(max=w - 1)
            down, along = down_H[top + y, None], along_W[x, None]
            upper, lower = (b * h + i) * w, (b * h + under) * w
            left = places_NC[upper + j].mul_(1 - down).add_(places_NC[lower + j].mul_(down))
            other = places_NC[upper + beside].mul_(1 - down).add_(places_NC[lower + beside].mul_(down))
            band_BHW[b, y, x] = left.mul_(1 - along).add_(other.mul_(along)).argmax(dim=1).to(band_BHW.dtype)
        labels_BHW[:, top : top + step] = band_BHW
    return True


def _shifted(x_Bhw: torch.Tensor, dim: int) -> torch.Tensor:
    """Return every place's neighbour; the last one is its own."""
    last = x_Bhw.shape[dim] - 1
    return torch.cat([x_Bhw.narrow(dim, 1, last), x_Bhw.narrow(dim, last, 1)], dim)


BAND_VALUES = 2**22
"""Upsampled logits held at once while labels are made (float32: 16 MB, which allocators reuse without asking the system)."""
COMPILE_AFTER_PIXELS = 2**24
"""Labels made by torch in this process before numba is loaded: it takes longer than a few photos do (64 at 513 x 513)."""

Confidence = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""Probability of each pixel's label, 0...1, H x W."""

_pixels_without_numba = 0


@dataclass(frozen=True)
class OutputGeometry:
    """Where the network's output lies in the photo; sizes are (height, width) in pixels."""

    padded_hw: tuple[int, int]
    valid_hw: tuple[int, int]
    original_hw: tuple[int, int]
    align_corners: bool
    """How the network upsamples; the resize from `valid_hw` to `original_hw` always maps pixel areas (align_corners False)."""
    flipped: bool = False


def upsampled_logits(low_1CHW: torch.Tensor, grid: OutputGeometry) -> torch.Tensor:
    """Return float32 logits at the photo's own size, 1 x classes x H x W."""
    return _upsample_columns(_upsample_rows(low_1CHW.float(), grid), grid)


def argmax_labels(low_1CHW: torch.Tensor, grid: OutputGeometry) -> Labels:
    """Return the class with the largest logit for every pixel of the photo (the first of equal ones), H x W.

    uint8, or uint16 above 256 classes.
    """
    return _as_array(_upsample_argmax(low_1CHW, grid)[0])


def argmax_labels_with_confidence(low_1CHW: torch.Tensor, grid: OutputGeometry) -> tuple[Labels, Confidence]:
    """Return the labels and the probability of each, float32 H x W: the softmax of the photo-sized logits at that class.

    The probability needs every class at every pixel, so this takes as long as plain upsampling, in bounded memory.
    """
    labels_HW = _empty(grid.original_hw, low_1CHW)
    confidence_HW = torch.empty(grid.original_hw, device=low_1CHW.device)
    rows_1CHW = _upsample_rows(low_1CHW.detach().float(), grid)
    for top, bottom in _row_bands(low_1CHW.shape[1], grid):
        band_CHW = _upsample_columns(rows_1CHW[:, :, top:bottom], grid)[0]
        largest_HW, labels_HW[top:bottom] = band_CHW.max(dim=0)
        confidence_HW[top:bottom] = band_CHW.sub_(largest_HW).exp_().sum(dim=0).reciprocal_()
    return _as_array(labels_HW), confidence_HW.cpu().numpy()


def upsample_argmax(low_BCHW: torch.Tensor, size_hw: tuple[int, int], *, align_corners: bool) -> torch.Tensor:
    """Return the arg-max of the logits interpolated to `size_hw`, B x H x W, on their device, without those logits.

    uint8, or int32 above 256 classes (torch can do next to nothing with uint16). Any float type and memory layout; the size
    may be smaller than the logits' own. Raises UsageError for a tensor of another rank or a size below 1.
    """
    return _upsample_argmax(low_BCHW, _full_geometry(low_BCHW, size_hw, align_corners))


def compile_postprocessing() -> bool:
    """Load the compiled loops now, as for a long run, and return whether there are any; seconds once a machine, then less."""
    global _pixels_without_numba
    _pixels_without_numba = COMPILE_AFTER_PIXELS
    if numba_jit.numba_available():
        upsample_argmax(torch.zeros(1, 2, 2, 2), (3, 3), align_corners=False)
    return numba_jit.numba_available()


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


def _full_geometry(low_BCHW: torch.Tensor, size_hw: tuple[int, int], align_corners: bool) -> OutputGeometry:
    if low_BCHW.ndim != 4 or min(low_BCHW.shape[1:]) < 1 or min(size_hw) < 1:
        raise UsageError(
            f"Labels are made from logits of shape B x classes x h x w at a size of at least 1 x 1, not from "
            f"{tuple(low_BCHW.shape)} at {tuple(size_hw)}."
        )
    size = (int(size_hw[0]), int(size_hw[1]))
    return OutputGeometry(size, size, size, align_corners)


def _upsample_argmax(low_BCHW: torch.Tensor, grid: OutputGeometry) -> torch.Tensor:
    low_BCHW = low_BCHW.detach().float()
    labels_BHW = _empty((low_BCHW.shape[0], *grid.original_hw), low_BCHW)
    if grid.valid_hw == grid.original_hw and _fused_argmax(low_BCHW, grid, labels_BHW):
        return labels_BHW.flip(2) if grid.flipped else labels_BHW
    for low_CHW, labels_HW in zip(low_BCHW, labels_BHW, strict=True):
        labels_HW.copy_(_argmax_in_bands(low_CHW[None], grid))
    return labels_BHW


def _argmax_in_bands(low_1CHW: torch.Tensor, grid: OutputGeometry) -> torch.Tensor:
    rows_1CHW = _upsample_rows(low_1CHW, grid)
    labels_HW = _empty(grid.original_hw, low_1CHW)
    for top, bottom in _row_bands(low_1CHW.shape[1], grid):
        labels_HW[top:bottom] = _upsample_columns(rows_1CHW[:, :, top:bottom], grid).max(dim=1).indices[0]
    return labels_HW


def _fused_argmax(low_BCHW: torch.Tensor, grid: OutputGeometry, labels_BHW: torch.Tensor) -> bool:
    """Write the labels, not yet mirrored back; return False if they cannot be had this way."""
    rows, columns = (
        interpolation_axis(small, padded, grid.align_corners).cut(valid)
        for small, padded, valid in zip(low_BCHW.shape[2:], grid.padded_hw, grid.valid_hw, strict=True)
    )
    if low_BCHW.device.type == "cpu" and _worth_compiling(labels_BHW.numel()) and numba_jit.numba_available():
        blocks = importlib.import_module("deeplabzoo.processing.postprocessing_numba")
        return bool(blocks.upsample_argmax_by_block(low_BCHW, rows, columns, labels_BHW))
    return upsample_argmax_by_boundary(low_BCHW, rows, columns, labels_BHW, BAND_VALUES)


def _worth_compiling(pixels: int) -> bool:
    global _pixels_without_numba
    if _pixels_without_numba >= COMPILE_AFTER_PIXELS:
        return True
    _pixels_without_numba += pixels
    return False


def _empty(shape: tuple[int, ...], low_BCHW: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8 if low_BCHW.shape[1] <= 256 else torch.int32, device=low_BCHW.device)


def _as_array(labels_HW: torch.Tensor) -> Labels:
    array_HW: Labels = labels_HW.cpu().numpy()
    return array_HW if array_HW.dtype == np.uint8 else array_HW.astype(np.uint16)


def _row_bands(classes: int, grid: OutputGeometry) -> list[tuple[int, int]]:
    """Ranges of rows of the photo whose logits are at most BAND_VALUES numbers, or one row."""
    height, width = grid.original_hw
    step = max(1, BAND_VALUES // (classes * max(width, grid.padded_hw[1])))
    return [(top, min(top + step, height)) for top in range(0, height, step)]


def _upsample_rows(low_1CHW: torch.Tensor, grid: OutputGeometry) -> torch.Tensor:
    """Interpolate vertically: 1 x C x h x w -> 1 x C x H x w, still as narrow as the head's output."""
    x = interpolate_rows(
        low_1CHW, interpolation_axis(low_1CHW.shape[2], grid.padded_hw[0], grid.align_corners).cut(grid.valid_hw[0])
    )
    return (
        x
        if grid.valid_hw[0] == grid.original_hw[0]
        else interpolate_rows(x, interpolation_axis(grid.valid_hw[0], grid.original_hw[0], False))
    )


def _upsample_columns(rows_1CHW: torch.Tensor, grid: OutputGeometry) -> torch.Tensor:
    """Interpolate horizontally, crop the padding and mirror back: 1 x C x H x w -> 1 x C x H x W."""
    x_CHW = F.interpolate(rows_1CHW[0], size=grid.padded_hw[1], mode="linear", align_corners=grid.align_corners)
    x_CHW = x_CHW[:, :, : grid.valid_hw[1]]
    if grid.flipped:
        x_CHW = x_CHW.flip(2)
    if grid.valid_hw[1] != grid.original_hw[1]:
        x_CHW = F.interpolate(x_CHW, size=grid.original_hw[1], mode="linear", align_corners=False)
    return x_CHW[None]
