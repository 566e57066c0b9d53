"""Rows of a picture from top to bottom, so that a large one need not be in memory: arrays, decoded photos, TIFFs."""

import contextlib
import logging
import math
import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from deeplabzoo.data.image_io import MAX_PIXELS, ImageSource, Pixels, error_reason, read_image
from deeplabzoo.errors import ImageError
from deeplabzoo.log import logger

# Windows of a TIFF file: only the tiles or strips that rows touch are read and decoded (tifffile, an extra).


_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
_MAX_SEGMENT_BYTES = 2**28
"""Decoded size of one tile or strip above which a file counts as not made for windows."""
_MAX_ROW_BYTES = 2**30
"""The same of a whole row of tiles: what is held while it is read."""
_DEFLATED = ("ADOBE_DEFLATE", "DEFLATE")
_ALWAYS_ALLOWED_BYTES = 2**18
"""A deflated segment up to this size cannot become larger than 2**28 bytes."""
_decoder_log = logging.getLogger("tifffile")


class TiffRowReader:
    """The first picture of a TIFF file: tiled or in strips, BigTIFF too, 8 or 16 bits, grey, palette, RGB or with alpha.

    Pixels are those that `read_image` gives. One row of tiles or strips stays decoded, since rows are asked for in order.
    """

    def __init__(self, path: Path, file: Any, page: Any, handle: BinaryIO) -> None:
        self.path, self._file, self._page = path, file, page
        self.close = weakref.finalize(self, handle.close)
        """Close the file; so does the end of this object."""
        self.hw: tuple[int, int] = (int(page.imagelength), int(page.imagewidth))
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, self.hw[0]), self.hw[1])
        self._segment_hw = (int(rows), int(columns))
        self._decoded: OrderedDict[int, np.ndarray[Any, Any]] = OrderedDict()

    @property
    def segment_bytes(self) -> int:
        """Decoded size of one tile or strip."""
        return math.prod(self._segment_hw) * self._pixel_bytes

    @property
    def row_bytes(self) -> int:
        """Decoded size of a row of tiles, or of a strip."""
        return min(self._segment_hw[0], self.hw[0]) * self.hw[1] * self._pixel_bytes

    @property
    def _pixel_bytes(self) -> int:
        return int(self._page.samplesperpixel) * int(self._page.bitspersample) // 8

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return rows `top` to `bottom` (without it) as uint8 RGB; raises ImageError where the file is damaged there."""
        try:
            with _quiet_tifffile():
                return self._rows(top, bottom)
        except MemoryError:
            raise ImageError(f"'{self.path}' is too wide for the memory that is left; cut it into narrower pictures.") from None
        except Exception as error:  # damaged data ends in whatever the decoder raises
            raise ImageError(f"'{self.path}' is damaged or cut short ({error_reason(error)}).") from None

    def _rows(self, top: int, bottom: int) -> Pixels:
        step = self._segment_hw[0]
        out = np.empty((bottom - top, self.hw[1], 3), np.uint8)
        for segment_row in range(top // step, -(-bottom // step)):
            first = segment_row * step
            decoded_HWC = self._segment_row(segment_row)
            begin, end = max(top, first), min(bottom, first + len(decoded_HWC))
            out[begin - top : end - top] = self._as_rgb(decoded_HWC[begin - first : end - first])
        return out

    def _segment_row(self, segment_row: int) -> np.ndarray[Any, Any]:
        """Return a row of tiles, or a strip, as stored: rows x width x samples."""
        if segment_row in self._decoded:
            return self._decoded[segment_row]
        height, width = self.hw
        rows, columns = self._segment_hw
        across = -(-width // columns)
        samples = int(self._page.samplesperpixel)
        out = np.zeros((min(rows, height - segment_row * rows), width, samples), self._page.dtype)
        for column in range(across):
            values = self._segment(segment_row * across + column)
            if values is not None:
                left = column * columns
                values_HWC = values[0, : len(out), : width - left]
                out[: values_HWC.shape[0], left : left + values_HWC.shape[1]] = values_HWC
        self._decoded.clear()
        self._decoded[segment_row] = out
        return out

    def _segment(self, index: int) -> Any:
        page, handle = self._page, self._file.filehandle
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
            return None  # a sparse file leaves out what is empty
        if offset + count > handle.size:
            raise ValueError(f"{max(0, handle.size - offset)} of {count} bytes are there")
        handle.seek(offset)
        data = handle.read(count)
        if count > _ALWAYS_ALLOWED_BYTES and page.compression.name in _DEFLATED:
            _require_small_segment(data, 2 * self.segment_bytes)
        return page.decode(data, index, jpegtables=page.jpegtables)[0]

    def _as_rgb(self, values_HWC: np.ndarray[Any, Any]) -> Pixels:
        page = self._page
        if page.photometric.name == "PALETTE":
            values_HWC = np.moveaxis(page.colormap, 0, -1)[values_HWC[..., 0]]
        elif page.photometric.name == "MINISWHITE":
            values_HWC = np.iinfo(values_HWC.dtype).max - values_HWC
        doubled = np.repeat(values_HWC, 2, axis=0) if len(values_HWC) == 1 else values_HWC  # one row alone is no picture
        return read_image(doubled)[: len(values_HWC)]


def open_tiff(path: Path) -> TiffRowReader | None:
    """Return the windows of a TIFF file; None for another kind of file, or one that cannot be read so (said in one line)."""
    if path.suffix.lower() not in _SUFFIXES or not path.is_file():
        return None
    try:
        import tifffile
    except ImportError:
        logger.info(f"{path.name} is decoded whole: windows of a TIFF need tifffile (pip install 'deeplabzoo[large]')")
        return None
    with contextlib.ExitStack() as on_failure:
        try:
            with _quiet_tifffile():
                handle = on_failure.enter_context(path.open("rb"))
                file = on_failure.enter_context(tifffile.TiffFile(handle))
                page = file.pages.first
                obstacle = _unsupported_reason(page)
                windows = TiffRowReader(path, file, page, handle) if not obstacle else None
                obstacle = obstacle or _no_savings_reason(windows)
        except Exception as error:  # damaged headers end in whatever the parser raises
            known = isinstance(error, tifffile.TiffFileError)
            logger.info(f"{path.name} is not read in windows: {error_reason(error) if known else 'its header is damaged'}")
            return None
        if not obstacle:
            on_failure.pop_all()
            return windows
    logger.info(f"{path.name} is decoded whole: {obstacle}")
    return None


def _no_savings_reason(windows: TiffRowReader | None) -> str:
    """Return why windows would not save memory, in words; empty where they do."""
    if windows is not None and windows.segment_bytes > _MAX_SEGMENT_BYTES:
        return f"one tile or strip of it holds {windows.segment_bytes / 1e6:.0f} MB"
    if windows is not None and windows.row_bytes > _MAX_ROW_BYTES:
        return f"one row of its tiles holds {windows.row_bytes / 1e6:.0f} MB"
    return ""


def _require_small_segment(deflated: bytes, max_bytes: int) -> None:
    """Raise ValueError for a segment that inflates to more: tifffile would hold all of it."""
    if len(zlib.decompressobj().decompress(deflated, max_bytes + 1)) > max_bytes:
        raise ValueError(f"a tile or strip of it inflates to more than {max_bytes} bytes")


@contextlib.contextmanager
def _quiet_tifffile() -> Iterator[None]:
    """Keep tifffile from logging damage that is told in a sentence of ours."""
    before, _decoder_log.disabled = _decoder_log.disabled, True
    try:
        yield
    finally:
        _decoder_log.disabled = before


def _unsupported_reason(page: Any) -> str:
    """Return why a page cannot be read in windows as it should look, in words; empty where it can."""
    samples, photometric = int(page.samplesperpixel), page.photometric.name
    orientation = page.tags.get("Orientation")
    if orientation is not None and int(orientation.value) not in (0, 1):
        return "it is stored turned"
    if photometric not in ("RGB", "MINISBLACK", "MINISWHITE", "PALETTE"):
        return f"its colours are {photometric}"
    if str(page.dtype) not in ("uint8", "uint16") or int(page.bitspersample) not in (8, 16):
        return f"its values are {page.dtype} of {page.bitspersample} bits"
    if photometric == "PALETTE" and getattr(page.colormap, "shape", None) != (3, 2 ** int(page.bitspersample)):
        return "it has no palette for all of its values"
    if page.compression.name in ("LZMA", "ZSTD"):
        return f"{page.compression.name} cannot be held to a size"
    if samples not in (1, 2, 3, 4) or (samples > 1 and int(page.planarconfig) != 1):
        return f"its {samples} channels are not stored pixel by pixel"
    if page.imagedepth != 1:
        return "it is a volume"
    if page.decode.__name__.startswith("decode_raise"):  # how tifffile keeps a reason for later
        return f"tifffile decodes {page.compression.name} with the package imagecodecs alone"
    return ""


_MAX_RESIZE_PIXELS = 2**24
"""Pixels of the source that one step of a resize reads."""

_MAX_SIDE = 2**20
"""Side in pixels above which the header of a TIFF is not believed unless a limit was set: rows are held whole."""


class RowReader(Protocol):
    """A picture that gives its rows when asked."""

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return rows `top` to `bottom` (without it) as uint8 RGB, rows x width x 3."""
        ...


