"""Large images in overlapping tiles: where tiles lie, how their logits are blended, and how blended logits become labels.

Tiles start at multiples of `UNIT` pixels, so the cells of their low-resolution logits lie on one common grid, the one that the
whole image would have. Logits are blended on that grid, before any upsampling: the weights across an overlap are half a cosine
and sum to one. Rows of the grid are labelled as soon as no later tile reaches them, so only one row of tiles is ever held.

A tile lacks context: the image-level branch of ASPP averages over the tile instead of the whole image, and an encoder sees
zeros beyond the tile's edge (docs/large_images.md measures what that changes).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.errors import UsageError
from deeplabzoo.inference.large_image import ResizedRowReader, RowReader
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.models.interpolation import axis_at, interpolate
from deeplabzoo.processing.postprocessing import OutputGeometry, argmax_labels
from deeplabzoo.processing.preprocessing import prepare, resized_hw

UNIT = 32
"""Tiles start at multiples of it: the largest output stride, so the grid of every stride continues from tile to tile."""

TILE = 768
OVERLAP = 192
"""Default side of a tile and overlap of neighbouring tiles in pixels; docs/large_images.md measures others."""

AUTO_PIXELS = 2048 * 2048
"""Size of the model's input, in pixels, above which tile="auto" cuts an image into tiles."""


