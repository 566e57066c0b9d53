"""Opening and decoding image files that may be hostile, each failure one ImageError.

Only the formats in `FORMATS` are opened, sizes are checked before pixels are decoded, and so are the few bytes of a file that
would take gigabytes of memory or hours to decode.
"""

import io
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageFile

from deeplabzoo.errors import ImageError
from deeplabzoo.log import logger

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "ICO")
"""The formats that are opened, in Pillow's names. Others run programs (EPS) or open files inside files (IPTC, BLP, FITS)."""

_MAX_BYTES_PER_PIXEL, _MAX_METADATA_BYTES = 8, 2**26
"""A file of more than 8 bytes (four channels of 16 bits) for each pixel of the limit, and 64 MiB, is no image within it."""
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
"""EXIF orientation -> the transpose that makes the image upright (Exif 2.3, tag Orientation)."""


# Pillow's warnings are ignored in the thread that reads, and in no other. `warnings.catch_warnings` would replace the filters
# of the whole process: threads that leave it in another order than they entered it leave the filters changed for good.

_thread = threading.local()


class _OnlyWhileReading(type):
    """A category of warnings that has every warning as a subclass while this thread reads an image, and none otherwise."""

    def __subclasscheck__(cls, category: type) -> bool:
        return getattr(_thread, "reading", False)


class _PillowWarning(Warning, metaclass=_OnlyWhileReading):
    """Stands in the list of filters; no warning is ever issued with it."""


@contextmanager
def _ignore_pillow_warnings() -> Iterator[None]:
    if not warnings.filters or warnings.filters[0][2] is not _PillowWarning:
        warnings.simplefilter("ignore", _PillowWarning)
    before, _thread.reading = getattr(_thread, "reading", False), True
    try:
        yield
    finally:
        _thread.reading = before


def require_file(source: str | os.PathLike[str]) -> Path:
    """Return the path of a regular file that is not empty.

    Raises:
        ImageError: It is anything else: missing, a folder, a pipe, empty. Nothing is opened to find out.
    """
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
    """Open an image by its content, whatever its suffix, and close it afterwards; `decode_image` decodes the pixels.

    `Image.open` is not used: it compares sizes with `Image.MAX_IMAGE_PIXELS`, which belongs to the whole process.
    """
    with ExitStack() as stack:
        try:
            stream: BinaryIO = stack.enter_context(file.open("rb")) if isinstance(file, Path) else file
            size = stream.seek(0, os.SEEK_END)
            with _ignore_pillow_warnings():
                image = _open_known_format(stream, file, name, size, max_pixels)
        except ImageError:
            raise
        except OSError as error:
            raise ImageError(f"{name} cannot be opened as an image: {error_reason(error)}.") from None
        with image:
            _check_content(image, stream, size, name)
            yield image


def _open_known_format(stream: BinaryIO, file: object, name: str, size: int, max_pixels: int) -> ImageFile.ImageFile:
    """Return the image of the first format that accepts the file's first bytes and can parse its header."""
    Image.init()
    stream.seek(0)
    prefix = stream.read(16)
    reasons = {}
    for kind in FORMATS:
        factory, accept = Image.OPEN.get(kind, (None, None))  # a build of Pillow may lack a format
        if factory is None or (accept is not None and accept(prefix) is not True):
            continue
        # Of a TIFF only the tags and strips that are used are read, so a large file needs no memory.
        if kind != "TIFF" and size > _MAX_BYTES_PER_PIXEL * max_pixels + _MAX_METADATA_BYTES:
            raise ImageError(
                f"{name} has {size / 1e9:.3g} GB, more than an image of {max_pixels} pixels can take; "
                "set a larger max_pixels (predict --max-pixels) if you trust it."
            )
        try:
            if kind == "ICO":
                _check_icon(stream, name, max_pixels)
            stream.seek(0)
            return factory(stream, os.fspath(file) if isinstance(file, Path) else "")
        except ImageError:
            raise
        except (Image.DecompressionBombError, MemoryError) as error:
            raise ImageError(f"{name} holds an image of more pixels than can be opened: {error_reason(error)}.") from None
        except Exception as error:  # Pillow's parsers raise nearly anything on damaged headers
            reasons[kind] = error_reason(error)
    if "TIFF" in reasons:
        raise ImageError(
            f"{name} is a TIFF of a kind that is not read ({reasons['TIFF']}); expected 1 to 4 channels of 8 or 16 bits, "
            "stored pixel by pixel; save it so, for example the three bands that stand for red, green and blue."
        )
    raise ImageError(f"{name} is not an image of a known format; expected JPEG, PNG, WebP, TIFF, BMP, GIF or the like.")


