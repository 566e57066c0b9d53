"""Opening a picture that may be hostile: its kind, its declared size and its scans are looked at before anything is decoded.

Every way of failing ends in one sentence, an ImageError.
"""

import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from deeplabzoo.errors import ImageError
from deeplabzoo.say import say

MAX_SCANS = 64
"""Scans of one JPEG; cameras and web tools write up to 15. Each costs a pass over all pixels, however few its bytes."""

_NOT_TRIED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""EPS and WMF are handed to other programs; the rest Pillow knows by name only."""
_DECODED_ON_OPENING = {"ICO"}
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker within or after a scan's data that is neither a stuffed byte, a restart nor padding (ITU-T T.81, B.1.1)."""
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


def existing_file(source: str | os.PathLike[str]) -> Path:
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
        raise ImageError(f"'{path}' cannot be read: {reason(error)}.") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"'{path}' is a folder, expected an image file.")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"'{path}' is a pipe, socket or device, expected an image file; save it to the disk first.")
    if status.st_size == 0:
        raise ImageError(f"'{path}' is empty (0 bytes); expected an image file.")
    return path


@contextmanager
def opened(file: Path | io.BytesIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open a picture by its content, whatever its suffix, and close it afterwards; pixels are decoded by `decoded`.

    Pillow's own size limit and its warnings about odd metadata are left aside: `decoded` checks the size, and formats that
    decode while they are opened are held to `max_pixels` here.
    """
    with _pillow_globals, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS
        try:
            Image.init()
            formats = [one for one in Image.ID if one not in _NOT_TRIED]
            Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # Pillow refuses twice its limit
            try:
                image = Image.open(file, formats=formats)
            except Image.DecompressionBombError:
                Image.MAX_IMAGE_PIXELS = None  # the header alone is wanted, for the sentence that names the size
                formats = [one for one in formats if one not in _DECODED_ON_OPENING]
                image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            if Image.MAX_IMAGE_PIXELS is None:
                raise ImageError(f"{name} holds a picture of more pixels than the limit of {max_pixels}.") from None
            raise ImageError(
                f"{name} is not an image of a known format; expected JPEG, PNG, WebP, TIFF, BMP, GIF or the like."
            ) from None
        except Exception as error:  # Pillow's parsers raise nearly anything on damaged headers
            raise ImageError(f"{name} cannot be opened as an image: {reason(error)}.") from None
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        if image.format in _LOOKED_AT:
            _LOOKED_AT[image.format](file.read_bytes() if isinstance(file, Path) else file.getvalue(), name)
        yield image


def decoded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode and turn upright, after the declared size was found acceptable; of several frames the first, which is said."""
    _require_few_pixels(image, name, max_pixels)
    try:
        frames = getattr(image, "is_animated", False) and image.format != "MPO"  # MPO: a photo with a depth map behind it
        image.load()
    except MemoryError:
        raise ImageError(no_memory(name, image)) from None
    except Exception as error:  # damaged data ends in OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name} is damaged or cut short: {reason(error)}.") from None
    _require_few_pixels(image, name, max_pixels)  # again: what icons hold may be larger than they declare
    if frames:
        say(f"{name} has several frames; the first one is used.")
    turn = _UPRIGHT.get(_orientation(image))
    try:
        return image if turn is None else image.transpose(turn)
    except MemoryError:
        raise ImageError(no_memory(name, image)) from None


def no_memory(name: str, image: Image.Image) -> str:
    """Return the sentence for a picture that is within the limit and still too large for this computer."""
    return f"{name} has {image.width} x {image.height} pixels, which do not fit into the memory that is left; make it smaller."


def reason(error: BaseException) -> str:
    """Return what an exception says, on one line and without a full stop."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def _require_few_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} declares {width} x {height} pixels, more than the limit of {max_pixels}; "
            "make it smaller, or set a larger max_pixels (predict --max-pixels) if you trust it."
        )


def _require_few_scans(jpeg: bytes, name: str) -> None:
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


def _require_end(jpeg2000: bytes, name: str) -> None:
    """Raise ImageError for a JPEG 2000 without its end: cut after a header it would decode to nothing, without an error."""
    if b"\xff\xd9" not in jpeg2000:
        raise ImageError(f"{name} is damaged or cut short: the end of its codestream is missing.")


_LOOKED_AT = {"JPEG": _require_few_scans, "MPO": _require_few_scans, "JPEG2000": _require_end}
"""Format -> what is looked at in its bytes, where the decoder itself would not."""


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; unreadable EXIF counts as none. Read after decoding: Pillow turns TIFF files by itself then."""
    with _pillow_globals, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
        except Exception:
            return 1
