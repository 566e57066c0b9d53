"""From the head's low-resolution logits to labels, confidence and probabilities at the image's own size.

An image reaches the model resized, possibly mirrored, and padded at the bottom and right. `OutputGeometry` records that, and
postprocessing undoes it: upsample to the model's input size as the model itself would, crop the padding, mirror back, and
resize to the image's size if the image was resized before.

Labels need no full-size logits. A single upsampling is fused with the arg-max: cells whose four corners agree are filled, and
only the others are interpolated (compiled loops in `postprocessing_numba`, or `upsample_argmax_by_boundary` with torch alone).
Two upsamplings in a row, non-finite logits, confidence and probabilities are computed in bands of rows: interpolation is
separable, so the rows are interpolated first, on the small map, and any band can be computed alone. An image of 24 megapixels
with 21 classes would need 2 GB of logits; its labels need 16 MB at a time.

Labels equal the arg-max of torch's interpolation except where two classes lie within rounding of each other (a few units in
the last place of the largest logit). Equal logits give the first class; NaN counts as largest, as in torch.argmax.

A model with one output channel is binary: its channel is the logit of a sigmoid. `class_logits` turns it into two classes,
background with logit 0 and foreground, so softmax and arg-max of the two are the sigmoid and its threshold of one half.
"""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from deeplabzoo import numba_jit
from deeplabzoo.data.image_io import Labels
from deeplabzoo.errors import UsageError
from deeplabzoo.models.interpolation import InterpolationAxis, interpolate_rows, interpolation_axis

MAX_BOUNDARY_FRACTION = 0.25
"""Share of boundary cells above which interpolating every pixel is cheaper than gathering single pixels (measured on noise)."""


def upsample_argmax_by_boundary(
    low_BCHW: torch.Tensor, rows: InterpolationAxis, columns: InterpolationAxis, labels_BHW: torch.Tensor, band_values: int
) -> bool:
    """Write the arg-max of every upsampled pixel with torch operations alone, on any device.

    Does with whole tensors what `postprocessing_numba` does pixel by pixel; see there why the result is exact.

    Args:
        low_BCHW: Logits, float32, on the device of the labels.
        rows: Interpolation of the rows.
        columns: Interpolation of the columns.
        labels_BHW: Labels, overwritten.
        band_values: Largest number of float32 values in each of five temporary tensors.

    Returns:
        False, with nothing written, where the logits are not finite or too many cells are boundary cells.
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
    """Return each cell's next neighbour along `dim`; the last cell is its own neighbour."""
    last = x_Bhw.shape[dim] - 1
    return torch.cat([x_Bhw.narrow(dim, 1, last), x_Bhw.narrow(dim, last, 1)], dim)


BAND_VALUES = 2**22
"""Upsampled logits held at once (float32: 16 MB, a block that allocators keep and reuse)."""
COMPILE_AFTER_PIXELS = 2**24
"""Pixels labelled by torch in this process before numba is loaded, which takes longer than 64 images of 513 x 513 pixels."""

Confidence = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""A probability for each pixel, float32 in 0...1, H x W."""

PixelCounts = np.ndarray[Any, np.dtype[np.int64]]
"""Pixels of each class, int64, by class number."""

_pixels_without_numba = 0


@dataclass(frozen=True)
class OutputGeometry:
    """Where the model's output lies in the image; sizes are (height, width) in pixels."""

    padded_hw: tuple[int, int]
    """Size of the model's input."""
    valid_hw: tuple[int, int]
    """Size of the resized image inside the model's input, from the top left corner."""
    original_hw: tuple[int, int]
    """Size of the image itself."""
    align_corners: bool
    """How the model upsamples; the resize from `valid_hw` to `original_hw` always uses align_corners=False."""
    flipped: bool = False
    """Whether the model saw the image mirrored left to right."""


def upsampled_logits(low_1CHW: torch.Tensor, grid: OutputGeometry) -> torch.Tensor:
    """Return logits at the image's own size, 1 x classes x H x W float32, of low-resolution logits 1 x classes x h x w."""
    return _upsample_columns(_upsample_rows(low_1CHW.float(), grid), grid)


def logit_bands(low_1CHW: torch.Tensor, grid: OutputGeometry) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first row, row after the last, logits 1 x C x rows x W) of the image's own size, in bands of bounded memory."""
    rows_1CHW = _upsample_rows(low_1CHW.detach().float(), grid)
    for top, bottom in _row_bands(low_1CHW.shape[1], grid):
        yield top, bottom, _upsample_columns(rows_1CHW[:, :, top:bottom], grid)


def argmax_labels(low_1CHW: torch.Tensor, grid: OutputGeometry) -> Labels:
    """Return the class with the largest logit for every pixel of the image (the first of equal ones).

    Args:
        low_1CHW: Low-resolution logits, 1 x classes x h x w, of any float type and device.
        grid: Where they lie in the image.

    Returns:
        Labels, H x W: uint8, or uint16 above 256 classes.
    """
    return _as_array(_upsample_argmax(low_1CHW, grid)[0])


