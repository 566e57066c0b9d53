"""A picture too large for the network, in overlapping tiles: one map of blended logits, made and labelled band by band.

Tiles are blended where their low-resolution logits lie on one grid, before anything is enlarged: the weights across an overlap
are half a cosine and sum to one, and what is enlarged afterwards is one map. Rows of it are labelled as soon as
no later tile reaches them, so that only one row of tiles is ever held.

What a tile cannot see: the image-level branch of ASPP averages over the tile instead of the whole picture, and an encoder sees
zeros beyond the tile's edge (docs/large_images.md measures what that changes).
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from deeplabzoo.data.images import Labels, Pixels
from deeplabzoo.errors import UsageError
from deeplabzoo.inference.enlarging import Enlarging, labels_of_rows, lerp
from deeplabzoo.inference.large_image import PixelRows, ScaledRows
from deeplabzoo.inference.preprocess import prepare
from deeplabzoo.inference.tile_plan import UNIT, Axis, Tiling, has_cells_on_corners, tile_axes
from deeplabzoo.models.config import Preprocessing

Forward = Callable[[torch.Tensor], torch.Tensor]
"""Normalised 1 x C x H x W -> low-resolution logits, 1 x classes x h x w."""
Band = tuple[int, Labels]
"""First row, and the labels of the rows from there on."""


def labelled_bands(
    forward: Forward,
    picture: PixelRows,
    preprocessing: Preprocessing,
    tiling: Tiling,
    *,
    align_corners: bool,
    first_row: int = 0,
    on_tile: Callable[[], object] = lambda: None,
) -> Iterator[Band]:
    """Yield the labels of the picture from `first_row` on, in bands from top to bottom, at the picture's own size.

    Each band is final. Beginning later gives the same labels as beginning at 0: the tiles that reach `first_row` are run again.
    Held at once: one row of tiles as pixels and as low-resolution logits, one tile's activations, one band of labels.
    """
    network_hw = tiling.network_hw(picture.hw, preprocessing)
    aligned = has_cells_on_corners(preprocessing, align_corners)
    rows, columns = tile_axes(network_hw, tiling, aligned=aligned)
    pixels = ScaledRows(picture, network_hw)
    blend: _Blend | None = None
    enlarging: Enlarging | None = None
    done = first_row
    for index, top in enumerate(rows.starts):
        if blend is None and index + 1 < len(rows.starts) and _ends_before(rows, index, first_row, picture.hw[0]):
            continue
        band_HWC = pixels.rows(top, min(top + rows.tile, network_hw[0]))
        for place, left in enumerate(columns.starts):
            window_HWC = band_HWC[:, left : left + columns.tile]
            low_Chw = forward(_tile_tensor(window_HWC, preprocessing, (rows.tile, columns.tile)))[0].float().cpu()
            if blend is None:
                cell = _cell_of(low_Chw, rows.tile, aligned)
                blend = _Blend(rows, columns, cell, low_Chw.shape[0], index)
                grid_hw = (rows.total_cells(cell), columns.total_cells(cell))
                enlarging = Enlarging(grid_hw, cell, network_hw, picture.hw, aligned)
            if align_corners and not aligned:
                low_Chw = _centred(low_Chw, cell)
            blend.add(low_Chw, index, place)
            on_tile()
        assert blend is not None
        assert enlarging is not None
        final = blend.final_after(index)
        for labels_HW in labels_of_rows(blend.logits(), blend.first, final, enlarging, done):
            yield done, labels_HW
            done += len(labels_HW)
        blend.drop_before(final - 1)


class _Blend:
    """The part of the picture's low-resolution logits that tiles still reach: rows `first` on, channels last."""

    def __init__(self, rows: Axis, columns: Axis, cell: int, classes: int, index: int) -> None:
        self._rows, self._columns, self._cell = rows, columns, cell
        self._row_weights, self._column_weights = rows.weights(cell), columns.weights(cell)
        self.first = rows.starts[index] // cell
        self._length = rows.cells(rows.tile, cell)
        self._held = torch.zeros(0, columns.total_cells(cell), classes)

    def logits(self) -> torch.Tensor:
        """Return rows `first` on of the grid, 1 x classes x h x w."""
        return self._held.permute(2, 0, 1)[None]

    def add(self, low_Chw: torch.Tensor, index: int, place: int) -> None:
        top, left = self._rows.starts[index] // self._cell - self.first, self._columns.starts[place] // self._cell
        missing = top + self._length - len(self._held)
        if missing > 0:
            self._held = torch.cat([self._held, self._held.new_zeros(missing, *self._held.shape[1:])])
        weight_hw1 = torch.from_numpy(np.outer(self._row_weights[index], self._column_weights[place])[..., None])
        where = self._held[top : top + low_Chw.shape[1], left : left + low_Chw.shape[2]]
        where.add_(low_Chw.permute(1, 2, 0) * weight_hw1)

    def final_after(self, index: int) -> int:
        """Return the row of the grid from which on tiles after the row of tiles `index` still add."""
        later = self._rows.starts[index + 1 :]
        return later[0] // self._cell if later else self._rows.total_cells(self._cell)

    def drop_before(self, row: int) -> None:
        kept = max(0, row - self.first)
        self._held, self.first = self._held[kept:].clone(), self.first + kept


def _ends_before(rows: Axis, index: int, first_row: int, height: int) -> bool:
    """Whether the row of tiles `index` reaches no pixel that `first_row`, a row of the picture, is interpolated from."""
    wanted = first_row * rows.size / height - 2 * UNIT
    return rows.starts[index] + rows.tile <= wanted


def _cell_of(low_Chw: torch.Tensor, tile: int, aligned: bool) -> int:
    extra = int(aligned)
    cell, rest = divmod(tile - extra, low_Chw.shape[1] - extra)
    if rest or UNIT % cell:
        raise UsageError(
            f"A network that gives {low_Chw.shape[1]} rows of logits for {tile} rows of pixels cannot be run in tiles; "
            "use tile=None."
        )
    return cell


def _centred(low_Chw: torch.Tensor, cell: int) -> torch.Tensor:
    """Move cells that the network spread from the first to the last pixel of its tile to the middle of the pixels of each.

    Only there do the cells of neighbouring tiles meet on one grid.
    """
    for dim in (1, 2):
        count = low_Chw.shape[dim]
        centres = (np.arange(count, dtype=np.float64) + 0.5) * cell - 0.5
        low_Chw = lerp(low_Chw, np.multiply(centres, (count - 1) / (count * cell - 1), dtype=np.float64), dim)
    return low_Chw


def _tile_tensor(window_HWC: Pixels, preprocessing: Preprocessing, tile_hw: tuple[int, int]) -> torch.Tensor:
    """Normalise as for a whole photo; beyond the picture is what padding has everywhere, the value that normalises to 0."""
    exactly = Preprocessing(
        size=tile_hw,
        resize="none",
        mean=preprocessing.mean,
        std=preprocessing.std,
        channel_order=preprocessing.channel_order,
    )
    tensor_1CHW = prepare(np.ascontiguousarray(window_HWC), exactly).tensor_1CHW
    height, width = tensor_1CHW.shape[2:]
    return F.pad(tensor_1CHW, (0, max(0, tile_hw[1] - width), 0, max(0, tile_hw[0] - height)))
