"""From a large picture's file to files of labels, areas and a reduced overlay, without holding picture or labels in memory.

Rows are labelled from the top, kept beside the output as they are finished, and only when all are there is the output written,
in one piece. A run that was killed goes on after the last finished rows; a half-written output never exists.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from deeplabzoo.checkpoints.native import tensors_sha256
from deeplabzoo.data.image_io import Labels, read_header
from deeplabzoo.errors import ImageError, UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.inference.large_image import RowReader, open_row_reader
from deeplabzoo.inference.large_image_output import PartialLabels, require_label_suffix, write_labels
from deeplabzoo.inference.predictor import STAMP_KEY, Kind, Predictor, Result, output_kind
from deeplabzoo.inference.tiling import Tiling, count_tiles
from deeplabzoo.log import logger
from deeplabzoo.processing.postprocessing import ClassArea

MAX_IN_MEMORY_PIXELS = 2**26
"""Pictures up to so many pixels (67 million) are held whole by the command; larger ones go from file to file."""
OVERLAY_SIDE = 2048
"""Longest side, in pixels, of the overlay of a picture that goes from file to file."""
_BAND_ROWS = 256


@dataclass(frozen=True)
class LargeResult:
    """What was found in a picture that went from file to file."""

    height: int
    width: int
    areas: tuple[ClassArea, ...]
    """Counted over every pixel, largest first."""
    tiles: int
    continued_from: int
    """Rows that an earlier run had finished; 0 for a run from the beginning."""
    seconds: float

    def found(self) -> list[ClassArea]:
        """Return the classes that occur with their pixels and share, largest first."""
        return list(self.areas)

    def to_dict(self) -> dict[str, Any]:
        """Return size, time and the classes found as plain JSON values."""
        return {
            "height": self.height,
            "width": self.width,
            "classes": [dataclasses.asdict(area) for area in self.areas],
            "tiles": self.tiles,
            "continued_from": self.continued_from,
            "seconds": round(self.seconds, 4),
        }


def is_streamed(predictor: Predictor, source: str | Path) -> bool:
    """Whether the command labels a picture without holding it: it is cut into tiles and has more than `MAX_IN_MEMORY_PIXELS`.

    Read from the header alone; what has none that can be read is left to the ordinary way, which says what is wrong.
    """
    header = read_header(source)
    return header is not None and math.prod(header.hw) > MAX_IN_MEMORY_PIXELS and predictor.tiling_for(header.hw) is not None


def predict_to_files(
    predictor: Predictor,
    source: str | Path,
    files: Mapping[Kind, Path],
    *,
    alpha: float = 0.5,
    legend: bool = True,
    facts: Mapping[str, Any] | None = None,
    stamp: str | None = None,
) -> LargeResult:
    """Label a picture of any size and write `files`: labels (PNG or tiled TIFF), JSON of areas, an overlay of 2048 pixels.

    Memory beyond the network does not grow with the picture's height: one row of tiles is held as pixels and as low-resolution
    logits. That holds for TIFF files in tiles or strips; other formats are decoded whole (`open_row_reader`). On the disk one byte a
    pixel is needed beside the first of `files` until all are written. Calling again after an interruption goes on.
    `facts` and `stamp` are as `Result.save` takes them.

    Raises UsageError for file names that cannot hold what they should, ImageError, OutputError.
    """
    for kind, path in files.items():
        output_kind(path, kind)
        if kind == "labels":
            require_label_suffix(path)
    source = Path(source)
    start = time.perf_counter()
    picture = open_row_reader(source, max_pixels=predictor.max_pixels)
    tiling = predictor.tiling_for(picture.hw) or Tiling(scale=None)
    net = predictor.net
    dtype = np.dtype(np.uint8 if len(net.classes) <= 256 else np.uint16)
    first = next(iter(files.values()), None)
    if first is None:
        raise UsageError("predict_to_files needs at least one file to write, such as {'labels': Path('labels.png')}.")
    with PartialLabels(first, picture.hw, dtype, _resume_key(predictor, source, tiling)) as labels:
        continued_from = labels.finished
        try:
            tiles = _label(predictor, picture, tiling, labels, source.name)
        except ImageError:
            labels.remove()  # a damaged picture will not go on
            raise
        counts = _class_pixel_counts(labels, len(net.classes))
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda index: -int(counts[index]))
        total = picture.hw[0] * picture.hw[1]
        areas = [ClassArea(one, net.classes[one], int(counts[one]), int(counts[one]) / total) for one in order]
        result = LargeResult(*picture.hw, tuple(areas), tiles, continued_from, time.perf_counter() - start)
        for kind, path in files.items():
            if kind == "labels":
                write_labels(path, picture.hw, dtype, labels.rows, net.palette, stamp)
            elif kind == "json":
                made_of = {} if stamp is None else {STAMP_KEY: stamp}
                text = json.dumps({**(facts or {}), **result.to_dict(), **made_of}, indent=2, ensure_ascii=False) + "\n"
                write_atomically(path, lambda file, text=text: file.write(text.encode(errors="backslashreplace")))  # type: ignore[misc]
            else:
                _subsampled(picture, labels, predictor).save(path, "overlay", alpha=alpha, legend=legend, stamp=stamp)
        labels.remove()
    return result


def _resume_key(predictor: Predictor, source: Path, tiling: Tiling) -> dict[str, Any]:
    """Return what the labels depend on: the picture's file, the weights, the tiles and how they are computed."""
    net, status = predictor.net, source.stat()
    return {
        "source": [str(source.resolve()), status.st_size, status.st_mtime_ns],
        "tiling": dataclasses.asdict(tiling),
        "weights": tensors_sha256(net) if isinstance(net, nn.Module) else dict(net.weights_source),
        "computed": [getattr(net, "engine", "torch"), getattr(net, "precision", "fp32"), net.config.to_dict()],
        "preprocessing": net.preprocessing.to_dict(),
    }


