"""A large map of class numbers as a file, written row by row: PNG, or a TIFF in tiles; both with the class colours."""

import os
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deeplabzoo.data.images import Labels
from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.inference.stamp import STAMP_KEY
from deeplabzoo.output import write_atomically

SUFFIXES = (".png", ".tif", ".tiff")
TILE_SIDE = 256
_BIG_TIFF_BYTES = 2**31
"""Uncompressed size from which on BigTIFF is written, which has no limit of 4 GB."""

Color = tuple[int, int, int]
RowsOf = Callable[[int, int], Labels]
"""Labels of rows `top` to `bottom` (without it)."""


def require_label_suffix(path: Path) -> None:
    """Raise UsageError unless labels can be written into `path` row by row, with what is installed here."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"'{path}' cannot hold a large map of labels; use a file name that ends in {', '.join(SUFFIXES)}.")
    if path.suffix.lower() != ".png":
        _tifffile()


def write_labels(
    path: Path, hw: tuple[int, int], dtype: np.dtype[Any], rows_of: RowsOf, palette: Sequence[Color], stamp: str | None = None
) -> None:
    """Write labels that `rows_of` gives, whole or not at all, holding one band of rows at a time.

    `.png`: palette PNG (16-bit grey above 256 classes); `.tif`: deflated tiles of 256 x 256 with the same palette, BigTIFF
    where it may grow beyond 4 GB. A PNG carries `stamp` as text.

    Raises UsageError for another suffix or a missing tifffile, OutputError.
    """
    require_label_suffix(path)
    if path.suffix.lower() == ".png":
        write_atomically(path, lambda file: _write_png(file, hw, dtype, rows_of, palette, stamp))
    else:
        _write_tiff(path, hw, dtype, rows_of, palette)


def _write_png(
    file: BinaryIO, hw: tuple[int, int], dtype: np.dtype[Any], rows_of: RowsOf, palette: Sequence[Color], stamp: str | None
) -> None:
    """Write a PNG (ISO 15948): header, palette, one zlib stream of unfiltered rows cut into IDAT chunks, end."""
    height, width = hw
    indexed = dtype == np.uint8
    file.write(b"\x89PNG\r\n\x1a\n")
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8 if indexed else 16, 3 if indexed else 0, 0, 0, 0))
    if indexed:
        _chunk(file, b"PLTE", bytes(value for color in _full(palette) for value in color))
    if stamp is not None:
        _chunk(file, b"tEXt", f"{STAMP_KEY}\0{stamp}".encode("latin-1"))
    stream = zlib.compressobj(6)
    step = max(1, 2**22 // width)
    for top in range(0, height, step):
        labels_HW = rows_of(top, min(height, top + step))
        stored = labels_HW if indexed else labels_HW.astype(">u2")
        as_bytes = np.ascontiguousarray(stored).view(np.uint8).reshape(len(labels_HW), -1)
        with_filter = np.concatenate([np.zeros((len(as_bytes), 1), np.uint8), as_bytes], axis=1)  # filter 0: as they are
        if data := stream.compress(with_filter.tobytes()):
            _chunk(file, b"IDAT", data)
    _chunk(file, b"IDAT", stream.flush())
    _chunk(file, b"IEND", b"")


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _write_tiff(path: Path, hw: tuple[int, int], dtype: np.dtype[Any], rows_of: RowsOf, palette: Sequence[Color]) -> None:
    """Write beside `path` and rename; tifffile needs a path or a file it may seek in, so `write_atomically` does not serve."""
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.part")
    options: dict[str, Any] = {"photometric": "minisblack"}
    if dtype == np.uint8:
        colors_3N = np.zeros((3, 256), np.uint16)
        colors_3N[:, : len(palette)] = np.array(_full(palette), np.uint16).T * 257
        options = {"photometric": "palette", "colormap": colors_3N}
    try:
        with _tifffile().TiffWriter(partial, bigtiff=hw[0] * hw[1] * dtype.itemsize > _BIG_TIFF_BYTES) as writer:
            writer.write(
                _tiles(hw, rows_of),
                shape=hw,
                dtype=dtype,
                tile=(TILE_SIDE, TILE_SIDE),
                compression="zlib",
                metadata=None,
                **options,
            )
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(f"Cannot write '{path}': {error.strerror or error}.") from None
    finally:
        partial.unlink(missing_ok=True)


def _tiles(hw: tuple[int, int], rows_of: RowsOf) -> Iterator[Labels]:
    height, width = hw
    for top in range(0, height, TILE_SIDE):
        band_HW = rows_of(top, min(height, top + TILE_SIDE))
        for left in range(0, width, TILE_SIDE):
            part_HW = band_HW[:, left : left + TILE_SIDE]
            missing = [(0, TILE_SIDE - side) for side in part_HW.shape]
            yield np.pad(part_HW, missing) if any(after for _, after in missing) else np.ascontiguousarray(part_HW)


def _full(palette: Sequence[Color]) -> list[Color]:
    return [(red, green, blue) for red, green, blue in palette[:256]]


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise UsageError(
            "Writing a TIFF of labels needs tifffile (pip install 'deeplabzoo[large]'), or a name that ends in .png."
        ) from None
    return tifffile