class ArrayRowReader:
    """A picture that is in memory."""

    def __init__(self, image_HWC: Pixels) -> None:
        self._image_HWC = image_HWC
        self.hw = (image_HWC.shape[0], image_HWC.shape[1])

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return a view of the rows."""
        return self._image_HWC[top:bottom]


class ResizedRowReader:
    """A picture brought to another size, row by row: what is read once and still needed is kept.

    Bilinear with antialiasing, by Pillow on a window that has its neighbours beside it: the same pixels as of the whole
    picture, however it is cut. Rows must be asked for from top to bottom.
    """

    def __init__(self, picture: RowReader, hw: tuple[int, int]) -> None:
        self._picture, self.hw = picture, hw
        self._top = 0
        self._bytes_on_disk: Pixels = np.zeros((0, hw[1], 3), np.uint8)

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return rows `top` to `bottom` (without it), uint8 RGB; `top` must not be above that of the last call."""
        held_to = self._top + len(self._bytes_on_disk)
        new = self._read(max(top, held_to), bottom)
        kept = self._bytes_on_disk[top - self._top :]
        self._bytes_on_disk, self._top = (np.concatenate([kept, new]) if len(kept) else new), top
        return self._bytes_on_disk

    def _read(self, top: int, bottom: int) -> Pixels:
        if self.hw == self._picture.hw:
            return self._picture.rows(top, bottom)
        out = np.empty((max(0, bottom - top), self.hw[1], 3), np.uint8)
        ratio = self._picture.hw[0] / self.hw[0]
        step = max(1, int(_MAX_RESIZE_PIXELS / (ratio * self._picture.hw[1])))
        for at in range(top, bottom, step):
            out[at - top : at - top + step] = self._resized(at, min(bottom, at + step), ratio)
        return out

    def _resized(self, top: int, bottom: int, ratio: float) -> Pixels:
        height, width = self._picture.hw
        reach = math.ceil(max(1.0, ratio)) + 1  # of the filter, in pixels of the source
        first, last = max(0, int(top * ratio) - reach), min(height, math.ceil(bottom * ratio) + reach)
        window = Image.fromarray(self._picture.rows(first, last))
        box = (0.0, top * ratio - first, float(width), min(bottom * ratio - first, float(last - first)))
        return np.asarray(window.resize((self.hw[1], bottom - top), Image.Resampling.BILINEAR, box=box))


