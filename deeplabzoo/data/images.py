"""From a file, a Pillow image or an array to 8-bit RGB pixels; from a mask file to label numbers.

Every way of failing ends in one sentence: ImageError for pictures, DataError for what a mask says.
"""

import io
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deeplabzoo.data.picture_file import decoded, existing_file, no_memory, opened, reason
from deeplabzoo.errors import DataError, ImageError

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.integer[Any]]]

MAX_PIXELS = 256_000_000
"""Default limit on a picture's declared size, in pixels: 256 Mpx is 768 MB once decoded to RGB.

While it is decoded a picture takes 7 to 20 bytes a pixel, as its format's decoder has it."""

_AT_ONCE = 2**22
"""Pixels that are brought to RGB at a time: what that needs beside picture and result stays small."""
_STORED_GREY = re.compile(r"L;(?P<bits>[24]?)(?P<inverted>I?)R?")
"""Pillow's name of grey pixels that it does not hand out as they are stored: 2 or 4 bits, or 0 for white."""


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return the picture as uint8 RGB, height x width x 3, upright as a viewer shows it.

    EXIF orientation is applied; palette, grey, 1-bit and CMYK pictures become RGB; transparency is laid over white, as on a
    page; 16-bit values are divided by 257 (65535 -> 255); of an animation the first frame is taken, and that is said.
    Colour profiles are not applied. Arrays: uint8, uint16 or bool, of shape H x W or H x W x 1, 2 (grey and alpha), 3 or 4.

    Raises ImageError: no such file, not an image, damaged, a side below 2 pixels, floating-point or 32-bit values, or more than
    `max_pixels` pixels declared in the header (checked before anything is decoded, so a small file cannot fill the memory).

    >>> read_image(np.zeros((2, 3), np.uint8)).shape
    (2, 3, 3)
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "The image", max_pixels)
    path = existing_file(source)
    with opened(path, f"'{path}'", max_pixels) as image:
        return _to_rgb(image, f"'{path}'", max_pixels)


def read_image_bytes(data: bytes, name: str = "The photo", *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return what `read_image` does for the content of an image file that is no file, such as an upload.

    `name` begins the sentence of an ImageError.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); expected an image file.")
    with opened(io.BytesIO(data), name, max_pixels) as image:
        return _to_rgb(image, name, max_pixels)


@dataclass(frozen=True)
class Header:
    """What a picture says of itself before a pixel is decoded."""

    hw: tuple[int, int]
    """Height and width as stored, before it is turned upright."""
    mode: str
    """Pillow's: `L`, `P`, `RGB` ..."""
    texts: Mapping[str, str]
    """Keyword -> text, of a PNG."""


def read_header(path: str | os.PathLike[str]) -> Header | None:
    """Return what an image file declares, whatever its size; None where it is no image that can be opened."""
    try:
        file = existing_file(path)
        with opened(file, f"'{file}'", MAX_PIXELS) as image:
            texts = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
            return Header((image.height, image.width), image.mode, texts)
    except ImageError:
        return None