def decode_image(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode an image and make it upright; the declared size is checked first, and of several frames the first is taken."""
    _check_pixel_count(image, name, max_pixels)
    if image.format == "TIFF":
        _check_tiff_tiles(image, name, max_pixels)
    try:
        with _ignore_pillow_warnings():
            frames = getattr(image, "is_animated", False) and image.format != "MPO"  # MPO: an image with a depth map behind it
            image.load()
    except MemoryError:
        raise ImageError(out_of_memory_message(name, image)) from None
    except Exception as error:  # damaged data ends in OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name} is damaged or cut short: {error_reason(error)}.") from None
    _check_pixel_count(image, name, max_pixels)  # again: the frames of a GIF may be larger than the GIF declares
    if frames:
        logger.info(f"{name} has several frames; the first one is used.")
    transpose = _EXIF_TRANSPOSE.get(exif_orientation(image))
    try:
        return image if transpose is None else image.transpose(transpose)
    except MemoryError:
        raise ImageError(out_of_memory_message(name, image)) from None


def out_of_memory_message(name: str, image: Image.Image) -> str:
    """Return the sentence for an image that is within the limit and still too large for this computer."""
    return f"{name} has {image.width} x {image.height} pixels, which do not fit into the memory that is left; make it smaller."


def error_reason(error: BaseException) -> str:
    """Return an exception's message on one line, without a full stop."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def _check_pixel_count(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} declares {width} x {height} pixels, more than the limit of {max_pixels}; "
            "make it smaller, or set a larger max_pixels (predict --max-pixels) if you trust it."
        )


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; unreadable EXIF counts as 1. Read after decoding, when Pillow has made a TIFF upright already."""
    with _ignore_pillow_warnings():
        try:
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
        except Exception:
            return 1


# Checks that Pillow does not make.

MAX_SCANS = 64
"""Scans of one JPEG; cameras and web tools write up to 15. Each costs a pass over all pixels, however few its bytes."""

_METADATA_BYTES = 2**25
_BYTES_PER_PIXEL = 8
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
"""A JPEG marker; 0xff 0x00 is a stuffed byte of the data, and further 0xff before a marker are padding (ITU-T T.81, B.1.1)."""
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
"""JPEG markers that no length follows: TEM, the restarts, and start of image."""

_J2K_START = re.compile(rb"\xff\x4f\xff\x51")
_J2K_COD, _J2K_COC, _J2K_SOT, _J2K_SOD, _J2K_END = 0x52, 0x53, 0x90, 0x93, 0xD9
_J2K_MAX_TILES, _J2K_MIN_TILE_PIXELS = 64, 768
"""The decoder takes some 12 kB a tile before it decodes any, so tiles beyond 64 must be of about 32 x 32 pixels on average."""
_J2K_MIN_BLOCK_BITS = 8
"""Code blocks of 256 coefficients at least; the decoder takes some 200 bytes for each."""
_J2K_MAX_PRECINCTS, _J2K_MIN_PRECINCT_PIXELS = 1024, 256
"""The same for precincts, of all resolutions together."""


def _check_content(image: Image.Image, stream: BinaryIO, size: int, name: str) -> None:
    """Read the bytes of a JPEG or JPEG 2000 file, as many as its declared size can need, and raise ImageError for a bomb."""
    check = {"JPEG": _check_scan_count, "MPO": _check_scan_count, "JPEG2000": _check_codestream}.get(image.format or "")
    if check is None:
        return
    limit = _METADATA_BYTES + _BYTES_PER_PIXEL * image.width * image.height
    position = stream.tell()
    stream.seek(0)
    data = stream.read(min(size, limit))
    stream.seek(position)
    try:
        check(image, data, name, size > limit)
    except (IndexError, struct.error):
        raise ImageError(f"{name} is damaged or cut short: a segment of its header has no content.") from None


def _check_scan_count(image: Image.Image, jpeg: bytes, name: str, cut: bool) -> None:
    """Count scans as libjpeg does, which skips any bytes between segments and stops at the end of the image."""
    if jpeg.count(b"\xff\xda") <= MAX_SCANS and not cut:
        return
    scans, at = 0, 0
    while found := _MARKER.search(jpeg, at):
        marker, at = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            return
        if marker not in _WITHOUT_LENGTH:
            at += max(2, int.from_bytes(jpeg[at : at + 2]))
        if marker == _START_OF_SCAN:
            scans += 1
        if scans > MAX_SCANS:
            raise ImageError(f"{name} is a JPEG of more than {MAX_SCANS} scans, which no camera writes; save it again.")
    if cut:
        raise ImageError(
            f"{name} is damaged: a JPEG of {image.width} x {image.height} pixels without an end in {len(jpeg)} bytes."
        )


def _check_codestream(image: Image.Image, jpeg2000: bytes, name: str, cut: bool) -> None:
    """Check each codestream in the file: its end, its size, and the sizes of its tiles, code blocks and precincts."""
    if b"\xff\xd9" not in jpeg2000 or cut:  # cut behind the header, it would decode to an empty image without an error
        raise ImageError(f"{name} is damaged or cut short: the end of its codestream is missing.")
    for start in _J2K_START.finditer(jpeg2000):
        right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, channels = struct.unpack_from(
            ">8IH", jpeg2000, start.start() + 8
        )
        if (right - left, bottom - top) != image.size:
            raise ImageError(f"{name} declares two sizes: {image.width} x {image.height} and {right - left} x {bottom - top}.")
        if not tile_width or not tile_height or channels > _BYTES_PER_PIXEL:
            raise ImageError(f"{name} is damaged: its tiles have no size, or it has {channels} channels.")
        tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
        if tiles > max(_J2K_MAX_TILES, image.width * image.height // _J2K_MIN_TILE_PIXELS):
            raise ImageError(
                f"{name} is a JPEG 2000 of {tiles} tiles, too many for its size; save it with tiles of 64 x 64 or more."
            )
        for block_bits, levels, sizes in _coding_styles(jpeg2000, start.start()):
            precincts = 0
            for level, bits in enumerate(sizes[: levels + 1]):  # the smallest resolution first
                across, down = (-(-side >> levels - level) for side in image.size)
                precincts += -(-across >> (bits & 15)) * -(-down >> (bits >> 4))
            limit = _J2K_MAX_PRECINCTS + image.width * image.height // _J2K_MIN_PRECINCT_PIXELS
            if block_bits < _J2K_MIN_BLOCK_BITS or precincts > limit:
                raise ImageError(
                    f"{name} is a JPEG 2000 of very small code blocks or precincts; save it again with larger ones."
                )


def _coding_styles(data: bytes, start: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield log2 of a code block's area, the decomposition levels and the precinct sizes of each COD and COC segment."""
    at, tile_start, tile_bytes = start + 2, 0, 0
    channels = struct.unpack_from(">H", data, start + 40)[0]
    while at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if data[at] != 0xFF or marker == _J2K_END:
            return
        if marker == _J2K_SOT:
            tile_start, tile_bytes = at, int.from_bytes(data[at + 6 : at + 10])
        if marker == _J2K_SOD:
            if not tile_bytes:  # the last tile goes on to the end
                return
            at = max(at + 2, tile_start + tile_bytes)
            continue
        if marker in (_J2K_COD, _J2K_COC):
            style = at + 4 if marker == _J2K_COD else at + 5 + (channels > 256)
            first = style + 5 if marker == _J2K_COD else style + 1  # COD has progression, layers and transform in between
            levels, width, height = data[first : first + 3]
            yield (width & 15) + (height & 15) + 4, levels, data[first + 5 : at + 2 + length] if data[style] & 1 else b""
        at += 2 + max(2, length)