@dataclass(frozen=True)
class Tiling:
    """How an image is cut; raises UsageError for settings that are out of range."""

    tile: tuple[int, int] = (TILE, TILE)
    """Height and width of a tile, in pixels of the resized image."""
    overlap: int = OVERLAP
    """Pixels of the resized image that neighbouring tiles share."""
    scale: float | None = 1.0
    """Factor that the image is resized by before it is cut; None resizes it as the weights' preprocessing says."""

    def __post_init__(self) -> None:
        if len(self.tile) != 2 or not all(isinstance(side, int) and side >= 2 * UNIT for side in self.tile):
            raise UsageError(f"tile must be one or two whole numbers of at least {2 * UNIT} pixels, not {self.tile!r}.")
        if not isinstance(self.overlap, int) or not 0 <= self.overlap <= min(self.tile) - UNIT:
            raise UsageError(f"overlap must be from 0 to the tile less {UNIT} pixels, not {self.overlap!r} for {self.tile!r}.")
        if self.scale is not None and not (math.isfinite(self.scale) and 0 < self.scale <= 16):
            raise UsageError(f"scale must be above 0 and at most 16, not {self.scale!r}.")

    def model_hw(self, hw: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
        """Return the height and width that an image is resized to before it is cut."""
        if self.scale is None:
            return resized_hw(hw, preprocessing)
        return max(1, round(hw[0] * self.scale)), max(1, round(hw[1] * self.scale))


def parse_tiling(
    tile: int | tuple[int, int] | Literal["auto"] | None, overlap: int | None, scale: float | None
) -> Tiling | Literal["auto"] | None:
    """Return the tiling that `Predictor`'s settings describe, "auto" or None.

    The default overlap is a quarter of the tile's shorter side.

    Raises:
        UsageError: A setting is out of range, or overlap or scale are given without a tile, where they would change nothing.
    """
    if tile is None or tile == "auto":
        if overlap is not None or scale is not None:
            raise UsageError(f"overlap and scale belong to tiles of a given size, such as tile={TILE}; tile is {tile!r}.")
        return tile
    sides = (tile, tile) if isinstance(tile, int) else tuple(tile)
    if overlap is None and all(isinstance(side, int) for side in sides):
        overlap = min(sides) // 4
    return Tiling(sides, overlap, 1.0 if scale is None else scale)  # type: ignore[arg-type]


def tiling_for(
    hw: tuple[int, int], preprocessing: Preprocessing, tiling: Tiling | Literal["auto"] | None = "auto"
) -> Tiling | None:
    """Return how an image is cut; None where the model sees it whole.

    "auto" cuts only where the model's input, after the weights' own resize, would exceed `AUTO_PIXELS`: never for weights that
    shrink images to 513 pixels, and for very large images where weights take any size.

    Args:
        hw: Height and width of the image, in pixels.
        preprocessing: What the weights expect.
        tiling: Tiles of a given size, "auto" or None.
    """
    if tiling != "auto":
        return tiling
    height, width = resized_hw(hw, preprocessing)
    return Tiling(scale=None) if height * width > AUTO_PIXELS else None


@dataclass(frozen=True)
class TileAxis:
    """The tiles along one side of the image, all of one length; the image is padded where the last tile reaches beyond it."""

    size: int
    """Pixels of the image."""
    tile: int
    """Pixels of a tile: a multiple of UNIT, or one more if `aligned`."""
    starts: tuple[int, ...]
    """First pixel of each tile."""
    aligned: bool
    """Whether tiles have sides of the form stride x n + 1 (`is_corner_aligned`)."""

    @classmethod
    def of(cls, size: int, tile: int, overlap: int, *, aligned: bool) -> "TileAxis":
        """Return the fewest tiles, evenly spread, that overlap by at least `overlap` pixels; lengths are rounded to UNIT."""
        extra = int(aligned)
        total = max(2, math.ceil((size - extra) / UNIT))
        length = min(total, max(2, round((tile - extra) / UNIT)))
        shared = min(length - 1, math.ceil(overlap / UNIT))
        count = math.ceil((total - length) / (length - shared)) + 1
        starts = tuple((total - length) * index // max(1, count - 1) * UNIT for index in range(count))
        return cls(size, length * UNIT + extra, starts, aligned)

    def cells(self, pixels: int, cell: int) -> int:
        """Return how many cells of the low-resolution grid `pixels` pixels from a tile's start contain."""
        return (pixels - 1) // cell + 1 if self.aligned else pixels // cell

    def total_cells(self, cell: int) -> int:
        """Return the number of cells of the whole grid, padding included."""
        return self.starts[-1] // cell + self.cells(self.tile, cell)

    def weights(self, cell: int) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Return each tile's blending weights, one per cell: half a cosine across overlaps, summing to one over all tiles."""
        length = self.cells(self.tile, cell)
        starts = [start // cell for start in self.starts]
        raw = []
        for index, start in enumerate(starts):
            profile = np.ones(length)
            before = starts[index - 1] + length - start if index else 0
            after = start + length - starts[index + 1] if index + 1 < len(starts) else 0
            if before > 0:
                profile[:before] *= _cosine_ramp(before)
            if after > 0:
                profile[length - after :] *= _cosine_ramp(after)[::-1]
            raw.append(profile)
        total = np.zeros(self.total_cells(cell))
        for start, profile in zip(starts, raw, strict=True):
            total[start : start + length] += profile
        return [(one / total[at : at + length]).astype(np.float32) for at, one in zip(starts, raw, strict=True)]


def _cosine_ramp(count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    rise: np.ndarray[Any, np.dtype[np.float64]] = 0.5 - 0.5 * np.cos(np.pi * (np.arange(count) + 0.5) / count)
    return rise


def is_corner_aligned(preprocessing: Preprocessing, align_corners: bool) -> bool:
    """Whether tiles have sides of the form stride x n + 1, whose outermost cells lie on the outermost pixels.

    A model with align_corners is exact at such sides only; at others its output is stretched by up to a cell towards the bottom
    and right. Weights trained that way expect it: CamVid weights of 360 x 480 lose five points of mIoU in tiles one pixel
    larger (docs/large_images.md). So tiles are odd where the weights' own size is.
    """
    return align_corners and all(side % 2 == 1 for side in preprocessing.size)


def tile_axes(model_hw: tuple[int, int], tiling: Tiling, *, aligned: bool) -> tuple[TileAxis, TileAxis]:
    """Return the tiles along the height and along the width of a resized image."""
    sides = zip(model_hw, tiling.tile, strict=True)
    rows, columns = (TileAxis.of(size, tile, tiling.overlap, aligned=aligned) for size, tile in sides)
    return rows, columns


def count_tiles(hw: tuple[int, int], preprocessing: Preprocessing, tiling: Tiling, *, align_corners: bool) -> int:
    """Return how many tiles an image of this height and width has."""
    aligned = is_corner_aligned(preprocessing, align_corners)
    rows, columns = tile_axes(tiling.model_hw(hw, preprocessing), tiling, aligned=aligned)
    return len(rows.starts) * len(columns.starts)


# From rows of the blended low-resolution logits to labels of the image's own pixels.

BAND_VALUES = 2**22
"""Logits upsampled at once (float32: 16 MB)."""
BAND_PIXELS = 2**22
"""Pixels labelled at once by the fused arg-max, which upsamples no logits."""

_Positions = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class UpsampleGeometry:
    """Where the image's pixels lie on the grid of logits; sizes are (height, width)."""

    grid_hw: tuple[int, int]
    """Cells of the whole grid, which may reach beyond the image."""
    cell: int
    """Pixels of the model's input per cell."""
    model_hw: tuple[int, int]
    """Size of the resized image, in pixels."""
    original_hw: tuple[int, int]
    """Size of the image itself, in pixels."""
    align_corners: bool
    """Whether the outermost cells lie on the outermost pixels."""

    @cached_property
    def rows(self) -> _Positions:
        """Position on the grid of each row of the image's own pixels, in cells."""
        return self._positions(0)

    @cached_property
    def columns(self) -> _Positions:
        """Position on the grid of each column of the image's own pixels, in cells."""
        return self._positions(1)

    @property
    def is_identity(self) -> bool:
        """Whether the model saw the image at its own size."""
        return self.model_hw == self.original_hw

    def complete_pixel_rows(self, grid_row: int) -> int:
        """Return how many rows of pixels, from the top, do not depend on rows of the grid from `grid_row` on."""
        if grid_row >= self.grid_hw[0]:
            return self.original_hw[0]
        return int(np.searchsorted(self.rows, grid_row - 1, side="right"))

    def _positions(self, axis: int) -> _Positions:
        original, resized = self.original_hw[axis], self.model_hw[axis]
        pixel = (np.arange(original) + 0.5) * (resized / original) - 0.5
        position = pixel / self.cell if self.align_corners else (pixel + 0.5) / self.cell - 0.5
        return np.clip(position, 0, self.grid_hw[axis] - 1)


def upsample_argmax_rows(
    map_1Chw: torch.Tensor, first: int, final: int, geometry: UpsampleGeometry, done: int, *, band_values: int = BAND_VALUES
) -> Iterator[Labels]:
    """Yield labels of the image's rows from `done` on, as far as the grid's rows before `final` determine them, in bands.

    Where the model saw the image at its own size, the fused arg-max labels each band; else one bilinear interpolation leads
    from the grid to the image's pixels.

    Args:
        map_1Chw: Rows of the grid from row `first` on, 1 x classes x h x w.
        first: First row of the grid in `map_1Chw`.
        final: First row of the grid that later tiles still change.
        geometry: Where the image's pixels lie on the grid.
        done: First row of the image to label.
        band_values: Largest number of logits upsampled at once.

    Yields:
        Labels of the next rows, rows x W.
    """
    classes, width = map_1Chw.shape[1], max(map_1Chw.shape[3], geometry.original_hw[1] // 8)
    end = geometry.complete_pixel_rows(final)
    at_once = BAND_PIXELS // geometry.original_hw[1] if geometry.is_identity else band_values // (classes * width)
    step = max(1, at_once)
    while done < end:
        stop = min(end, done + step)
        top = int(geometry.rows[done])
        bottom = min(int(geometry.rows[stop - 1]) + 2, final)
        part_1Chw = map_1Chw[:, :, top - first : bottom - first]
        if geometry.is_identity:
            yield _argmax_at_original_size(part_1Chw, top, geometry, done, stop)
        else:
            yield _interpolated(part_1Chw, geometry.rows[done:stop] - top, geometry.columns)
        done = stop


def _argmax_at_original_size(part_1Chw: torch.Tensor, top: int, geometry: UpsampleGeometry, done: int, stop: int) -> Labels:
    """Label a part of the grid like an image of its own; rows that depend on what lies beyond its edges are cropped."""
    cell, extra = geometry.cell, int(geometry.align_corners)
    height, width = ((side - extra) * cell + extra for side in (part_1Chw.shape[2], geometry.grid_hw[1]))
    valid_hw = (height, geometry.original_hw[1])
    labels_HW = argmax_labels(part_1Chw, OutputGeometry((height, width), valid_hw, valid_hw, geometry.align_corners))
    return labels_HW[done - top * cell : stop - top * cell]


def _interpolated(part_1Chw: torch.Tensor, rows: _Positions, columns: _Positions) -> Labels:
    rows_CHw = interpolate(part_1Chw[0], axis_at(rows, part_1Chw.shape[2]), 1)
    labels_HW = np.empty((len(rows), len(columns)), np.uint8 if part_1Chw.shape[1] <= 256 else np.uint16)
    step = max(1, BAND_VALUES // (rows_CHw.shape[0] * len(rows)))
    for left in range(0, len(columns), step):
        logits_CHW = interpolate(rows_CHw, axis_at(columns[left : left + step], rows_CHw.shape[2]), 2)
        labels_HW[:, left : left + step] = logits_CHW.max(dim=0).indices.numpy()
    return labels_HW


Forward = Callable[[torch.Tensor], torch.Tensor]
"""Normalized 1 x C x H x W -> low-resolution logits, 1 x classes x h x w."""
Band = tuple[int, Labels]
"""First row of a band, and its labels, rows x W."""


def predict_bands(
    forward: Forward,
    image: RowReader,
    preprocessing: Preprocessing,
    tiling: Tiling,
    *,
    align_corners: bool,
    channels: int = 3,
    first_row: int = 0,
    on_tile: Callable[[], object] = lambda: None,
) -> Iterator[Band]:
    """Yield the labels of an image in bands from top to bottom, at the image's own size.

    Memory holds one row of tiles as pixels and as low-resolution logits, one tile's activations and one band of labels.

    Args:
        forward: The model.
        image: Rows of the image.
        preprocessing: What the weights expect.
        tiling: How to cut the image.
        align_corners: How the model upsamples.
        channels: Channels of the model's input, 1 or 3.
        first_row: Row of the image to start at; the labels are those of a run from row 0, as the tiles that reach this row are
            run again.
        on_tile: Called after each tile.

    Yields:
        Bands from `first_row` to the image's end, each final.
    """
    model_hw = tiling.model_hw(image.hw, preprocessing)
    aligned = is_corner_aligned(preprocessing, align_corners)
    rows, columns = tile_axes(model_hw, tiling, aligned=aligned)
    pixels = ResizedRowReader(image, model_hw)
    blend: _TileBlender | None = None
    geometry: UpsampleGeometry | None = None
    done = first_row
    for index, top in enumerate(rows.starts):
        if blend is None and index + 1 < len(rows.starts) and _ends_above(rows, index, first_row, image.hw[0]):
            continue
        band_HWC = pixels.rows(top, min(top + rows.tile, model_hw[0]))
        for place, left in enumerate(columns.starts):
            window_HWC = band_HWC[:, left : left + columns.tile]
            tile_1CHW = _tile_tensor(window_HWC, preprocessing, (rows.tile, columns.tile), channels)
            low_Chw = forward(tile_1CHW)[0].float().cpu()
            if blend is None:
                cell = _cell_of(low_Chw, rows.tile, aligned)
                blend = _TileBlender(rows, columns, cell, low_Chw.shape[0], index)
                grid_hw = (rows.total_cells(cell), columns.total_cells(cell))
                geometry = UpsampleGeometry(grid_hw, cell, model_hw, image.hw, aligned)
            if align_corners and not aligned:
                low_Chw = _recentered(low_Chw, cell)
            blend.add(low_Chw, index, place)
            on_tile()
        assert blend is not None
        assert geometry is not None
        final = blend.num_final_rows(index)
        for labels_HW in upsample_argmax_rows(blend.logits(), blend.first, final, geometry, done):
            yield done, labels_HW
            done += len(labels_HW)
        blend.drop_before(final - 1)


class _TileBlender:
    """The part of the image's low-resolution logits that later tiles still change: rows from `first` on, channels last."""

    def __init__(self, rows: TileAxis, columns: TileAxis, cell: int, classes: int, index: int) -> None:
        self._rows, self._columns, self._cell = rows, columns, cell
        self._row_weights, self._column_weights = rows.weights(cell), columns.weights(cell)
        self.first = rows.starts[index] // cell
        self._length = rows.cells(rows.tile, cell)
        self._map_hwC = torch.zeros(0, columns.total_cells(cell), classes)

    def logits(self) -> torch.Tensor:
        """Return the grid from row `first` on, 1 x classes x h x w."""
        return self._map_hwC.permute(2, 0, 1)[None]

    def add(self, low_Chw: torch.Tensor, index: int, place: int) -> None:
        """Add the weighted logits of the tile at row `index` and column `place` of tiles."""
        top, left = self._rows.starts[index] // self._cell - self.first, self._columns.starts[place] // self._cell
        missing = top + self._length - len(self._map_hwC)
        if missing > 0:
            self._map_hwC = torch.cat([self._map_hwC, self._map_hwC.new_zeros(missing, *self._map_hwC.shape[1:])])
        weight_hw1 = torch.from_numpy(np.outer(self._row_weights[index], self._column_weights[place])[..., None])
        where = self._map_hwC[top : top + low_Chw.shape[1], left : left + low_Chw.shape[2]]
        where.add_(low_Chw.permute(1, 2, 0) * weight_hw1)

    def num_final_rows(self, index: int) -> int:
        """Return the first row of the grid that tiles below the row of tiles `index` still change."""
        later = self._rows.starts[index + 1 :]
        return later[0] // self._cell if later else self._rows.total_cells(self._cell)

    def drop_before(self, row: int) -> None:
        """Forget the rows of the grid above `row`."""
        kept = max(0, row - self.first)
        self._map_hwC, self.first = self._map_hwC[kept:].clone(), self.first + kept


def _ends_above(rows: TileAxis, index: int, first_row: int, height: int) -> bool:
    """Whether the row of tiles `index` ends above every pixel that row `first_row` of the image is interpolated from."""
    wanted = first_row * rows.size / height - 2 * UNIT
    return rows.starts[index] + rows.tile <= wanted


def _cell_of(low_Chw: torch.Tensor, tile: int, aligned: bool) -> int:
    extra = int(aligned)
    cell, rest = divmod(tile - extra, low_Chw.shape[1] - extra)
    if rest or UNIT % cell:
        raise UsageError(
            f"A model that returns {low_Chw.shape[1]} rows of logits for {tile} rows of pixels cannot be run in tiles; "
            "use tile=None."
        )
    return cell


def _recentered(low_Chw: torch.Tensor, cell: int) -> torch.Tensor:
    """Resample logits whose cells span the tile from its first to its last pixel (align_corners) at the cells' centres.

    Only there do the cells of neighbouring tiles lie on one grid.
    """
    for dim in (1, 2):
        count = low_Chw.shape[dim]
        centres = (np.arange(count, dtype=np.float64) + 0.5) * cell - 0.5
        positions = np.multiply(centres, (count - 1) / (count * cell - 1), dtype=np.float64)
        low_Chw = interpolate(low_Chw, axis_at(positions, count), dim)
    return low_Chw


def _tile_tensor(window_HWC: Pixels, preprocessing: Preprocessing, tile_hw: tuple[int, int], channels: int) -> torch.Tensor:
    """Normalize as a whole image is; beyond the image is padding, the value that normalizes to 0."""
    exactly = Preprocessing(
        size=tile_hw,
        resize="none",
        mean=preprocessing.mean,
        std=preprocessing.std,
        channel_order=preprocessing.channel_order,
    )
    tensor_1CHW = prepare(np.ascontiguousarray(window_HWC), exactly, channels=channels).tensor_1CHW
    height, width = tensor_1CHW.shape[2:]
    return F.pad(tensor_1CHW, (0, max(0, tile_hw[1] - width), 0, max(0, tile_hw[0] - height)))