def read_mask(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Labels:
    """Return the label numbers of a mask file, height x width, uint8 (uint16 for a 16-bit file), as they stand there.

    A palette picture gives its indices, not its colours; a 1-bit one gives 0 and 1; three equal channels count as grey. EXIF
    orientation is applied, as it is to the photo. Raises ImageError if the file cannot be read, DataError if its pixels are
    colours and not numbers.
    """
    file = existing_file(path)
    with opened(file, f"'{file}'", max_pixels) as image:
        stored = _STORED_GREY.fullmatch(_raw_mode(image))
        upright = decoded(image, f"'{file}'", max_pixels)
        pixels = np.asarray(upright)
        if upright.mode == "1":
            return pixels.astype(np.uint8)
        if upright.mode == "L" and stored is not None:
            return _as_stored(pixels, stored, file)
        if upright.mode in ("L", "P"):
            return pixels
        if upright.mode in ("LA", "PA"):
            return np.ascontiguousarray(pixels[..., 0])
        if upright.mode.startswith("I"):
            return _as_uint16(pixels, f"'{file}'")
        if upright.mode in ("RGB", "RGBA"):
            red = pixels[..., 0]
            if np.array_equal(red, pixels[..., 1]) and np.array_equal(red, pixels[..., 2]):
                return np.ascontiguousarray(red)
            raise DataError(
                f"The mask '{file}' holds RGB colours, expected one label number per pixel; "
                "save it as a palette or grey PNG whose values are the class numbers."
            )
    raise DataError(f"The mask '{file}' has pixels of mode {upright.mode}; save it as a palette or grey PNG of class numbers.")


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the pixels as the file stores them, of a picture that is not decoded yet; empty if unknown."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""  # decoder, box, offset, arguments: a bare tuple before Pillow 11
    return str(args[0] if isinstance(args, tuple) and args else args)


def _as_stored(grey_HW: Pixels, stored: re.Match[str], file: Path) -> Labels:
    """Undo that Pillow stretches 2 and 4 bits to 0..255; DataError where black and white are swapped, too."""
    if stored["inverted"]:
        raise DataError(
            f"The mask '{file}' stores white as 0 (WhiteIsZero), so its numbers can be read in two ways; save it as a PNG."
        )
    labels_HW: Labels = grey_HW // (255 // (2 ** int(stored["bits"] or 8) - 1))
    return labels_HW


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Pixels:
    if min(image.size) < 2:
        raise ImageError(_too_thin(name, *image.size))
    upright = decoded(image, name, max_pixels)
    if upright.mode == "F":
        raise ImageError(f"{name} holds floating-point values, expected 8 or 16 bits a channel; scale it to 8 bits first.")
    try:
        if upright.mode.startswith("I"):
            return _in_bands(upright, lambda part: _as_eight_bit(_as_uint16(np.asarray(part), name))[..., None])
        return _in_bands(upright, _over_white if upright.has_transparency_data else _plain)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(no_memory(name, upright)) from None
    except Exception as error:  # a palette that is missing, a colour space that Pillow does not convert
        raise ImageError(f"{name} has pixels of mode {upright.mode} that cannot be turned into RGB: {reason(error)}.") from None


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Pixels]) -> Pixels:
    """Return the picture that `convert` gives, made band by band."""
    width, height = image.size
    out = np.empty((height, width, 3), np.uint8)
    step = max(1, _AT_ONCE // width)
    for top in range(0, height, step):
        bottom = min(height, top + step)
        out[top:bottom] = convert(image if step >= height else image.crop((0, top, width, bottom)))
    return out


def _from_array(array: np.ndarray[Any, Any]) -> Pixels:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise ImageError(f"The array has shape {array.shape}, expected H x W or H x W x 1, 2, 3 or 4 (channels last).")
    if min(array.shape[:2]) < 2:
        raise ImageError(_too_thin("The array", array.shape[1], array.shape[0]))
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = _as_eight_bit(array)
    elif array.dtype != np.uint8:
        raise ImageError(f"The array holds {array.dtype}, expected uint8 values from 0 to 255 in RGB order; convert it first.")
    if array.ndim == 2 or array.shape[2] == 1:
        return _grey_to_rgb(array.reshape(array.shape[:2]))
    if array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return _in_bands(Image.fromarray(np.ascontiguousarray(array)), _over_white)


def _plain(image: Image.Image) -> Pixels:
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _over_white(image: Image.Image) -> Pixels:
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image if image.mode == "RGBA" else image.convert("RGBA"))
    return np.asarray(page.convert("RGB"))


def _grey_to_rgb(grey_HW: Pixels) -> Pixels:
    return np.repeat(grey_HW[..., None], 3, axis=2)


def _as_eight_bit(values: np.ndarray[Any, Any]) -> Pixels:
    """65535 -> 255 and 257 v -> v, so a 16-bit copy of an 8-bit picture comes out equal to it."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _as_uint16(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, np.dtype[np.uint16]]:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} holds values from {low} to {high}, expected 8 or 16 bits a pixel; scale it first.")
    return values.astype(np.uint16)


def _too_thin(name: str, width: int, height: int) -> str:
    return f"{name} is {width} x {height} pixels (width x height), expected at least 2 x 2."
