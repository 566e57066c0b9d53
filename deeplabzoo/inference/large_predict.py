"""Labels of a large image written from file to file, without the image or its labels in memory.

Rows are labelled from the top and kept beside the output as they are finished; the output is written, atomically, when all rows
are there. A run that was killed continues after the last finished rows.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

from deeplabzoo.checkpoints.native import tensors_sha256
from deeplabzoo.data.image_io import Labels, read_header
from deeplabzoo.errors import ImageError, OutputError, UsageError
from deeplabzoo.files import remove_partial_files, write_atomically
from deeplabzoo.inference.inputs import STAMP_KEY, Kind, output_kind
from deeplabzoo.inference.large_image import RowReader, open_row_reader
from deeplabzoo.inference.predictor import Predictor, Result, write_json
from deeplabzoo.inference.tiling import Tiling, count_tiles
from deeplabzoo.inference.visualization import Color
from deeplabzoo.log import logger
from deeplabzoo.processing.postprocessing import ClassArea, PixelCounts, areas_from_counts, count_pixels

MAX_IN_MEMORY_PIXELS = 2**26
"""Images of more pixels (67 million) that are cut into tiles go from file to file in the `predict` command."""
OVERLAY_SIDE = 2048
"""Longest side, in pixels, of the overlay of an image that goes from file to file."""
LABEL_SUFFIXES = (".png", ".tif", ".tiff")
"""Files that labels can be written to row by row."""
TILE_SIDE = 256
"""Side of a tile in a TIFF of labels, in pixels."""
_BIG_TIFF_BYTES = 2**31
"""Uncompressed size from which on BigTIFF is written, which has no limit of 4 GB."""
_BAND_ROWS = 256
"""Rows after which finished labels are committed to the disk."""
_LONG_NAME_BYTES = 200

ReadRows = Callable[[int, int], Labels]
"""(top, bottom) -> labels of rows `top` to `bottom` (exclusive)."""


@dataclass(frozen=True)
class LargeResult:
    """What was found in an image that went from file to file."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    areas: tuple[ClassArea, ...]
    """Counted over every pixel, largest first."""
    tiles: int
    """Tiles that the image was cut into."""
    continued_from: int
    """Rows that an earlier run had finished; 0 for a run from the first row."""
    seconds: float

    def found(self) -> list[ClassArea]:
        """Return the classes that occur with their pixels and share, largest first."""
        return list(self.areas)

    def to_dict(self) -> dict[str, Any]:
        """Return size, time and the classes found as plain JSON values."""
        return {
            "height": self.height,
            "width": self.width,
            "classes": [dataclasses.asdict(area) for area in self.areas],
            "tiles": self.tiles,
            "continued_from": self.continued_from,
            "seconds": round(self.seconds, 4),
        }


def is_streamed(predictor: Predictor, source: str | Path) -> bool:
    """Whether the `predict` command labels an image from file to file: it is cut into tiles and exceeds MAX_IN_MEMORY_PIXELS.

    Decided by the file's header alone; False where the header cannot be read.
    """
    header = read_header(source)
    return header is not None and math.prod(header.hw) > MAX_IN_MEMORY_PIXELS and predictor.tiling_for(header.hw) is not None


def predict_to_files(
    predictor: Predictor,
    source: str | Path,
    files: Mapping[Kind, Path],
    *,
    alpha: float = 0.5,
    legend: bool = True,
    facts: Mapping[str, Any] | None = None,
    stamp: str | None = None,
) -> LargeResult:
    """Label an image of any size and write labels (PNG or tiled TIFF), JSON of areas, and an overlay of at most 2048 pixels.

    Memory does not grow with the image's height for TIFF files in tiles or strips: one row of tiles is held as pixels and as
    low-resolution logits. Other formats are decoded whole (`open_row_reader`). One byte per pixel is needed on the disk, beside
    the first of `files`, until all are written. Calling again after an interruption continues.

    Args:
        predictor: The model and its tiling.
        source: Image file.
        files: Kind -> file to write.
        alpha: Weight of the class colours in the overlay, 0...1.
        legend: Whether the overlay has a legend.
        facts: Entries put before the JSON's own.
        stamp: Hash of what the result was made of, kept in JSON and PNG.

    Returns:
        Size, areas, number of tiles and the rows that an earlier run had finished.

    Raises:
        UsageError: `files` is empty, or a suffix cannot hold its kind.
        ImageError: The image cannot be read.
        OutputError: A file cannot be written.
    """
    for kind, path in files.items():
        output_kind(path, kind)
        if kind == "labels":
            require_label_suffix(path)
    source = Path(source)
    start = time.perf_counter()
    image = open_row_reader(source, max_pixels=predictor.max_pixels)
    tiling = predictor.tiling_for(image.hw) or Tiling(scale=None)
    net = predictor.net
    dtype = np.dtype(np.uint8 if len(net.classes) <= 256 else np.uint16)
    first = next(iter(files.values()), None)
    if first is None:
        raise UsageError("predict_to_files needs at least one file to write, such as {'labels': Path('labels.png')}.")
    with PartialLabels(first, image.hw, dtype, _resume_key(predictor, source, tiling)) as labels:
        continued_from = labels.finished
        try:
            tiles = _label(predictor, image, tiling, labels, source.name)
        except ImageError:
            labels.remove()  # a damaged image cannot be continued
            raise
        areas = areas_from_counts(_class_pixel_counts(labels, len(net.classes)), net.classes)
        result = LargeResult(*image.hw, tuple(areas), tiles, continued_from, time.perf_counter() - start)
        for kind, path in files.items():
            if kind == "labels":
                write_labels(path, image.hw, dtype, labels.rows, net.palette, stamp)
            elif kind == "json":
                write_json(path, {**(facts or {}), **result.to_dict()}, stamp)
            else:
                _subsampled(image, labels, predictor).save(path, "overlay", alpha=alpha, legend=legend, stamp=stamp)
        labels.remove()
    return result


