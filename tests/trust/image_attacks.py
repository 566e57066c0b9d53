"""Pictures to do harm with: small right ones of every kind that Pillow writes, and the entrances that they go through."""

import io
import struct
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from fuzz.contract import Target
from PIL import Image

from deeplabzoo.data.image_io import Pixels, read_header, read_image, read_image_bytes, read_mask
from deeplabzoo.inference.large_image import open_row_reader

MOST_PIXELS = 1_000_000
"""The limit that hostile pictures are read with; a right one of that size takes 12 MB."""
STATED_SECONDS = 5.0
"""Processor time stated for one small hostile picture."""
STATED_MEBIBYTES = 96
"""Memory stated for one, beyond what was in use: the picture at the limit, and a decoder's tables."""
WINDOWS_MEBIBYTES = 1100
"""The same through windows of a TIFF: two of the largest tiles that are taken (2**28 bytes), and their pixels."""

MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "LA", "PA", "I;16")
PHOTO = np.random.default_rng(7).integers(0, 256, (12, 14, 3), np.uint8)


def in_mode(mode: str) -> Image.Image:
    """The photo in one of Pillow's modes."""
    photo = Image.fromarray(PHOTO)
    if mode == "I;16":
        return Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257)
    if mode == "PA":
        return photo.convert("P").convert("PA")
    return photo.convert("L").convert(mode) if mode in ("1", "LA", "I", "F") else photo.convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


@cache
def common_files() -> dict[str, bytes]:
    """The formats of photos, whole: suffix and manner -> content."""
    photo = Image.fromarray(PHOTO)
    clear = np.dstack([PHOTO, PHOTO[..., :1]])
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - PHOTO)]}
    return {
        "png": saved(photo, "PNG"),
        "png of 16 bits": saved(in_mode("I;16"), "PNG"),
        "png of a palette with transparency": saved(photo.convert("P"), "PNG", transparency=bytes(range(0, 250, 10))),
        "png with alpha": saved(Image.fromarray(clear), "PNG"),
        "png in motion": saved(photo, "PNG", **frames),
        "jpeg": saved(photo, "JPEG"),
        "jpeg in scans": saved(photo, "JPEG", progressive=True),
        "jpeg of four inks": saved(in_mode("CMYK"), "JPEG"),
        "webp": saved(photo, "WEBP"),
        "webp without loss": saved(Image.fromarray(clear), "WEBP", lossless=True),
        "webp in motion": saved(photo, "WEBP", **frames),
        "gif": saved(photo, "GIF"),
        "gif in motion": saved(photo, "GIF", **frames),
        "bmp": saved(photo, "BMP"),
        "bmp of a palette": saved(photo.convert("P"), "BMP"),
        "tiff": saved(photo, "TIFF"),
        "tiff of lzw": saved(photo, "TIFF", compression="tiff_lzw"),
        "tiff of tiles": tiff(PHOTO, tile=(16, 16), compression="zlib", photometric="rgb"),
        "jp2": saved(photo, "JPEG2000"),
        "avif": saved(photo, "AVIF"),
        "ico": saved(photo, "ICO", sizes=[(14, 12)]),
    }


@cache
def every_file() -> dict[str, bytes]:
    """All that Pillow writes, format by mode."""
    Image.init()
    found = {}
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            try:
                found[f"{kind} {mode}"] = saved(in_mode(mode), kind)
            except (OSError, ValueError, KeyError, AttributeError):
                continue  # the format has no such pixels
    return found


@cache
def window_files() -> dict[str, bytes]:
    """TIFF files of every layout that is read in windows."""
    grey = PHOTO[..., 0]
    colours = np.arange(3 * 256, dtype=np.uint16).reshape(3, 256)
    rgb: dict[str, Any] = {"photometric": "rgb"}
    return {
        "strips": tiff(PHOTO, rowsperstrip=5, **rgb),
        "tiles": tiff(PHOTO, tile=(16, 16), **rgb),
        "deflated tiles": tiff(PHOTO, tile=(16, 16), compression="zlib", **rgb),
        "predicted tiles": tiff(PHOTO, tile=(16, 16), compression="zlib", predictor=True, **rgb),
        "16 bits": tiff(grey.astype(np.uint16) * 257, rowsperstrip=5),
        "palette": tiff(grey, photometric="palette", colormap=colours, rowsperstrip=5),
        "white is zero": tiff(grey, photometric="miniswhite"),
        "alpha": tiff(np.dstack([PHOTO, grey]), extrasamples=["unassalpha"], **rgb),
        "BigTIFF": tiff(PHOTO, bigtiff=True, tile=(16, 16), **rgb),
        "big-endian": tiff(grey.astype(">u2"), byteorder=">"),
    }


def windows(path: Path) -> Pixels:
    """The whole picture through windows of a few rows, as large pictures are read."""
    picture = open_row_reader(path, max_pixels=MOST_PIXELS)
    height = picture.hw[0]
    rows = [picture.rows(top, min(height, top + 64)) for top in range(0, height, 64)]
    whole = np.concatenate(rows)
    assert whole.shape == (*picture.hw, 3)
    assert whole.dtype == np.uint8
    return whole


def photo(path: Path) -> Pixels:
    pixels = read_image(path, max_pixels=MOST_PIXELS)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)
    return pixels


ENTRANCES: dict[str, Target] = {
    name: Target(
        name,
        read,
        list,
        file_name=file_name,
        seconds=STATED_SECONDS,
        mebibytes=WINDOWS_MEBIBYTES if name == "windows" else STATED_MEBIBYTES,
    )
    for name, read, file_name in (
        ("photo", photo, "a.png"),
        ("upload", lambda path: read_image_bytes(path.read_bytes(), "The upload", max_pixels=MOST_PIXELS), "a.bin"),
        ("mask", lambda path: read_mask(path, max_pixels=MOST_PIXELS), "a.png"),
        ("header", read_header, "a.png"),
        ("windows", windows, "a.tif"),
    )
}
"""How a picture comes in: each reads the file at a path, whatever its suffix says."""


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *, colours: int = 2, bits: int = 8, extra: bytes = b"", data: bytes = b"\0" * 99) -> bytes:
    """A PNG that declares a size and holds `data`."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


def zeros(length: int) -> bytes:
    """So many zeros (a multiple of 2^20), deflated: one block that ends at a byte, as often as it is needed."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = length % 65521 << 16 | 1  # of zeros: the first sum stays 1, the second counts
    return b"\x78\xda" + block * (length >> 20) + b"\x03\x00" + struct.pack(">I", adler)


def directory(entries: dict[int, tuple[int, int, int]], *, head: bytes = b"") -> bytes:
    """A little-endian TIFF of one page: tag -> (type, count, value or offset); `head` stands behind the header, at byte 8."""
    rows = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(head)) + head + struct.pack("<H", len(entries)) + rows + bytes(4)


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]
