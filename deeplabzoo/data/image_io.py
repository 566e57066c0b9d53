"""From a file, a Pillow image or an array to 8-bit RGB pixels; from a mask file to label numbers.

Every way of failing ends in one sentence: ImageError for pictures, DataError for what a mask says.
"""

import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from deeplabzoo.errors import DataError, ImageError
from deeplabzoo.log import logger

# Opening a picture that may be hostile: its kind, its declared size and its scans are looked at before anything is decoded.
#
# Every way of failing ends in one sentence, an ImageError.


MAX_SCANS = 64
"""Scans of one JPEG; cameras and web tools write up to 15. Each costs a pass over all pixels, however few its bytes."""

_DISABLED_FORMATS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""EPS and WMF are handed to other programs; the rest Pillow knows by name only."""
_DECODED_ON_OPEN = {"ICO"}
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker within or after a scan's data that is neither a stuffed byte, a restart nor padding (ITU-T T.81, B.1.1)."""
_ORIENTATION_TAG = 0x0112
_EXIF_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the turn that makes the picture upright (Exif 2.3, tag Orientation)."""

_pillow_globals = threading.Lock()


def require_file(source: str | os.PathLike[str]) -> Path:
    """Return the path of a regular file that is not empty; raises ImageError for anything else, without opening it."""
    try:
        path = Path(source)
    except TypeError:
        raise ImageError(f"Expected a path, a Pillow image or an array, not a {type(source).__name__}.") from None
    try:
        status = path.stat()
    except FileNotFoundError:
        broken = path.is_symlink()
        raise ImageError(f"'{path}' {'is a link to nothing' if broken else 'does not exist'}; check the path.") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"'{path}' cannot be read: {error_reason(error)}.") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"'{path}' is a folder, expected an image file.")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"'{path}' is a pipe, socket or device, expected an image file; save it to the disk first.")
    if status.st_size == 0:
        raise ImageError(f"'{path}' is empty (0 bytes); expected an image file.")
    return path


@contextmanager
def open_image(file: Path | io.BytesIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open a picture by its content, whatever its suffix, and close it afterwards; pixels are decoded by `decode_image`.

    Pillow's own size limit and its warnings about odd metadata are left aside: `decode_image` checks the size, and formats that
    decode while they are opened are held to `max_pixels` here.
    """
    with _pillow_globals, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS
        try:
            Image.init()
            formats = [one for one in Image.ID if one not in _DISABLED_FORMATS]
            Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # Pillow refuses twice its limit
            try:
                image = Image.open(file, formats=formats)
            except Image.DecompressionBombError:
                Image.MAX_IMAGE_PIXELS = None  # the header alone is wanted, for the sentence that names the size
                formats = [one for one in formats if one not in _DECODED_ON_OPEN]
                image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            if Image.MAX_IMAGE_PIXELS is None:
                raise ImageError(f"{name} holds a picture of more pixels than the limit of {max_pixels}.") from None
            raise ImageError(
                f"{name} is not an image of a known format; expected JPEG, PNG, WebP, TIFF, BMP, GIF or the like."
            ) from None
        except Exception as error:  # Pillow's parsers raise nearly anything on damaged headers
            raise ImageError(f"{name} cannot be opened as an image: {error_reason(error)}.") from None
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        if image.format in _FORMAT_CHECKS:
            _FORMAT_CHECKS[image.format](file.read_bytes() if isinstance(file, Path) else file.getvalue(), name)
        yield image


def decode_image(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode and turn upright, after the declared size was found acceptable; of several frames the first, which is said."""
    _check_pixel_count(image, name, max_pixels)
    try:
        frames = getattr(image, "is_animated", False) and image.format != "MPO"  # MPO: a photo with a depth map behind it
        image.load()
    except MemoryError:
        raise ImageError(out_of_memory_message(name, image)) from None
    except Exception as error:  # damaged data ends in OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name} is damaged or cut short: {error_reason(error)}.") from None
    _check_pixel_count(image, name, max_pixels)  # again: what icons hold may be larger than they declare
    if frames:
        logger.info(f"{name} has several frames; the first one is used.")
    turn = _EXIF_TRANSPOSE.get(_orientation(image))
    try:
        return image if turn is None else image.transpose(turn)
    except MemoryError:
        raise ImageError(out_of_memory_message(name, image)) from None


def out_of_memory_message(name: str, image: Image.Image) -> str:
    """Return the sentence for a picture that is within the limit and still too large for this computer."""
    return f"{name} has {image.width} x {image.height} pixels, which do not fit into the memory that is left; make it smaller."


def error_reason(error: BaseException) -> str:
    """Return what an exception says, on one line and without a full stop."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def _check_pixel_count(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} declares {width} x {height} pixels, more than the limit of {max_pixels}; "
            "make it smaller, or set a larger max_pixels (predict --max-pixels) if you trust it."
        )


def _check_scan_count(jpeg: bytes, name: str) -> None:
    """Raise ImageError for a JPEG whose first picture has more than MAX_SCANS scans: a few bytes that take hours."""
    if jpeg.count(b"\xff\xda") <= MAX_SCANS:
        return
    at, scans = 2, 0
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] != 0xD9:
        kind = jpeg[at + 1]
        if kind == 0xFF:
            at += 1
            continue
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        if kind == 0xDA:
            scans += 1
            found = _END_OF_SCAN.search(jpeg, at)
            at = found.start() if found else len(jpeg)
        if scans > MAX_SCANS:
            raise ImageError(f"{name} is a JPEG of more than {MAX_SCANS} scans, which no camera writes; save it anew.")


