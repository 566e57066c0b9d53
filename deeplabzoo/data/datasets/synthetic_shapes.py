"""Generated images of textured shapes, so that training can be shown and tested without a download."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from deeplabzoo.data.classes import Palette, default_palette
from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.errors import DataError, UsageError

_KINDS = ("disc", "square", "triangle", "ring")
_COLOURS = np.array([(200, 70, 60), (70, 170, 80), (70, 90, 200), (200, 180, 60)])
_SPLITS = ("train", "val")
_VOID_PX = 0.7  # half the width of the void line around each shape, as VOC draws one around its objects

Plane = npt.NDArray[np.floating[Any]]


class SyntheticShapes:
    """`count` images of `size` (height, width) with 2 to 4 shapes each; image i is a pure function of (seed, split, i).

    Labels are 0 for the ground, then disc, square, triangle and ring up to `classes`, and 255 on a thin line around each shape.
    The kind decides a shape's rough colour and its stripes; position, size, angle, light and noise are drawn.
    Raises UsageError for an impossible size or number of classes, DataError for a split other than train and val.
    """

    name = "shapes"
    ignore_index = 255

    def __init__(self, split: str, size: tuple[int, int] = (64, 64), count: int = 512, classes: int = 4, seed: int = 0) -> None:
        if split not in _SPLITS:
            raise DataError(f"Generated shapes have the splits train and val, not '{split}'.")
        if not 2 <= classes <= len(_KINDS) + 1:
            raise UsageError(f"Generated shapes have 2 to {len(_KINDS) + 1} classes, not {classes!r}.")
        if min(size) < 16 or count < 1 or seed < 0:
            raise UsageError(
                f"Generated shapes want sides from 16, a count from 1 and a seed from 0, not {size}, {count}, {seed}."
            )
        self.split = split
        self.size = size
        self.seed = seed
        self.classes: tuple[str, ...] = ("background", *_KINDS[: classes - 1])
        self.palette: Palette = default_palette(classes)
        self.names: tuple[str, ...] = tuple(f"{split}_{index:05d}" for index in range(count))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image, labels = self._draw(index)
        return Sample(image=image, labels=labels, name=self.names[index])

    def read_labels(self, index: int) -> Labels:
        """Draw one image and return its labels alone."""
        return self._draw(index)[1]

    def _draw(self, index: int) -> tuple[Pixels, Labels]:
        rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), index])
        height, width = self.size
        rows, columns = np.ogrid[:height, :width]
        labels = np.zeros(self.size, np.uint8)
        image = rng.uniform(70, 180) + rng.uniform(-15, 15, (1, 1, 3)) + _stripes(rows, columns, rng, contrast=25)[..., None]
        for _ in range(rng.integers(2, 5)):
            kind = int(rng.integers(len(self.classes) - 1))
            radius = rng.uniform(0.14, 0.26) * min(self.size)
            row, column = rng.uniform(0.1, 0.9, 2) * self.size
            inside_px = _depth(kind, rows - row, columns - column, radius, rng.uniform(0, 2 * math.pi))
            colour = _COLOURS[kind] + rng.uniform(-25, 25, 3)
            texture = _stripes(rows, columns, rng, contrast=12 * kind)
            covered = inside_px > 0
            image = np.where(covered[..., None], colour + texture[..., None], image)
            labels[covered] = kind + 1
            labels[np.abs(inside_px) < _VOID_PX] = self.ignore_index
        image = image + rng.integers(-12, 13, image.shape)
        return np.clip(image, 0, 255).astype(np.uint8), labels


def _stripes(rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], rng: np.random.Generator, contrast: float) -> Plane:
    """Waves of a drawn direction, 4 to 12 pixels long, ± `contrast` levels."""
    angle, wave = rng.uniform(0, math.pi), 2 * math.pi / rng.uniform(4, 12)
    phase = (rows * math.sin(angle) * wave + columns * math.cos(angle) * wave).astype(np.float32)
    return np.float32(contrast) * np.sin(phase)


def _depth(kind: int, rows: Plane, columns: Plane, radius: float, angle: float) -> Plane:
    """How many pixels each point lies inside the shape of this kind around the origin; negative outside."""
    away = np.hypot(rows, columns)
    if _KINDS[kind] == "disc":
        return radius - away
    if _KINDS[kind] == "ring":
        return radius * 0.3 - np.abs(away - radius * 0.8)
    corners, reach = (4, 0.8) if _KINDS[kind] == "square" else (3, 0.65)
    directions = angle + 2 * math.pi * np.arange(corners) / corners
    sides = [rows * math.sin(direction) + columns * math.cos(direction) for direction in directions]
    depth: Plane = radius * reach - np.maximum.reduce(sides)
    return depth