def _resume_key(predictor: Predictor, source: Path, tiling: Tiling) -> dict[str, Any]:
    """Return what the labels depend on: the image's file, the weights, the tiles and the backend."""
    net, status = predictor.net, source.stat()
    return {
        # ctime too: a copy that keeps size and modification time (cp -p) is another image
        "source": [str(source.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns],
        "tiling": dataclasses.asdict(tiling),
        "weights": tensors_sha256(net) if isinstance(net, nn.Module) else dict(net.weights_source),
        "backend": [*predictor.backend, net.config.to_dict()],
        "preprocessing": net.preprocessing.to_dict(),
    }


def _label(predictor: Predictor, image: RowReader, tiling: Tiling, labels: "PartialLabels", name: str) -> int:
    net, height = predictor.net, image.hw[0]
    tiles = count_tiles(image.hw, net.preprocessing, tiling, align_corners=net.config.align_corners)
    if labels.finished:
        logger.info(f"{name}: {labels.finished} of {height} rows are there from an earlier run; continuing after them")
    if labels.finished < height:
        with tqdm(total=height, initial=labels.finished, unit="row", desc=name, disable=None, dynamic_ncols=True) as bar:
            for top, labels_HW in predictor.predict_bands(image, tiling, first_row=labels.finished):
                labels.append(labels_HW)
                bar.update(len(labels_HW))
                if top + len(labels_HW) - labels.finished >= _BAND_ROWS:
                    labels.commit()
            labels.commit()
    return tiles


def _class_pixel_counts(labels: "PartialLabels", classes: int) -> PixelCounts:
    counts = np.zeros(classes, np.int64)
    for top in range(0, labels.hw[0], _BAND_ROWS):
        counts += count_pixels(labels.rows(top, min(labels.hw[0], top + _BAND_ROWS)), classes)
    return counts


def _subsampled(image: RowReader, labels: "PartialLabels", predictor: Predictor) -> Result:
    """Return every k-th pixel of image and labels, for an overlay of at most OVERLAY_SIDE pixels a side."""
    height, width = image.hw
    k = math.ceil(max(height, width) / OVERLAY_SIDE)
    if k > 1:
        logger.info(f"the overlay is drawn at 1/{k} of the image's size; labels and areas are of every pixel")
    rows: list[Labels] = []
    pixels = []
    for row in range(0, height, k):
        pixels.append(image.rows(row, row + 1)[0, ::k].copy())
        rows.append(labels.rows(row, row + 1)[0, ::k])
    return Result(np.stack(pixels), np.stack(rows), predictor.net.classes, predictor.net.palette, 0.0)


def require_label_suffix(path: Path) -> None:
    """Raise UsageError unless labels can be written into `path` row by row with the installed packages."""
    if path.suffix.lower() not in LABEL_SUFFIXES:
        raise UsageError(
            f"'{path}' cannot hold a large map of labels; use a file name that ends in {', '.join(LABEL_SUFFIXES)}."
        )
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
    """Write labels atomically, holding one band of rows at a time.

    Args:
        path: `.png` for a palette PNG (16-bit grey above 256 classes); `.tif` or `.tiff` for deflated tiles of 256 x 256 with
            the same palette, BigTIFF where the file may exceed 4 GB.
        hw: Height and width of the labels, in pixels.
        dtype: uint8 or uint16.
        read_rows: Returns the labels of a range of rows.
        palette: One (red, green, blue) per class.
        stamp: Hash of what the labels were made of, kept as text in a PNG.

    Raises:
        UsageError: Another suffix, or tifffile is not installed.
        OutputError: The file cannot be written.
    """
    require_label_suffix(path)
    if path.suffix.lower() == ".png":
        write_atomically(path, lambda file: _write_png(file, hw, dtype, read_rows, palette, stamp))
    else:
        write_atomically(path, lambda file: _write_tiff(file, hw, dtype, read_rows, palette))


def _write_png(
    file: BinaryIO, hw: tuple[int, int], dtype: np.dtype[Any], read_rows: ReadRows, palette: Sequence[Color], stamp: str | None
) -> None:
    """Write a PNG (ISO 15948): header, palette, one zlib stream of unfiltered rows cut into IDAT chunks, end."""
    height, width = hw
    indexed = dtype == np.uint8
    file.write(b"\x89PNG\r\n\x1a\n")
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8 if indexed else 16, 3 if indexed else 0, 0, 0, 0))
    if indexed:
        _chunk(file, b"PLTE", bytes(value for color in palette[:256] for value in color))
    if stamp is not None:
        _chunk(file, b"tEXt", f"{STAMP_KEY}\0{stamp}".encode("latin-1"))
    stream = zlib.compressobj(6)
    step = max(1, 2**22 // width)
    for top in range(0, height, step):
        labels_HW = read_rows(top, min(height, top + step))
        stored = labels_HW if indexed else labels_HW.astype(">u2")
        as_bytes = np.ascontiguousarray(stored).view(np.uint8).reshape(len(labels_HW), -1)
        with_filter = np.concatenate([np.zeros((len(as_bytes), 1), np.uint8), as_bytes], axis=1)  # filter type 0: none
        if data := stream.compress(with_filter.tobytes()):
            _chunk(file, b"IDAT", data)
    _chunk(file, b"IDAT", stream.flush())
    _chunk(file, b"IEND", b"")


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _write_tiff(
    file: BinaryIO, hw: tuple[int, int], dtype: np.dtype[Any], read_rows: ReadRows, palette: Sequence[Color]
) -> None:
    options: dict[str, Any] = {"photometric": "minisblack"}
    if dtype == np.uint8:
        colors_3N = np.zeros((3, 256), np.uint16)
        colors_3N[:, : len(palette)] = np.array(palette[:256], np.uint16).T * 257
        options = {"photometric": "palette", "colormap": colors_3N}
    with _import_tifffile().TiffWriter(file, bigtiff=hw[0] * hw[1] * dtype.itemsize > _BIG_TIFF_BYTES) as writer:
        writer.write(
            _tiles(hw, read_rows),
            shape=hw,
            dtype=dtype,
            tile=(TILE_SIDE, TILE_SIDE),
            compression="zlib",
            metadata=None,
            **options,
        )


def _tiles(hw: tuple[int, int], read_rows: ReadRows) -> Iterator[Labels]:
    height, width = hw
    for top in range(0, height, TILE_SIDE):
        band_HW = read_rows(top, min(height, top + TILE_SIDE))
        for left in range(0, width, TILE_SIDE):
            part_HW = band_HW[:, left : left + TILE_SIDE]
            missing = [(0, TILE_SIDE - side) for side in part_HW.shape]
            yield np.pad(part_HW, missing) if any(after for _, after in missing) else np.ascontiguousarray(part_HW)


def _import_tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise UsageError(
            "Writing a TIFF of labels needs tifffile (pip install 'deeplabzoo[large]'), or a name that ends in .png."
        ) from None
    return tifffile


class PartialLabels:
    """Labels of an unfinished image in two files beside the output; `finished` rows survive the end of the process.

    `.NAME.rows` holds the raw labels, `.NAME.progress` the number of rows that count. The second is replaced only after the
    rows are on the disk, so it never counts rows that are not there. Use as a context manager.

    Args:
        output: File that the labels will be written to.
        hw: Height and width of the labels, in pixels.
        dtype: uint8 or uint16.
        facts: What the labels are made of (image, weights, tiles); rows that were made of something else are not used.

    Raises:
        OutputError: The files cannot be written, or another process is writing them.
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
        self._file.seek(self.finished * self._row_bytes)  # uncommitted rows beyond are overwritten
        self._appended = self.finished
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()

    def append(self, labels_HW: Labels) -> None:
        """Add rows below those that are there; they count after `commit`."""
        self._file.write(np.ascontiguousarray(labels_HW, self.dtype).tobytes())
        self._appended += len(labels_HW)

    def commit(self) -> None:
        """Write all appended rows to the disk and count them; raises OutputError where the disk is full."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"Cannot write '{self._rows}': {error.strerror or error}.") from None
        self.finished = self._appended
        text = json.dumps({"identity": self._identity, "rows": self.finished})
        write_atomically(self._progress, lambda file: file.write(text.encode()))

    def rows(self, top: int, bottom: int) -> Labels:
        """Return committed rows `top` to `bottom` (exclusive)."""
        self._file.seek(top * self._row_bytes)
        data = self._file.read((bottom - top) * self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(bottom - top, self.hw[1])

    def remove(self) -> None:
        """Delete the files: first the progress, so that it never counts rows that are not there."""
        self._progress.unlink(missing_ok=True)
        remove_partial_files(self._progress)  # of a run that was killed while it committed
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
    """Return `.NAME.ending` next to the output; a name too long for a file system keeps its beginning and a hash."""
    name = output.name
    if len(os.fsencode(name)) > _LONG_NAME_BYTES:
        name = f"{name[:20]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return output.with_name(f".{name}.{ending}")