def _check_end_marker(jpeg2000: bytes, name: str) -> None:
    """Raise ImageError for a JPEG 2000 without its end: cut after a header it would decode to nothing, without an error."""
    if b"\xff\xd9" not in jpeg2000:
        raise ImageError(f"{name} is damaged or cut short: the end of its codestream is missing.")


_FORMAT_CHECKS = {"JPEG": _check_scan_count, "MPO": _check_scan_count, "JPEG2000": _check_end_marker}
"""Format -> what is looked at in its bytes, where the decoder itself would not."""


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; unreadable EXIF counts as none. Read after decoding: Pillow turns TIFF files by itself then."""
    with _pillow_globals, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
        except Exception:
            return 1


ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.integer[Any]]]

MAX_PIXELS = 256_000_000
"""Default limit on a picture's declared size, in pixels: 256 Mpx is 768 MB once decoded to RGB.

While it is decoded a picture takes 7 to 20 bytes a pixel, as its format's decoder has it."""

_BAND_PIXELS = 2**22
"""Pixels that are brought to RGB at a time: what that needs beside picture and result stays small."""
_STORED_GREY = re.compile(r"L;(?P<bits>[24]?)(?P<invert_rules>I?)R?")
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
    path = require_file(source)
    with open_image(path, f"'{path}'", max_pixels) as image:
        return _to_rgb(image, f"'{path}'", max_pixels)


def read_image_bytes(data: bytes, name: str = "The photo", *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return what `read_image` does for the content of an image file that is no file, such as an upload.

    `name` begins the sentence of an ImageError.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); expected an image file.")
    with open_image(io.BytesIO(data), name, max_pixels) as image:
        return _to_rgb(image, name, max_pixels)


@dataclass(frozen=True)
class ImageHeader:
    """What a picture says of itself before a pixel is decoded."""

    hw: tuple[int, int]
    """Height and width as stored, before it is turned upright."""
    mode: str
    """Pillow's: `L`, `P`, `RGB` ..."""
    texts: Mapping[str, str]
    """Keyword -> text, of a PNG."""


def read_header(path: str | os.PathLike[str]) -> ImageHeader | None:
    """Return what an image file declares, whatever its size; None where it is no image that can be opened."""
    try:
        file = require_file(path)
        with open_image(file, f"'{file}'", MAX_PIXELS) as image:
            texts = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
            return ImageHeader((image.height, image.width), image.mode, texts)
    except ImageError:
        return None


def read_mask(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Labels:
    """Return the label numbers of a mask file, height x width, uint8 (uint16 for a 16-bit file), as they stand there.

    A palette picture gives its indices, not its colours; a 1-bit one gives 0 and 1; three equal channels count as grey. EXIF
    orientation is applied, as it is to the photo. Raises ImageError if the file cannot be read, DataError if its pixels are
    colours and not numbers.
    """
    file = require_file(path)
    with open_image(file, f"'{file}'", max_pixels) as image:
        stored = _STORED_GREY.fullmatch(_raw_mode(image))
        upright = decode_image(image, f"'{file}'", max_pixels)
        pixels = np.asarray(upright)
        if upright.mode == "1":
            return pixels.astype(np.uint8)
        if upright.mode == "L" and stored is not None:
            return _undo_stretch(pixels, stored, file)
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


def _undo_stretch(grey_HW: Pixels, stored: re.Match[str], file: Path) -> Labels:
    """Undo that Pillow stretches 2 and 4 bits to 0..255; DataError where black and white are swapped, too."""
    if stored["invert_rules"]:
        raise DataError(
            f"The mask '{file}' stores white as 0 (WhiteIsZero), so its numbers can be read in two ways; save it as a PNG."
        )
    labels_HW: Labels = grey_HW // (255 // (2 ** int(stored["bits"] or 8) - 1))
    return labels_HW


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Pixels:
    if min(image.size) < 2:
        raise ImageError(_too_small_message(name, *image.size))
    upright = decode_image(image, name, max_pixels)
    if upright.mode == "F":
        raise ImageError(f"{name} holds floating-point values, expected 8 or 16 bits a channel; scale it to 8 bits first.")
    try:
        if upright.mode.startswith("I"):
            return _in_bands(upright, lambda part: _as_eight_bit(_as_uint16(np.asarray(part), name))[..., None])
        return _in_bands(upright, _blend_on_white if upright.has_transparency_data else _convert_rgb)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(out_of_memory_message(name, upright)) from None
    except Exception as error:  # a palette that is missing, a colour space that Pillow does not convert
        raise ImageError(
            f"{name} has pixels of mode {upright.mode} that cannot be turned into RGB: {error_reason(error)}."
        ) from None


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Pixels]) -> Pixels:
    """Return the picture that `convert` gives, made band by band."""
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
        return _grey_to_rgb(array.reshape(array.shape[:2]))
    if array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return _in_bands(Image.fromarray(np.ascontiguousarray(array)), _blend_on_white)


def _convert_rgb(image: Image.Image) -> Pixels:
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _blend_on_white(image: Image.Image) -> Pixels:
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


def _too_small_message(name: str, width: int, height: int) -> str:
    return f"{name} is {width} x {height} pixels (width x height), expected at least 2 x 2."
