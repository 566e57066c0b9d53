"""From a file, a Pillow image or an array to 8-bit RGB pixels; from a mask file to label numbers.

Every way of failing ends in one sentence: ImageError for pictures, DataError for what a mask says.
"""

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from deeplabzoo.errors import DataError, ImageError
from deeplabzoo.say import say

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.integer[Any]]]

MAX_PIXELS = 256_000_000
"""Default limit on a picture's declared size, in pixels: 256 Mpx is 768 MB once decoded to RGB."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
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
    path = _existing_file(source)
    with _opened(path) as image:
        return _to_rgb(image, f"'{path}'", max_pixels)


def read_image_bytes(data: bytes, name: str = "The photo", *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return what `read_image` does for the content of an image file that is no file, such as an upload.

    `name` begins the sentence of an ImageError.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); expected an image file.")
    with _opened(io.BytesIO(data), name) as image:
        return _to_rgb(image, name, max_pixels)


def declared_hw(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return height and width that an image file's header declares, before it is turned upright; None where it is none."""
    try:
        with _opened(_existing_file(path)) as image:
            return image.height, image.width
    except ImageError:
        return None


def read_mask(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Labels:
    """Return the label numbers of a mask file, height x width, uint8 (uint16 for a 16-bit file), as they stand there.

    A palette picture gives its indices, not its colours; a 1-bit one gives 0 and 1; three equal channels count as grey. EXIF
    orientation is applied, as it is to the photo. Raises ImageError if the file cannot be read, DataError if its pixels are
    colours and not numbers.
    """
    file = _existing_file(path)
    with _opened(file) as image:
        upright = _decoded(image, f"'{file}'", max_pixels)
        pixels = np.asarray(upright)
        if upright.mode == "1":
            return pixels.astype(np.uint8)
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


def _existing_file(source: str | os.PathLike[str]) -> Path:
    try:
        path = Path(source)
    except TypeError:
        raise ImageError(f"Expected a path, a Pillow image or an array, not a {type(source).__name__}.") from None
    if path.is_dir():
        raise ImageError(f"'{path}' is a folder, expected an image file.")
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"'{path}' is empty (0 bytes); expected an image file.")
    except FileNotFoundError:
        raise ImageError(f"'{path}' does not exist; check the path.") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"'{path}' cannot be read: {_reason(error)}.") from None
    return path


@contextmanager
def _opened(file: Path | io.BytesIO, name: str | None = None) -> Iterator[Image.Image]:
    """Open without Pillow's own size limit (ours is checked next) and without its warnings about odd metadata.

    Every registered format is tried but EPS, which Pillow hands to the Ghostscript program.
    """
    name = name or f"'{file}'"
    with _pillow_globals, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            Image.init()
            image = Image.open(file, formats=[one for one in Image.ID if one != "EPS"])
        except UnidentifiedImageError:
            raise ImageError(
                f"{name} is not an image of a known format; expected JPEG, PNG, WebP, TIFF, BMP, GIF or the like."
            ) from None
        except Exception as error:  # Pillow's parsers raise nearly anything on damaged headers
            raise ImageError(f"{name} cannot be opened as an image: {_reason(error)}.") from None
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit
    with image:
        yield image


def _decoded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode and turn upright, after the declared size was found acceptable."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} declares {width} x {height} pixels, more than the limit of {max_pixels}; "
            "make it smaller, or set a larger max_pixels (predict --max-pixels) if you trust it."
        )
    try:
        frames = getattr(image, "is_animated", False) and image.format != "MPO"  # MPO: a photo with a depth map behind it
        image.load()
    except Exception as error:  # as above: damaged data ends in OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name} is damaged or cut short: {_reason(error)}.") from None
    if frames:
        say(f"{name} has several frames; the first one is used.")
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; unreadable EXIF counts as none. Read after decoding: Pillow turns TIFF files by itself then."""
    with _pillow_globals, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
        except Exception:
            return 1


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Pixels:
    if min(image.size) < 2:
        raise ImageError(_too_thin(name, *image.size))
    upright = _decoded(image, name, max_pixels)
    if upright.mode.startswith("I"):
        return _grey_to_rgb(_as_eight_bit(_as_uint16(np.asarray(upright), name)))
    if upright.mode == "F":
        raise ImageError(f"{name} holds floating-point values, expected 8 or 16 bits a channel; scale it to 8 bits first.")
    if upright.has_transparency_data:
        return _over_white(upright.convert("RGBA"))
    return np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))


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
    return _over_white(Image.fromarray(np.ascontiguousarray(array)).convert("RGBA"))


def _over_white(image_rgba: Image.Image) -> Pixels:
    page = Image.new("RGBA", image_rgba.size, "white")
    page.alpha_composite(image_rgba)
    return np.array(page.convert("RGB"))


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


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__
