"""Reading image files: an image becomes 8-bit RGB pixels, a mask becomes class numbers.

Every failure is one sentence: an ImageError for a file that cannot be read, a DataError for a mask that is no label map.
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

from deeplabzoo.data.image_file import (
    decode_image,
    exif_orientation,
    open_image,
    out_of_memory_message,
    require_file,
)
from deeplabzoo.data.image_file import error_reason as error_reason
from deeplabzoo.errors import DataError, ImageError
from deeplabzoo.log import logger

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.integer[Any]]]

MAX_PIXELS = 256_000_000
"""Default limit on an image's declared size, in pixels: 256 Mpx is 768 MB once decoded to RGB.

While it is decoded an image takes 7 to 20 bytes a pixel, depending on the format."""

_BAND_PIXELS = 2**22
"""Pixels converted to RGB at a time, which bounds the memory needed beside the image and the result."""
_STORED_GREY = re.compile(r"L;(?P<bits>[24]?)(?P<invert_rules>I?)R?")
"""Pillow's raw mode of grey pixels that it does not return as stored: 2 or 4 bits, or 0 for white."""
_PHOTOMETRIC_TAG, _SAMPLES_TAG, _EXTRA_SAMPLES_TAG = 262, 277, 338
_WHITE_IS_ZERO, _OPAQUE = 0, 255
_ALPHA_SAMPLES = {1, 2, 999}
"""Extra samples that are alpha: premultiplied, not premultiplied, and what Corel Draw 10 writes (TIFF 6.0, page 31)."""

_reported: set[tuple[str, str]] = set()


def warn_once_per_folder(path: str | os.PathLike[str] | None, topic: str, message: str) -> None:
    """Log a warning about an image for the first file of each folder only: a dataset has many of a kind."""
    key = (topic, os.path.dirname(path) if path is not None else "")
    if key not in _reported:
        _reported.add(key)
        logger.warning(message)


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return an image as uint8 RGB, upright as a viewer shows it.

    EXIF orientation is applied; palette, grey, 1-bit and CMYK images become RGB; transparency is blended over white, with a
    warning; 16-bit grey values are divided by 257 (65535 -> 255), of 16-bit colours the high byte is taken; of an animation the
    first frame is read, which is logged. TIFF bands that are not declared as alpha are ignored, with a warning. Colour profiles
    are not applied.

    Args:
        source: A path, a Pillow image, or an array (uint8, uint16 or bool) of shape H x W or H x W x 1, 2 (grey and alpha), 3
            or 4 (RGB and alpha).
        max_pixels: Limit on the size that the header declares; it is checked before anything is decoded.

    Returns:
        The pixels, uint8, height x width x 3.

    Raises:
        ImageError: The file does not exist, is no image or damaged, has a side below 2 pixels, floating-point or 32-bit values,
            or more than `max_pixels` pixels.

    >>> read_image(np.zeros((2, 3), np.uint8)).shape
    (2, 3, 3)
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "The image", max_pixels, None)
    return read_image_and_orientation(source, max_pixels)[0]