def _check_icon(stream: BinaryIO, name: str, max_pixels: int) -> None:
    """Raise ImageError where an image inside an icon is too large: Pillow decodes icons while it opens them."""
    stream.seek(4)
    count = int.from_bytes(stream.read(2), "little")
    entries = stream.read(16 * count)
    for at in range(0, len(entries) - 15, 16):
        stream.seek(int.from_bytes(entries[at + 12 : at + 16], "little"))
        head = stream.read(24).ljust(24, b"\0")
        if head.startswith(b"\x89PNG"):
            width, height = struct.unpack_from(">II", head, 16)
        else:
            width, height = (abs(side) for side in struct.unpack_from("<ii", head, 4))
        if width * height > 2 * max_pixels or (head.startswith(b"\x89PNG") and width * height > max_pixels):
            raise ImageError(f"{name} holds an image of {width} x {height}, more pixels than the limit of {max_pixels}.")


def _check_tiff_tiles(image: Any, name: str, max_pixels: int) -> None:
    """Raise ImageError where one tile of a TIFF is larger than an image may be: it is decoded whole."""
    tags = getattr(image, "tag_v2", {})
    try:
        width, height = (int(tags.get(tag, 0)) for tag in (322, 323))
    except (TypeError, ValueError):
        raise ImageError(f"{name} is damaged: the size of its tiles is no number.") from None
    if width * height > max_pixels:
        raise ImageError(f"{name} has tiles of {width} x {height} pixels, more than the limit of {max_pixels}.")