def open_row_reader(source: ImageSource, *, max_pixels: int | None = None) -> RowReader:
    """Return the rows of a picture: windows of a TIFF that can be read in windows, else of the picture decoded whole.

    A TIFF needs tifffile (`pip install "deeplabzoo[large]"`) and is read tile by tile or strip by strip, whatever its size. All
    else, and a TIFF whose layout does not allow it (said in one line), Pillow decodes whole: 3 bytes a pixel, so 300 MB for
    10 000 x 10 000. Beyond `max_pixels` that is refused (ImageError); None means `MAX_PIXELS` for what is decoded whole, and no
    limit for windows but a side of 2^20 pixels.
    """
    if isinstance(source, str | os.PathLike):
        windows = open_tiff(Path(source))
        if windows is not None:
            _check(windows, source, max_pixels)
            return windows
    return ArrayRowReader(read_image(source, max_pixels=max_pixels or MAX_PIXELS))


def _check(windows: TiffRowReader, source: Any, max_pixels: int | None) -> None:
    height, width = windows.hw
    if min(height, width) < 2:
        raise ImageError(f"'{source}' is {width} x {height} pixels (width x height), expected at least 2 x 2.")
    if max_pixels is None and max(height, width) > _MAX_SIDE:
        raise ImageError(
            f"'{source}' declares {width} x {height} pixels, a side above {_MAX_SIDE}, which is taken for damage; "
            "set max_pixels (predict --max-pixels) if you trust it."
        )
    if max_pixels is not None and height * width > max_pixels:
        raise ImageError(f"'{source}' has {width} x {height} pixels, more than the limit of {max_pixels} that was set.")