def _label(predictor: Predictor, picture: RowReader, tiling: Tiling, labels: PartialLabels, name: str) -> int:
    net, height = predictor.net, picture.hw[0]
    tiles = count_tiles(picture.hw, net.preprocessing, tiling, align_corners=net.config.align_corners)
    if labels.finished:
        logger.info(f"{name}: {labels.finished} of {height} rows are there from an earlier run; going on after them")
    if labels.finished < height:
        with tqdm(total=height, initial=labels.finished, unit="row", desc=name, disable=None, dynamic_ncols=True) as bar:
            for top, labels_HW in predictor.bands(picture, tiling, first_row=labels.finished):
                labels.append(labels_HW)
                bar.update(len(labels_HW))
                if top + len(labels_HW) - labels.finished >= _BAND_ROWS:
                    labels.commit()
            labels.commit()
    return tiles


def _class_pixel_counts(labels: PartialLabels, classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    counts = np.zeros(classes, np.int64)
    for top in range(0, labels.hw[0], _BAND_ROWS):
        for row in labels.rows(top, min(labels.hw[0], top + _BAND_ROWS)):
            counts += np.bincount(row, minlength=classes)
    return counts


def _subsampled(picture: RowReader, labels: PartialLabels, predictor: Predictor) -> Result:
    """Return every k-th pixel of picture and labels, for an overlay that a viewer can open."""
    height, width = picture.hw
    k = math.ceil(max(height, width) / OVERLAY_SIDE)
    if k > 1:
        logger.info(f"the overlay is drawn at 1/{k} of the picture's size; labels and areas are of every pixel")
    rows: list[Labels] = []
    pixels = []
    for top in range(0, height, k * _BAND_ROWS):
        for row in range(top, min(height, top + k * _BAND_ROWS), k):
            pixels.append(picture.rows(row, row + 1)[0, ::k].copy())
            rows.append(labels.rows(row, row + 1)[0, ::k])
    return Result(np.stack(pixels), np.stack(rows), predictor.net.classes, predictor.net.palette, 0.0)