def read_image_and_orientation(source: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[Pixels, int]:
    """Return what `read_image` does for a file, and the EXIF orientation (1 to 8) that was applied."""
    path = require_file(source)
    with open_image(path, f"'{path}'", max_pixels) as image:
        declared = exif_orientation(image) if image.format == "TIFF" else 1  # Pillow drops it from a TIFF that it decodes
        pixels = _to_rgb(image, f"'{path}'", max_pixels, path)
        return pixels, declared if declared != 1 else exif_orientation(image)  # a PNG may have it behind the pixels


def read_image_bytes(data: bytes, name: str = "The image", *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return what `read_image` does, for the content of an image file such as an upload.

    Args:
        data: The bytes of the file.
        name: Begins the sentence of an ImageError.
        max_pixels: See `read_image`.

    Returns:
        The pixels, uint8, height x width x 3.

    Raises:
        ImageError: As `read_image` raises.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); expected an image file.")
    with open_image(io.BytesIO(data), name, max_pixels) as image:
        return _to_rgb(image, name, max_pixels, None)


@dataclass(frozen=True)
class ImageHeader:
    """What an image file declares, read without decoding a pixel."""

    hw: tuple[int, int]
    """Height and width as stored, before the EXIF orientation is applied."""
    mode: str
    """Pillow's: `L`, `P`, `RGB` ..."""
    texts: Mapping[str, str]
    """Keyword -> text, of a PNG."""
    orientation: int = 1
    """EXIF orientation, 1 to 8; 1 where it stands behind the pixels of a PNG."""


def read_header(path: str | os.PathLike[str]) -> ImageHeader | None:
    """Return what an image file declares, whatever its size; None where it is no image that can be opened."""
    try:
        file = require_file(path)
        with open_image(file, f"'{file}'", MAX_PIXELS) as image:
            texts = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
            in_header = image.format in ("JPEG", "MPO", "TIFF") or "exif" in image.info  # else Pillow would decode a PNG for it
            orientation = exif_orientation(image) if in_header else 1
            return ImageHeader((image.height, image.width), image.mode, texts, orientation)
    except ImageError:
        return None


@dataclass(frozen=True, eq=False)
class MaskFile:
    """The content of a mask file, before it is known whether numbers or colours encode the classes."""

    values_HW: Labels | None
    """uint8 or uint16 numbers as stored (indices of a palette image); None where channels differ: there are only colours."""
    colours_HW: np.ndarray[Any, np.dtype[np.uint32]] | None
    """Colours as 0xrrggbb, black where the mask is transparent; None where the file has no colours of its own: grey numbers."""
    palette: np.ndarray[Any, np.dtype[np.uint32]] | None = None
    """Colour of each index of a palette image, as 0xrrggbb."""


def read_mask(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Labels:
    """Return the numbers of a mask file as they are stored.

    A palette image gives its indices, not its colours; a 1-bit one gives 0 and 1; three equal channels count as grey. EXIF
    orientation is applied, as it is to the image. In a `.npy` file of signed integers, -1 becomes 255 (ignored).

    Args:
        path: An image file, or a `.npy` file of a 2-D integer array.
        max_pixels: See `read_image`.

    Returns:
        The numbers, height x width, uint8 (uint16 where the file has 16 bits).

    Raises:
        ImageError: The file cannot be read.
        DataError: Its pixels are colours and not numbers.
    """
    mask = read_mask_file(path, max_pixels=max_pixels)
    if mask.values_HW is None:
        raise DataError(
            f"The mask '{path}' holds RGB colours, expected one label number per pixel; save it as a palette or grey PNG whose "
            "values are the class numbers, or give each class its colour in classes.txt (NAME #rrggbb)."
        )
    return mask.values_HW


def read_mask_file(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> MaskFile:
    """Return the numbers and the colours of a mask file; raises what `read_mask` raises for a file that has neither."""
    file = require_file(path)
    if file.suffix.lower() == ".npy":
        return MaskFile(_read_npy(file, max_pixels), None)
    with open_image(file, f"'{file}'", max_pixels) as image:
        stored = _STORED_GREY.fullmatch(_raw_mode(image))
        upright = decode_image(image, f"'{file}'", max_pixels)
        pixels = np.asarray(upright)
        if upright.mode == "1":
            return MaskFile(pixels.astype(np.uint8), None)
        if (stored is not None and stored["invert_rules"]) or _white_is_zero(image):
            raise DataError(
                f"The mask '{file}' stores white as 0 (WhiteIsZero), so its numbers can be read in two ways; save it as a PNG."
            )
        if upright.mode == "L" and stored is not None:  # Pillow stretches 2 and 4 bits to 0..255
            return MaskFile(pixels // (255 // (2 ** int(stored["bits"] or 8) - 1)), None)
        if upright.mode == "P":
            palette = np.array(upright.getpalette("RGB") or [], np.uint32).reshape(-1, 3)
            return MaskFile(pixels, None, _packed_colours(palette))
        if upright.mode == "L":
            return MaskFile(pixels, None)
        if upright.mode in ("LA", "PA"):
            return MaskFile(np.ascontiguousarray(pixels[..., 0]), None)
        if upright.mode.startswith("I"):
            return MaskFile(_as_uint16(pixels, f"'{file}'"), None)
        if upright.mode in ("RGB", "RGBA"):
            red = pixels[..., 0]
            grey = np.array_equal(red, pixels[..., 1]) and np.array_equal(red, pixels[..., 2])
            colours_HW = _packed_colours(pixels)
            if upright.mode == "RGBA":
                colours_HW[pixels[..., 3] == 0] = 0  # erased: editors keep or drop the colour below, which means nothing
            return MaskFile(np.ascontiguousarray(red) if grey else None, colours_HW)
    raise DataError(f"The mask '{file}' has pixels of mode {upright.mode}; save it as a palette or grey PNG of class numbers.")


def _packed_colours(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    red, green, blue = (pixels[..., channel].astype(np.uint32) for channel in range(3))
    return np.asarray(red << 16 | green << 8 | blue, np.uint32)


def _read_npy(file: Path, max_pixels: int) -> Labels:
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python text, and fails in many ways
        raise ImageError(f"'{file}' cannot be read as a .npy array: {error_reason(error)}.") from None
    if values.ndim != 2 or values.dtype.kind not in "uib" or not values.size:
        raise DataError(
            f"The mask '{file}' holds {values.dtype} of shape {values.shape}; expected whole numbers, height x width."
        )
    if values.size > max_pixels:
        raise ImageError(f"'{file}' has {values.shape[1]} x {values.shape[0]} values, more than the limit of {max_pixels}.")
    low, high = int(values.min()), int(values.max())
    if low < -1 or high > 65535:
        raise DataError(
            f"The mask '{file}' holds values from {low} to {high}; expected class numbers from 0, and -1 or 255 for void."
        )
    return np.where(values == -1, 255, values).astype(np.uint8 if high <= 255 else np.uint16)


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the pixels as the file stores them, of an image that is not decoded yet; empty if unknown."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""  # decoder, box, offset, arguments: a bare tuple before Pillow 11
    return str(args[0] if isinstance(args, tuple) and args else args)


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF stores white as 0 in more than 8 bits, which Pillow returns inverted, as they are stored."""
    return image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO


def _to_rgb(image: Image.Image, name: str, max_pixels: int, path: Path | None) -> Pixels:
    if min(image.size) < 2:
        raise ImageError(_too_small_message(name, *image.size))
    raw_mode = _raw_mode(image)
    upright = decode_image(image, name, max_pixels)
    if upright.mode == "F":
        raise ImageError(f"{name} holds floating-point values, expected 8 or 16 bits a channel; scale it to 8 bits first.")
    try:
        if upright.mode.startswith("I"):
            return _sixteen_bit_to_rgb(upright, name, path, raw_mode, inverted=_white_is_zero(image))
        if upright.mode == "La":
            upright = upright.convert("LA")  # Pillow converts premultiplied grey to nothing else
        upright = _without_undeclared_bands(upright, image, name, path)
        if upright.mode in ("LA", "RGBA") and upright.getchannel("A").getextrema()[0] != _OPAQUE:
            warn_once_per_folder(
                path,
                "alpha",
                f"{name} has an alpha channel, which is blended over white; if its last channel is another band, such as near "
                "infrared, save the first three alone.",
            )
        pixels = _in_bands(upright, _blend_on_white if upright.has_transparency_data else _convert_rgb)
        if "16" in raw_mode:
            _warn_if_dark(int(pixels.max()) << 8, name, path)
        return pixels
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(out_of_memory_message(name, upright)) from None
    except Exception as error:  # a palette that is missing, a colour space that Pillow does not convert
        raise ImageError(
            f"{name} has pixels of mode {upright.mode} that cannot be turned into RGB: {error_reason(error)}."
        ) from None


def _sixteen_bit_to_rgb(image: Image.Image, name: str, path: Path | None, raw_mode: str, *, inverted: bool) -> Pixels:
    """Scale grey values of 12 or 16 bits, as the file declares them, to 8 bits."""
    largest = 4095 if raw_mode.startswith("I;12") else 65535
    brightest = 0

    def convert(part: Image.Image) -> Pixels:
        nonlocal brightest
        values = _as_uint16(np.asarray(part), name)
        if inverted:
            values = np.uint16(largest) - values
        brightest = max(brightest, int(values.max()))
        grey_HW = _as_eight_bit(values) if largest == 65535 else (values.astype(np.uint32) * 255 // largest).astype(np.uint8)
        return grey_HW[..., None]

    pixels = _in_bands(image, convert)
    if largest == 65535:
        _warn_if_dark(brightest, name, path)
    return pixels


def _warn_if_dark(brightest: int, name: str, path: Path | None) -> None:
    """Warn about 16-bit files that use 12 bits at most: scaling by the content instead would give each image another scale."""
    if 0 < brightest <= 4095:
        warn_once_per_folder(
            path,
            "12 bits",
            f"{name} stores 16 bits a channel but uses values up to {brightest} only, as 12-bit cameras and scanners do. White "
            "is 65535, so it is read as nearly black: multiply the values of all such images by 16.",
        )


def _without_undeclared_bands(upright: Image.Image, image: Image.Image, name: str, path: Path | None) -> Image.Image:
    """Drop the bands of a TIFF beyond its colours unless the file declares them as alpha."""
    tags = getattr(image, "tag_v2", {})
    colours = len(upright.mode.rstrip("Aa")) if upright.mode != "LAB" else 3
    extra = int(tags.get(_SAMPLES_TAG, 1)) - (colours if upright.mode in ("RGB", "RGBA", "CMYK", "LAB") else 1)
    if extra <= 0 or set(tags.get(_EXTRA_SAMPLES_TAG, ())[:1]) & _ALPHA_SAMPLES or upright.mode == "YCbCr":
        return upright
    warn_once_per_folder(path, "bands", f"{name} has {extra} more channels than its colours, which are ignored.")
    return upright.convert("RGB") if upright.mode == "RGBA" else upright.convert("L") if upright.mode == "LA" else upright


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Pixels]) -> Pixels:
    """Return the RGB image that `convert` gives, made band by band."""
    width, height = image.size
    out = np.empty((height, width, 3), np.uint8)
    step = max(1, _BAND_PIXELS // width)
    for top in range(0, height, step):
        bottom = min(height, top + step)
        out[top:bottom] = convert(image if step >= height else image.crop((0, top, width, bottom)))
    return out


def _from_array(array: np.ndarray[Any, Any]) -> Pixels:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise ImageError(f"The array has shape {array.shape}, expected H x W or H x W x 1, 2, 3 or 4 (channels last).")
    if min(array.shape[:2]) < 2:
        raise ImageError(_too_small_message("The array", array.shape[1], array.shape[0]))
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = _as_eight_bit(array)
    elif array.dtype != np.uint8:
        raise ImageError(f"The array holds {array.dtype}, expected uint8 values from 0 to 255 in RGB order; convert it first.")
    if array.ndim == 2 or array.shape[2] == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return _in_bands(Image.fromarray(np.ascontiguousarray(array)), _blend_on_white)


def _convert_rgb(image: Image.Image) -> Pixels:
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _blend_on_white(image: Image.Image) -> Pixels:
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image if image.mode == "RGBA" else image.convert("RGBA"))
    return np.asarray(page.convert("RGB"))


def _as_eight_bit(values: np.ndarray[Any, Any]) -> Pixels:
    """65535 -> 255 and 257 v -> v, so a 16-bit copy of an 8-bit image equals it."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _as_uint16(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, np.dtype[np.uint16]]:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} holds values from {low} to {high}, expected 8 or 16 bits a pixel; scale it first.")
    return values.astype(np.uint16)


def _too_small_message(name: str, width: int, height: int) -> str:
    return f"{name} is {width} x {height} pixels (width x height), expected at least 2 x 2."
