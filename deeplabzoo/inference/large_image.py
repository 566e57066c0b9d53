"""Rows of a picture from top to bottom, so that a large one need not be in memory: arrays, decoded photos, TIFFs."""

import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from deeplabzoo.data.images import MAX_PIXELS, ImageSource, Pixels, read_image
from deeplabzoo.errors import ImageError
from deeplabzoo.inference.tiff_rows import TiffRows, opened_tiff

_RESIZED_AT_ONCE = 2**24
"""Pixels of the source that one step of a resize reads."""

_MOST_SIDE = 2**20
"""Side in pixels above which the header of a TIFF is not believed unless a limit was set: rows are held whole."""


class PixelRows(Protocol):
    """A picture that gives its rows when asked."""

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return rows `top` to `bottom` (without it) as uint8 RGB, rows x width x 3."""
        ...


class ArrayRows:
    """A picture that is in memory."""

    def __init__(self, image_HWC: Pixels) -> None:
        self._image_HWC = image_HWC
        self.hw = (image_HWC.shape[0], image_HWC.shape[1])

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return a view of the rows."""
        return self._image_HWC[top:bottom]


class ScaledRows:
    """A picture brought to another size, row by row: what is read once and still needed is kept.

    Bilinear with antialiasing, by Pillow on a window that has its neighbours beside it: the same pixels as of the whole
    picture, however it is cut. Rows must be asked for from top to bottom.
    """

    def __init__(self, picture: PixelRows, hw: tuple[int, int]) -> None:
        self._picture, self.hw = picture, hw
        self._top = 0
        self._held: Pixels = np.zeros((0, hw[1], 3), np.uint8)

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return rows `top` to `bottom` (without it), uint8 RGB; `top` must not be above that of the last call."""
        held_to = self._top + len(self._held)
        new = self._read(max(top, held_to), bottom)
        kept = self._held[top - self._top :]
        self._held, self._top = (np.concatenate([kept, new]) if len(kept) else new), top
        return self._held

    def _read(self, top: int, bottom: int) -> Pixels:
        if self.hw == self._picture.hw:
            return self._picture.rows(top, bottom)
        out = np.empty((max(0, bottom - top), self.hw[1], 3), np.uint8)
        ratio = self._picture.hw[0] / self.hw[0]
        step = max(1, int(_RESIZED_AT_ONCE / (ratio * self._picture.hw[1])))
        for at in range(top, bottom, step):
            out[at - top : at - top + step] = self._resized(at, min(bottom, at + step), ratio)
        return out

    def _resized(self, top: int, bottom: int, ratio: float) -> Pixels:
        height, width = self._picture.hw
        reach = math.ceil(max(1.0, ratio)) + 1  # of the filter, in pixels of the source
        first, last = max(0, int(top * ratio) - reach), min(height, math.ceil(bottom * ratio) + reach)
        window = Image.fromarray(self._picture.rows(first, last))
        box = (0.0, top * ratio - first, float(width), min(bottom * ratio - first, float(last - first)))
        return np.asarray(window.resize((self.hw[1], bottom - top), Image.Resampling.BILINEAR, box=box))


def open_rows(source: ImageSource, *, max_pixels: int | None = None) -> PixelRows:
    """Return the rows of a picture: windows of a TIFF that can be read in windows, else of the picture decoded whole.

    A TIFF needs tifffile (`pip install "deeplabzoo[large]"`) and is read tile by tile or strip by strip, whatever its size. All
    else, and a TIFF whose layout does not allow it (said in one line), Pillow decodes whole: 3 bytes a pixel, so 300 MB for
    10 000 x 10 000. Beyond `max_pixels` that is refused (ImageError); None means `MAX_PIXELS` for what is decoded whole, and no
    limit for windows but a side of 2^20 pixels.
    """
    if isinstance(source, str | os.PathLike):
        windows = opened_tiff(Path(source))
        if windows is not None:
            _check(windows, source, max_pixels)
            return windows
    return ArrayRows(read_image(source, max_pixels=max_pixels or MAX_PIXELS))


def _check(windows: TiffRows, source: Any, max_pixels: int | None) -> None:
    height, width = windows.hw
    if min(height, width) < 2:
        raise ImageError(f"'{source}' is {width} x {height} pixels (width x height), expected at least 2 x 2.")
    if max_pixels is None and max(height, width) > _MOST_SIDE:
        raise ImageError(
            f"'{source}' declares {width} x {height} pixels, a side above {_MOST_SIDE}, which is taken for damage; "
            "set max_pixels (predict --max-pixels) if you trust it."
        )
    if max_pixels is not None and height * width > max_pixels:
        raise ImageError(f"'{source}' has {width} x {height} pixels, more than the limit of {max_pixels} that was set.")
