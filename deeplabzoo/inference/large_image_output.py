"""A large map of class numbers as a file, written row by row: PNG, or a TIFF in tiles; both with the class colours."""

import hashlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from filelock import FileLock, Timeout

from deeplabzoo.data.image_io import Labels
from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.inference.predictor import STAMP_KEY

SUFFIXES = (".png", ".tif", ".tiff")
TILE_SIDE = 256
_BIG_TIFF_BYTES = 2**31
"""Uncompressed size from which on BigTIFF is written, which has no limit of 4 GB."""

Color = tuple[int, int, int]
ReadRows = Callable[[int, int], Labels]
"""Labels of rows `top` to `bottom` (without it)."""


def require_label_suffix(path: Path) -> None:
    """Raise UsageError unless labels can be written into `path` row by row, with what is installed here."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"'{path}' cannot hold a large map of labels; use a file name that ends in {', '.join(SUFFIXES)}.")
    if path.suffix.lower() != ".png":
        _import_tifffile()


def write_labels(
    path: Path,
    hw: tuple[int, int],
    dtype: np.dtype[Any],
    read_rows: ReadRows,
    palette: Sequence[Color],
    stamp: str | None = None,
) -> None:
    """Write labels that `read_rows` gives, whole or not at all, holding one band of rows at a time.

    `.png`: palette PNG (16-bit grey above 256 classes); `.tif`: deflated tiles of 256 x 256 with the same palette, BigTIFF
    where it may grow beyond 4 GB. A PNG carries `stamp` as text.

    Raises UsageError for another suffix or a missing tifffile, OutputError.
    """
    require_label_suffix(path)
    if path.suffix.lower() == ".png":
        write_atomically(path, lambda file: _write_png(file, hw, dtype, read_rows, palette, stamp))
    else:
        _write_tiff(path, hw, dtype, read_rows, palette)


def _write_png(
    file: BinaryIO, hw: tuple[int, int], dtype: np.dtype[Any], read_rows: ReadRows, palette: Sequence[Color], stamp: str | None
) -> None:
    """Write a PNG (ISO 15948): header, palette, one zlib stream of unfiltered rows cut into IDAT chunks, end."""
    height, width = hw
    indexed = dtype == np.uint8
    file.write(b"\x89PNG\r\n\x1a\n")
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8 if indexed else 16, 3 if indexed else 0, 0, 0, 0))
    if indexed:
        _chunk(file, b"PLTE", bytes(value for color in _padded_palette(palette) for value in color))
    if stamp is not None:
        _chunk(file, b"tEXt", f"{STAMP_KEY}\0{stamp}".encode("latin-1"))
    stream = zlib.compressobj(6)
    step = max(1, 2**22 // width)
    for top in range(0, height, step):
        labels_HW = read_rows(top, min(height, top + step))
        stored = labels_HW if indexed else labels_HW.astype(">u2")
        as_bytes = np.ascontiguousarray(stored).view(np.uint8).reshape(len(labels_HW), -1)
        with_filter = np.concatenate([np.zeros((len(as_bytes), 1), np.uint8), as_bytes], axis=1)  # filter 0: as they are
        if data := stream.compress(with_filter.tobytes()):
            _chunk(file, b"IDAT", data)
    _chunk(file, b"IDAT", stream.flush())
    _chunk(file, b"IEND", b"")


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _write_tiff(path: Path, hw: tuple[int, int], dtype: np.dtype[Any], read_rows: ReadRows, palette: Sequence[Color]) -> None:
    """Write beside `path` and rename; tifffile needs a path or a file it may seek in, so `write_atomically` does not serve."""
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.part")
    options: dict[str, Any] = {"photometric": "minisblack"}
    if dtype == np.uint8:
        colors_3N = np.zeros((3, 256), np.uint16)
        colors_3N[:, : len(palette)] = np.array(_padded_palette(palette), np.uint16).T * 257
        options = {"photometric": "palette", "colormap": colors_3N}
    try:
        with _import_tifffile().TiffWriter(partial, bigtiff=hw[0] * hw[1] * dtype.itemsize > _BIG_TIFF_BYTES) as writer:
            writer.write(
                _tiles(hw, read_rows),
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


def _tiles(hw: tuple[int, int], read_rows: ReadRows) -> Iterator[Labels]:
    height, width = hw
    for top in range(0, height, TILE_SIDE):
        band_HW = read_rows(top, min(height, top + TILE_SIDE))
        for left in range(0, width, TILE_SIDE):
            part_HW = band_HW[:, left : left + TILE_SIDE]
            missing = [(0, TILE_SIDE - side) for side in part_HW.shape]
            yield np.pad(part_HW, missing) if any(after for _, after in missing) else np.ascontiguousarray(part_HW)


def _padded_palette(palette: Sequence[Color]) -> list[Color]:
    return [(red, green, blue) for red, green, blue in palette[:256]]


def _import_tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise UsageError(
            "Writing a TIFF of labels needs tifffile (pip install 'deeplabzoo[large]'), or a name that ends in .png."
        ) from None
    return tifffile


# Labels of a picture that is being worked on, beside the output: after a kill or a power cut the finished rows remain.
#
# Two files, `.NAME.rows` with the raw labels and `.NAME.progress` with how many rows of it count. The second is replaced only
# after the rows are on the disk, so it never promises what is not there.


_LONG_NAME_BYTES = 200


class PartialLabels:
    """Rows of labels, appended from the top; `finished` of them survive whatever ends the process.

    `facts` say what the labels were made of (picture, weights, tiles): rows that were made of something else are begun anew.
    Raises OutputError where the files cannot be written or another process is writing them.
    """

    def __init__(self, output: Path, hw: tuple[int, int], dtype: np.dtype[Any], facts: Mapping[str, Any]) -> None:
        self.hw, self.dtype = hw, dtype
        self._rows, self._progress = (_sidecar_path(output, end) for end in ("rows", "progress"))
        self._lock = FileLock(_sidecar_path(output, "lock"))
        self._identity = hashlib.sha256(json.dumps([hw, str(dtype), dict(facts)], sort_keys=True).encode()).hexdigest()
        self.finished = self._appended = 0

    def __enter__(self) -> Self:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise OutputError(f"Another process is writing labels beside '{self._rows.parent}'; wait for it to end.") from None
        except OSError as error:
            raise OutputError(f"Cannot write '{self._rows}': {error.strerror or error}.") from None
        self.finished = self._committed_rows()
        self._file = self._rows.open("r+b" if self.finished else "w+b")
        self._file.seek(self.finished * self._row_bytes)  # what lies beyond does not count and is written anew
        self._appended = self.finished
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()

    def append(self, labels_HW: Labels) -> None:
        """Add rows below those that are there; they count once `keep` was called."""
        self._file.write(np.ascontiguousarray(labels_HW, self.dtype).tobytes())
        self._appended += len(labels_HW)

    def commit(self) -> None:
        """Make all rows that were appended count, once they are on the disk; raises OutputError where it is full."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"Cannot write '{self._rows}': {error.strerror or error}.") from None
        self.finished = self._appended
        text = json.dumps({"identity": self._identity, "rows": self.finished})
        write_atomically(self._progress, lambda file: file.write(text.encode()))

    def rows(self, top: int, bottom: int) -> Labels:
        """Return rows `top` to `bottom` (without it) that were kept."""
        self._file.seek(top * self._row_bytes)
        data = self._file.read((bottom - top) * self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(bottom - top, self.hw[1])

    def remove(self) -> None:
        """Delete the files, now that the output holds the labels; the progress first, so that it never promises in vain."""
        self._progress.unlink(missing_ok=True)
        self._rows.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)

    @property
    def _row_bytes(self) -> int:
        return self.hw[1] * self.dtype.itemsize

    def _committed_rows(self) -> int:
        try:
            kept = json.loads(self._progress.read_bytes())
            rows = int(kept["rows"]) if kept["identity"] == self._identity else 0
            return rows if self._rows.stat().st_size >= rows * self._row_bytes and 0 <= rows <= self.hw[0] else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def _sidecar_path(output: Path, ending: str) -> Path:
    """Return `.NAME.ending` next to the output; a name that would become too long for a disk keeps its beginning and a hash."""
    name = output.name
    if len(os.fsencode(name)) > _LONG_NAME_BYTES:
        name = f"{name[:20]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return output.with_name(f".{name}.{ending}")
