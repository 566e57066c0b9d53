"""A picture in tiles against the same network on the whole of it: labels that agree, near the seams and elsewhere.

On photos the whole picture's labels are the measure. Mosaics of labelled frames have a truth, so mIoU tells which of the two is
right; the frames one by one say what the joints of a mosaic cost.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deeplabzoo.benchmark.record import Row
from deeplabzoo.data.dataset import SegmentationDataset, build_dataset
from deeplabzoo.data.image_io import Labels, Pixels, read_image
from deeplabzoo.device import eval_mode
from deeplabzoo.errors import UsageError
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.inference.large_image import ArrayRowReader
from deeplabzoo.inference.tiling import UNIT, Forward, Tiling, count_tiles, is_corner_aligned, predict_bands, tile_axes
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.optimized_model import OptimizedDeepLab
from deeplabzoo.processing.preprocessing import image_labels, prepare

TASK = "tiles against the whole"
REACH = 8
"""Pixels on either side of the middle of an overlap that count as near the seam: there both tiles weigh about the same."""
_IMAGE_TILINGS = ((512, 128), (512, 256), (768, 192))
_MOSAIC_TILINGS = ((512, 128), (768, 192))
MOSAIC = (3, 4)
"""Rows and columns of frames in a mosaic."""


@dataclass
class SeamCounts:
    """What was counted over one or more pictures cut in the same way."""

    side: str
    equal: int = 0
    pixels: int = 0
    different_near: int = 0
    near: int = 0
    tiles: int = 0
    matrix: ConfusionMatrix | None = None

    def add(self, labels_HW: Labels, whole_HW: Labels, near_HW: np.ndarray[Any, np.dtype[np.bool_]], tiles: int) -> None:
        """Count a picture: where its labels differ from the whole picture's, near the seams and elsewhere."""
        different_HW = labels_HW != whole_HW
        self.pixels, self.equal = self.pixels + different_HW.size, self.equal + different_HW.size - int(different_HW.sum())
        self.near, self.different_near = self.near + int(near_HW.sum()), self.different_near + int(different_HW[near_HW].sum())
        self.tiles += tiles

    def row(self, name: str, hw: tuple[int, int], note: str) -> Row:
        """Return what was found as a row of a record."""
        figures: dict[str, float] = {}
        if self.tiles:
            apart, elsewhere = self.pixels - self.equal, max(1, self.pixels - self.near)
            figures |= {
                "tiles": self.tiles,
                "apart_near_seams": self.different_near / max(1, self.near),
                "apart_elsewhere": (apart - self.different_near) / elsewhere,
            }
        if self.matrix:
            figures["miou"] = self.matrix.scores().miou
        agreement = self.equal / self.pixels if self.pixels else None
        threads = torch.get_num_threads()
        return Row(
            name=name, task=TASK, side=self.side, threads=threads, size=hw, agreement=agreement, figures=figures, note=note
        )


def seam_rows(net: DeepLab, name: str, images: Sequence[Path], *, note: str = "") -> Iterator[list[Row]]:
    """Yield rows for each photo at its own size; with the image-level branch of the whole photo too, for what that one costs.

    Raises ImageError for what is no photo.
    """
    form = net.optimize()
    for image in images:
        image_HWC = read_image(image)
        hw = (image_HWC.shape[0], image_HWC.shape[1])
        with eval_mode(net), _pooled_of_first_call(net):
            whole_HW = _predict_whole(net, image_HWC)
            held = _compare_tilings(net.forward_low_resolution, net, image_HWC, whole_HW, _IMAGE_TILINGS[-1:])
        with eval_mode(form):
            found = _compare_tilings(form.forward_low_resolution, net, image_HWC, whole_HW, _IMAGE_TILINGS)
        for one in held:
            one.side += ", image-level branch of the whole"
        yield [one.row(f"{name}, {image.name}", hw, note) for one in (*found, *held)]


def mosaic_rows(net: DeepLab, name: str, data_name: str, root: Path, *, note: str = "") -> list[Row]:
    """Return rows summed over mosaics of a labelled data set's `val` frames, which are left out where a mosaic is not full.

    Raises UsageError where there is not one mosaic of frames of one size, or the classes are others, and DataError.
    """
    data = build_dataset(data_name, root)
    if data.classes != net.classes:
        raise UsageError(f"{name} has other classes than {data_name}; mosaics need weights of {data_name}.")
    count = MOSAIC[0] * MOSAIC[1]
    if len(data) < count:
        raise UsageError(f"A mosaic takes {count} frames, and '{root}' has {len(data)}.")
    form = net.optimize()
    frames, whole = SeamCounts("frames one by one"), SeamCounts("the whole mosaic")
    cut = [SeamCounts(_side(Tiling((tile, tile), overlap))) for tile, overlap in _MOSAIC_TILINGS]
    other = SeamCounts(_side(Tiling((_MOSAIC_TILINGS[-1][0],) * 2, _MOSAIC_TILINGS[-1][1])) + ", the other parity")
    for one in (frames, whole, *cut, other):
        one.matrix = ConfusionMatrix(len(data.classes), data.ignore_index)
    hw = (0, 0)
    for first in tqdm(range(0, len(data) - count + 1, count), desc="mosaics", unit="mosaic", leave=False, disable=None):
        image_HWC, truth_HW, pieces = _mosaic(data, first)
        hw = (truth_HW.shape[0], truth_HW.shape[1])
        with eval_mode(form):
            _score(
                frames,
                _tile_images([image_labels(form, prepare(piece, net.preprocessing)) for piece in pieces]),
                truth_HW,
            )
            whole_HW = _predict_whole(form, image_HWC)
            _score(whole, whole_HW, truth_HW)
            forward = form.forward_low_resolution
            for one, (tile, overlap) in zip(cut, _MOSAIC_TILINGS, strict=True):
                _cut(one, forward, net, image_HWC, whole_HW, Tiling((tile, tile), overlap), truth_HW=truth_HW)
            if net.config.align_corners:
                tiling = Tiling((_MOSAIC_TILINGS[-1][0],) * 2, _MOSAIC_TILINGS[-1][1])
                _cut(other, forward, net, image_HWC, whole_HW, tiling, truth_HW=truth_HW, parity=1)
    made = len(data) // count
    told = f"{made} mosaic{'s' * (made > 1)} of {MOSAIC[0]} x {MOSAIC[1]} {data_name} {data.split} frames"
    measured = [frames, whole, *cut, *([other] if other.pixels else [])]
    return [one.row(name, hw, "; ".join(filter(None, (told, note)))) for one in measured]


