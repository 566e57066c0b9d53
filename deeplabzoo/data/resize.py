"""A window of the resized picture, without resizing the rest: bilinear with antialiasing, as Pillow does it.

Pillow's box resize reads the same source pixels with the same weights as resizing the whole picture would. Here it runs in
one of two ways that give the same pixels bit for bit: compiled by numba (the extra `fast`), or by Pillow itself.
"""

import functools
import math
from types import ModuleType

import numpy as np
from PIL import Image

from deeplabzoo.data.image_io import Pixels
from deeplabzoo.log import logger

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the source; fractions are meant."""


@functools.cache
def load_kernel() -> ModuleType | None:
    """Return the compiled resize, or None, said once, where numba cannot be used; call it before workers fork."""
    try:
        from deeplabzoo.data import resize_numba
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        logger.info(
            f"resize: numba cannot be used ({reason}), so Pillow resizes the training pictures: the same pixels, but slower "
            '(pip install "deeplabzoo[fast]").'
        )
        return None
    return resize_numba


def resize_into(
    out_HWC: Pixels, image_HWC: Pixels, box: Box, visible_hw: tuple[int, int], *, flip: bool, fill: tuple[int, int, int]
) -> None:
    """Write the window `box`, resized to `visible_hw` and mirrored with `flip`, into the top left of `out_HWC`; `fill` beyond.

    All are uint8 RGB; `out_HWC` is contiguous and at least as large as `visible_hw`.
    """
    (left, right), columns = _source_window(box[0], box[2], visible_hw[1], image_HWC.shape[1])
    (top, bottom), rows = _source_window(box[1], box[3], visible_hw[0], image_HWC.shape[0])
    part_HWC = image_HWC[rows, columns]
    compiled = load_kernel()
    if compiled is None:
        paste_into(out_HWC, _resize_with_pillow(part_HWC, (left, top, right, bottom), visible_hw), flip=flip, fill=fill)
        return
    across = compiled.taps(part_HWC.shape[1], left, _step(left, right, visible_hw[1]), visible_hw[1])
    down = compiled.taps(part_HWC.shape[0], top, _step(top, bottom, visible_hw[0]), visible_hw[0])
    whole = image_HWC if image_HWC.flags.c_contiguous else np.ascontiguousarray(image_HWC)
    compiled.resample_into(whole[rows], columns.start, *across, *down, flip, np.array(fill, np.uint8), out_HWC)


def paste_into(out_HWC: Pixels, pixels_HWC: Pixels, *, flip: bool, fill: tuple[int, int, int]) -> None:
    """Write a picture, mirrored with `flip`, into the top left corner of `out_HWC`, and `fill` (RGB) beyond it."""
    height, width = pixels_HWC.shape[:2]
    out_HWC[:height, :width] = pixels_HWC[:, ::-1] if flip else pixels_HWC
    out_HWC[height:] = fill
    out_HWC[:height, width:] = fill


def _step(start: float, stop: float, count: int) -> float:
    """Return how many source pixels an output covers; Pillow subtracts in float32."""
    return float(np.float32(stop) - np.float32(start)) / count


def _source_window(start: float, stop: float, count: int, size: int) -> tuple[tuple[float, float], slice]:
    """Return the source pixels that a side of the window can touch, and the window's ends counted from the first of them.

    The ends are float32, as in Pillow's interface; a whole number can be taken from them without rounding.
    """
    first, last = float(np.float32(start)), float(np.float32(stop))
    reach = max(1.0, (last - first) / count) + 1
    begin, end = max(0, math.floor(first - reach)), min(size, math.ceil(last + reach))
    return (first - begin, last - begin), slice(begin, end)


def _resize_with_pillow(part_HWC: Pixels, box: Box, visible_hw: tuple[int, int]) -> Pixels:
    """Resize columns first and then rows, in two calls: which comes first within one call depends on Pillow's version."""
    (left, top, right, bottom), (height, width) = box, visible_hw
    bilinear, rows = Image.Resampling.BILINEAR, part_HWC.shape[0]
    across = Image.fromarray(part_HWC).resize((width, rows), bilinear, box=(left, 0, right, rows))
    return np.asarray(across.resize((width, height), bilinear, box=(0, top, width, bottom)))
