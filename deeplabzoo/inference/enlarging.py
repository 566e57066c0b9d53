"""From rows of a large picture's low-resolution logits to labels of its own pixels, as far as those rows reach."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from deeplabzoo.data.images import Labels
from deeplabzoo.inference.labels import Grid, labels_on_grid

BAND_VALUES = 2**22
"""Logits enlarged at once (float32: 16 MB)."""
BAND_PIXELS = 2**22
"""Pixels labelled at once where no logits are enlarged."""

_Positions = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Enlarging:
    """Where the picture's pixels lie on the grid of logits; sizes are (height, width)."""

    grid_hw: tuple[int, int]
    cell: int
    """Pixels of the network's input for one cell."""
    network_hw: tuple[int, int]
    """The picture as the network saw it; the grid may reach beyond."""
    original_hw: tuple[int, int]
    align_corners: bool

    @cached_property
    def rows(self) -> _Positions:
        """Position on the grid of each row of the picture's own pixels."""
        return self._positions(0)

    @cached_property
    def columns(self) -> _Positions:
        """Position on the grid of each column of the picture's own pixels."""
        return self._positions(1)

    @property
    def keeps_size(self) -> bool:
        """Whether the network saw the picture at its own size."""
        return self.network_hw == self.original_hw

    def pixel_rows_within(self, grid_row: int) -> int:
        """Return how many rows of pixels need no row of the grid from `grid_row` on."""
        if grid_row >= self.grid_hw[0]:
            return self.original_hw[0]
        return int(np.searchsorted(self.rows, grid_row - 1, side="right"))

    def _positions(self, axis: int) -> _Positions:
        original, network = self.original_hw[axis], self.network_hw[axis]
        pixel = (np.arange(original) + 0.5) * (network / original) - 0.5
        position = pixel / self.cell if self.align_corners else (pixel + 0.5) / self.cell - 0.5
        return np.clip(position, 0, self.grid_hw[axis] - 1)


def labels_of_rows(
    map_1Chw: torch.Tensor, first: int, final: int, enlarging: Enlarging, done: int, *, band_values: int = BAND_VALUES
) -> Iterator[Labels]:
    """Yield labels of the picture's rows from `done` on, as far as the grid's rows before `final` reach, in bands.

    `map_1Chw` holds the grid from row `first`. Where the network saw the picture at its own size, bands are labelled as any
    photo is; else one bilinear step leads from the grid to the picture's pixels.
    """
    classes, width = map_1Chw.shape[1], max(map_1Chw.shape[3], enlarging.original_hw[1] // 8)
    end = enlarging.pixel_rows_within(final)
    at_once = BAND_PIXELS // enlarging.original_hw[1] if enlarging.keeps_size else band_values // (classes * width)
    step = max(1, at_once)
    while done < end:
        stop = min(end, done + step)
        top = int(enlarging.rows[done])
        bottom = min(int(enlarging.rows[stop - 1]) + 2, final)
        part_1Chw = map_1Chw[:, :, top - first : bottom - first]
        if enlarging.keeps_size:
            yield _labels_at_own_size(part_1Chw, top, enlarging, done, stop)
        else:
            yield _interpolated(part_1Chw, enlarging.rows[done:stop] - top, enlarging.columns)
        done = stop


def _labels_at_own_size(part_1Chw: torch.Tensor, top: int, enlarging: Enlarging, done: int, stop: int) -> Labels:
    """Label a part of the grid as if it were a picture of its own; rows that its edges falsify are not asked for."""
    cell, extra = enlarging.cell, int(enlarging.align_corners)
    height, width = ((side - extra) * cell + extra for side in (part_1Chw.shape[2], enlarging.grid_hw[1]))
    valid_hw = (height, enlarging.original_hw[1])
    labels_HW = labels_on_grid(part_1Chw, Grid((height, width), valid_hw, valid_hw, enlarging.align_corners))
    return labels_HW[done - top * cell : stop - top * cell]


def _interpolated(part_1Chw: torch.Tensor, rows: _Positions, columns: _Positions) -> Labels:
    rows_CHw = lerp(part_1Chw[0], rows, dim=1)
    labels_HW = np.empty((len(rows), len(columns)), np.uint8 if part_1Chw.shape[1] <= 256 else np.uint16)
    step = max(1, BAND_VALUES // (rows_CHw.shape[0] * len(rows)))
    for left in range(0, len(columns), step):
        logits_CHW = lerp(rows_CHw, columns[left : left + step], dim=2)
        labels_HW[:, left : left + step] = logits_CHW.max(dim=0).indices.numpy()
    return labels_HW


def lerp(x: torch.Tensor, positions: _Positions, dim: int) -> torch.Tensor:
    """Return C x h x w interpolated linearly at `positions` (in cells, from 0 on) along dimension 1 or 2."""
    before = torch.from_numpy(positions.astype(np.int64)).clamp_(max=x.shape[dim] - 1)
    after = (before + 1).clamp_(max=x.shape[dim] - 1)
    weight = (torch.from_numpy(positions) - before).float()
    weight = weight[:, None] if dim == 1 else weight
    return x.index_select(dim, before).mul_(1 - weight).add_(x.index_select(dim, after).mul_(weight))
