"""How a large picture is cut: how wide tiles are, where they begin, and how much each counts where several overlap.

Tiles begin at multiples of `UNIT` pixels, so the cells of their low-resolution logits lie on one common grid, the one that the
whole picture would have.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deeplabzoo.errors import UsageError
from deeplabzoo.inference.preprocess import resized_hw
from deeplabzoo.models.config import Preprocessing

UNIT = 32
"""Tiles begin at multiples of it: the largest output stride, so every stride's grid continues from tile to tile."""

TILE = 768
OVERLAP = 192
"""Default side of a tile and shared width of neighbours in pixels; docs/large_images.md measures others."""

AUTO_PIXELS = 2048 * 2048
"""Network input, in pixels, above which a picture is cut into tiles without being asked to."""


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut: tile (height, width) and overlap in pixels of the picture as the network sees it."""

    tile: tuple[int, int] = (TILE, TILE)
    overlap: int = OVERLAP
    scale: float | None = 1.0
    """Factor that the picture is resized by before it is cut; None resizes it as the weights' preprocessing says."""

    def __post_init__(self) -> None:
        if len(self.tile) != 2 or not all(isinstance(side, int) and side >= 2 * UNIT for side in self.tile):
            raise UsageError(f"tile must be one or two whole numbers of at least {2 * UNIT} pixels, not {self.tile!r}.")
        if not isinstance(self.overlap, int) or not 0 <= self.overlap <= min(self.tile) - UNIT:
            raise UsageError(f"overlap must be from 0 to the tile less {UNIT} pixels, not {self.overlap!r} for {self.tile!r}.")
        if self.scale is not None and not (math.isfinite(self.scale) and 0 < self.scale <= 16):
            raise UsageError(f"scale must be above 0 and at most 16, not {self.scale!r}.")

    def network_hw(self, hw: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
        """Return height and width that a picture is brought to before it is cut."""
        if self.scale is None:
            return resized_hw(hw, preprocessing)
        return max(1, round(hw[0] * self.scale)), max(1, round(hw[1] * self.scale))


def tiling_of(
    tile: int | tuple[int, int] | Literal["auto"] | None, overlap: int | None, scale: float | None
) -> Tiling | Literal["auto"] | None:
    """Return the tiling that a caller's settings mean; raises UsageError where they make no sense.

    The overlap is a quarter of the shorter side unless it is given; overlap or scale without a tile would change nothing.
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
    hw: tuple[int, int], preprocessing: Preprocessing, wished: Tiling | Literal["auto"] | None = "auto"
) -> Tiling | None:
    """Return how a picture is cut; None where it goes through the network whole.

    "auto" cuts only where the network's input, after the weights' own resize, would exceed `AUTO_PIXELS`: weights that shrink
    photos to 513 pixels get them whole as ever, those that take any size get tiles of a very large one.
    """
    if wished != "auto":
        return wished
    height, width = resized_hw(hw, preprocessing)
    return Tiling(scale=None) if height * width > AUTO_PIXELS else None


@dataclass(frozen=True)
class Axis:
    """The tiles along one side of the picture, all of one length; where the picture is short of the last, it is padded."""

    size: int
    """Pixels of the picture."""
    tile: int
    """Pixels of a tile: a multiple of UNIT, or one more where the network aligns corners."""
    starts: tuple[int, ...]
    """First pixel of each tile."""
    aligned: bool

    @classmethod
    def of(cls, size: int, tile: int, overlap: int, *, aligned: bool) -> "Axis":
        """Spread as few tiles evenly as overlap by at least `overlap` pixels, both rounded to UNIT (at least one unit)."""
        extra = int(aligned)
        total = max(2, math.ceil((size - extra) / UNIT))
        length = min(total, max(2, round((tile - extra) / UNIT)))
        shared = min(length - 1, math.ceil(overlap / UNIT))
        count = math.ceil((total - length) / (length - shared)) + 1
        starts = tuple((total - length) * index // max(1, count - 1) * UNIT for index in range(count))
        return cls(size, length * UNIT + extra, starts, aligned)

    def cells(self, pixels: int, cell: int) -> int:
        """Return how many cells of the low-resolution grid `pixels` from a tile's start have."""
        return (pixels - 1) // cell + 1 if self.aligned else pixels // cell

    def total_cells(self, cell: int) -> int:
        """Return the cells of the whole grid, padding included."""
        return self.starts[-1] // cell + self.cells(self.tile, cell)

    def weights(self, cell: int) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Return the weight of each cell of each tile: half a cosine across overlaps, summing to one over all tiles."""
        length = self.cells(self.tile, cell)
        starts = [start // cell for start in self.starts]
        raw = []
        for index, start in enumerate(starts):
            profile = np.ones(length)
            before = starts[index - 1] + length - start if index else 0
            after = start + length - starts[index + 1] if index + 1 < len(starts) else 0
            if before > 0:
                profile[:before] *= _rise(before)
            if after > 0:
                profile[length - after :] *= _rise(after)[::-1]
            raw.append(profile)
        total = np.zeros(self.total_cells(cell))
        for start, profile in zip(starts, raw, strict=True):
            total[start : start + length] += profile
        return [(one / total[at : at + length]).astype(np.float32) for at, one in zip(starts, raw, strict=True)]


def _rise(count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    rise: np.ndarray[Any, np.dtype[np.float64]] = 0.5 - 0.5 * np.cos(np.pi * (np.arange(count) + 0.5) / count)
    return rise


def has_cells_on_corners(preprocessing: Preprocessing, align_corners: bool) -> bool:
    """Whether tiles have sides of the form stride x n + 1, whose outermost cells lie on the outermost pixels.

    A network that aligns corners is exact at such sides alone; at others everything is stretched by up to a cell towards the
    bottom and right. Weights trained so expect it: measured, CamVid weights of 360 x 480 lose five points of mIoU
    in tiles one pixel larger (docs/large_images.md). So tiles are odd where the weights' own size is.
    """
    return align_corners and all(side % 2 == 1 for side in preprocessing.size)


def tile_axes(network_hw: tuple[int, int], tiling: Tiling, *, aligned: bool) -> tuple[Axis, Axis]:
    """Return the tiles along the height and along the width of a picture as the network sees it."""
    sides = zip(network_hw, tiling.tile, strict=True)
    rows, columns = (Axis.of(size, tile, tiling.overlap, aligned=aligned) for size, tile in sides)
    return rows, columns


def count_tiles(hw: tuple[int, int], preprocessing: Preprocessing, tiling: Tiling, *, align_corners: bool) -> int:
    """Return how many tiles a picture has."""
    aligned = has_cells_on_corners(preprocessing, align_corners)
    rows, columns = tile_axes(tiling.network_hw(hw, preprocessing), tiling, aligned=aligned)
    return len(rows.starts) * len(columns.starts)