def argmax_labels_with_confidence(low_1CHW: torch.Tensor, grid: OutputGeometry) -> tuple[Labels, Confidence]:
    """Return labels and the probability of each label: the softmax of the full-size logits at that class.

    Every class is interpolated at every pixel, so this takes as long as plain upsampling, in bounded memory.

    Args:
        low_1CHW: Low-resolution logits, 1 x classes x h x w.
        grid: Where they lie in the image.

    Returns:
        Labels as `argmax_labels` returns them, and confidence, H x W float32 in 0...1.
    """
    labels_HW = _empty(grid.original_hw, low_1CHW)
    confidence_HW = torch.empty(grid.original_hw, device=low_1CHW.device)
    rows_1CHW = _upsample_rows(low_1CHW.detach().float(), grid)
    for top, bottom in _row_bands(low_1CHW.shape[1], grid):
        band_CHW = _upsample_columns(rows_1CHW[:, :, top:bottom], grid)[0]
        largest_HW, labels_HW[top:bottom] = band_CHW.max(dim=0)
        confidence_HW[top:bottom] = band_CHW.sub_(largest_HW).exp_().sum(dim=0).reciprocal_()
    return _as_array(labels_HW), confidence_HW.cpu().numpy()


def class_probability(low_1CHW: torch.Tensor, grid: OutputGeometry, label: int) -> Confidence:
    """Return the probability of one class at every pixel, in bounded memory.

    Args:
        low_1CHW: Low-resolution logits, 1 x classes x h x w.
        grid: Where they lie in the image.
        label: Class number.

    Returns:
        Softmax of the full-size logits at that class, H x W float32 in 0...1.
    """
    probability_HW = torch.empty(grid.original_hw, device=low_1CHW.device)
    rows_1CHW = _upsample_rows(low_1CHW.detach().float(), grid)
    for top, bottom in _row_bands(low_1CHW.shape[1], grid):
        probability_HW[top:bottom] = _upsample_columns(rows_1CHW[:, :, top:bottom], grid)[0].softmax(dim=0)[label]
    return probability_HW.cpu().numpy()


def class_logits(low_BCHW: torch.Tensor, num_classes: int | None = None) -> torch.Tensor:
    """Return logits with one channel per label: those of a one-channel (sigmoid) model become background and foreground.

    Args:
        low_BCHW: A model's output, B x channels x h x w.
        num_classes: Channels that the model's configuration names; None to accept any number.

    Returns:
        `low_BCHW` itself, or B x 2 x h x w with background's logit 0.

    Raises:
        UsageError: The output has another number of channels than the configuration says, as after replacing a layer by hand.
    """
    channels = low_BCHW.shape[1]
    if num_classes is not None and channels != num_classes:
        raise UsageError(
            f"The model's head gives {channels} channels, but its configuration and class names are those of {num_classes} "
            f"classes; replace the classifier with net.reset_classifier({channels}, classes=[...]), not by hand."
        )
    return torch.cat([torch.zeros_like(low_BCHW), low_BCHW], dim=1) if channels == 1 else low_BCHW


def upsample_argmax(low_BCHW: torch.Tensor, size_hw: tuple[int, int], *, align_corners: bool) -> torch.Tensor:
    """Return the labels of logits interpolated to a size, without computing those logits.

    Args:
        low_BCHW: Logits, B x classes x h x w, of any float type, device and memory layout; one channel counts as binary.
        size_hw: Height and width of the labels, in pixels; may be smaller than h x w.
        align_corners: As in torch.nn.functional.interpolate.

    Returns:
        Labels, B x H x W, on the same device: uint8, or int32 above 256 classes (few torch operations take uint16).

    Raises:
        UsageError: The tensor has another rank, or a size is below 1.
    """
    grid = _full_geometry(low_BCHW, size_hw, align_corners)
    return _upsample_argmax(class_logits(low_BCHW), grid)


def compile_postprocessing() -> bool:
    """Compile or load the numba loops now, and return whether numba is installed.

    The first call on a machine takes seconds; later processes read the compiled loops from numba's cache.
    """
    global _pixels_without_numba
    _pixels_without_numba = COMPILE_AFTER_PIXELS
    if numba_jit.numba_available():
        upsample_argmax(torch.zeros(1, 2, 2, 2), (3, 3), align_corners=False)
    return numba_jit.numba_available()


@dataclass(frozen=True)
class ClassArea:
    """How much of an image one class covers."""

    index: int
    """Class number."""
    name: str
    pixels: int
    share: float
    """Fraction of the image's pixels, 0...1."""


def class_areas(labels_HW: Labels, classes: Sequence[str]) -> list[ClassArea]:
    """Return the classes that occur in labels H x W, largest area first (equal areas in class order)."""
    return areas_from_counts(count_pixels(labels_HW, len(classes)), classes)


def count_pixels(labels_HW: Labels, num_classes: int) -> PixelCounts:
    """Return the number of pixels of each class, int64 of length `num_classes`, in labels H x W."""
    counts = np.zeros(num_classes, np.int64)
    for row in labels_HW:  # row by row, as bincount converts its input to 64 bits
        counts += np.bincount(row, minlength=num_classes)
    return counts


def areas_from_counts(counts: PixelCounts, classes: Sequence[str]) -> list[ClassArea]:
    """Return the classes with at least one of the pixels in `counts`, largest area first (equal areas in class order)."""
    total = int(counts.sum())
    found = sorted(np.flatnonzero(counts).tolist(), key=lambda index: -int(counts[index]))
    return [ClassArea(index, classes[index], int(counts[index]), int(counts[index]) / total) for index in found]


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
    """Write the labels, not yet mirrored back; return False, labels undefined, where the fused arg-max does not apply."""
    rows, columns = (
        interpolation_axis(small, padded, grid.align_corners).cut(valid)
        for small, padded, valid in zip(low_BCHW.shape[2:], grid.padded_hw, grid.valid_hw, strict=True)
    )
    if low_BCHW.device.type == "cpu" and _worth_compiling(labels_BHW.numel()) and numba_jit.numba_available():
        # imported here: the module compiles with numba, an optional package
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
    """Ranges of rows of the image whose logits are at most BAND_VALUES numbers, or one row."""
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