def near_seams(hw: tuple[int, int], tiling: Tiling, *, aligned: bool) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which pixels lie within `REACH` of the middle of an overlap, H x W."""
    near_HW = np.zeros(hw, np.bool_)
    for side, axis in zip((near_HW, near_HW.T), tile_axes(hw, tiling, aligned=aligned), strict=True):
        for before, after in zip(axis.starts, axis.starts[1:], strict=False):
            middle = (before + axis.tile + after) // 2
            side[middle - REACH : middle + REACH] = True
    return near_HW


def _compare_tilings(
    forward: Forward, net: DeepLab, image_HWC: Pixels, whole_HW: Labels, tilings: Sequence[tuple[int, int]]
) -> list[SeamCounts]:
    found = []
    for tile, overlap in tilings:
        tiling = Tiling((tile, tile), overlap)
        found.append(SeamCounts(_side(tiling)))
        _cut(found[-1], forward, net, image_HWC, whole_HW, tiling)
    return found


def _cut(
    found: SeamCounts,
    forward: Forward,
    net: DeepLab,
    image_HWC: Pixels,
    whole_HW: Labels,
    tiling: Tiling,
    *,
    truth_HW: Labels | None = None,
    parity: int = 0,
) -> None:
    """Label a picture in tiles and count; with `parity` 1 tiles are odd where the weights expect even ones, or the reverse."""
    align_corners, hw = net.config.align_corners, (image_HWC.shape[0], image_HWC.shape[1])
    own = replace(net.preprocessing, size=(net.preprocessing.size[0] + parity, net.preprocessing.size[1] + parity))
    bands = predict_bands(forward, ArrayRowReader(image_HWC), own, tiling, align_corners=align_corners)
    labels_HW = np.concatenate([band_HW for _, band_HW in bands])
    near_HW = near_seams(hw, tiling, aligned=is_corner_aligned(own, align_corners))
    found.add(labels_HW, whole_HW, near_HW, count_tiles(hw, own, tiling, align_corners=align_corners))
    if truth_HW is not None:
        _score(found, labels_HW, truth_HW)


def _score(found: SeamCounts, labels_HW: Labels, truth_HW: Labels) -> None:
    assert found.matrix is not None
    found.matrix.update(labels_HW, truth_HW)


def _predict_whole(net: DeepLab | OptimizedDeepLab, image_HWC: Pixels) -> Labels:
    """Label a picture in one piece at its own size, padded only where the weights expect sides of the form stride x n + 1."""
    return image_labels(net, prepare(image_HWC, _without_resize(net.preprocessing, net.config.align_corners, image_HWC)))


def _without_resize(preprocessing: Preprocessing, align_corners: bool, image_HWC: Pixels) -> Preprocessing:
    if not is_corner_aligned(preprocessing, align_corners):
        return replace(preprocessing, resize="none")
    height, width = (-(-(side - 1) // UNIT) * UNIT + 1 for side in image_HWC.shape[:2])
    return replace(preprocessing, resize="none", pad=True, size=(height, width))


def _side(tiling: Tiling) -> str:
    return f"tiles of {tiling.tile[0]}, overlap {tiling.overlap}"


def _mosaic(data: SegmentationDataset, first: int) -> tuple[Pixels, Labels, list[Pixels]]:
    samples = [data[index] for index in range(first, first + MOSAIC[0] * MOSAIC[1])]
    if len({sample.labels.shape for sample in samples}) > 1:
        raise UsageError(f"Frames of a mosaic must be of one size; those from '{samples[0].name}' on are not.")
    pieces = [sample.image for sample in samples]
    return _tile_images(pieces), _tile_images([sample.labels for sample in samples]), pieces


def _tile_images(pieces: Sequence[Any]) -> Any:
    columns = MOSAIC[1]
    rows = [np.concatenate(pieces[at : at + columns], axis=1) for at in range(0, len(pieces), columns)]
    return np.concatenate(rows, axis=0)


@contextmanager
def _pooled_of_first_call(net: DeepLab) -> Iterator[None]:
    """Let the image-level branch give in every call what it gave in the first one: the mean over the whole picture."""
    first: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, given: Any, answer: torch.Tensor) -> torch.Tensor:
        if not first:
            first.append(answer.clone())
        return first[0]

    handle = net.head.aspp.pool.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
