"""Images read row by row (arrays, TIFFs in windows), so that a large one need not be in memory, and images of N channels."""

import contextlib
import logging
import math
import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from deeplabzoo.data.image_file import decode_image, error_reason, open_image, require_file
from deeplabzoo.data.image_io import MAX_PIXELS, ImageSource, Pixels, read_image, warn_once_per_folder
from deeplabzoo.errors import ImageError
from deeplabzoo.log import logger
from deeplabzoo.optional_imports import require_module
from deeplabzoo.processing.preprocessing import InputPixels, with_channels

_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
_MAX_SEGMENT_BYTES = 2**28
"""Decoded size of one tile or strip above which a TIFF is decoded whole."""
_MAX_ROW_BYTES = 2**30
"""Decoded size of a whole row of tiles, which is held while it is read, above which a TIFF is decoded whole."""
_DEFLATED = ("ADOBE_DEFLATE", "DEFLATE")
_ALWAYS_ALLOWED_BYTES = 2**18
"""A deflated segment up to this size cannot inflate to more than 2**28 bytes."""
_MAX_RESIZE_PIXELS = 2**24
"""Pixels of the source that one step of a resize reads."""
_MAX_SIDE = 2**20
"""Side in pixels above which a TIFF's header is taken for damaged unless a limit was set: whole rows are held."""
_decoder_log = logging.getLogger("tifffile")


class RowReader(Protocol):
    """An image that returns its rows on request."""

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return rows `top` to `bottom` (exclusive), rows x width x 3, RGB uint8."""
        ...


class ArrayRowReader:
    """The rows of an image in memory.

    Args:
        image_HWC: Pixels, H x W x 3, RGB uint8.
    """

    def __init__(self, image_HWC: Pixels) -> None:
        self._image_HWC = image_HWC
        self.hw = (image_HWC.shape[0], image_HWC.shape[1])

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return a view of rows `top` to `bottom` (exclusive)."""
        return self._image_HWC[top:bottom]


class TiffRowReader:
    """The first image of a TIFF file in tiles or strips, BigTIFF too, 8 or 16 bits, grey, palette, RGB or with alpha.

    The pixels are those that `read_image` returns. One row of tiles or strips stays decoded, as rows are requested in order.
    """

    def __init__(self, path: Path, file: Any, page: Any, handle: BinaryIO) -> None:
        self.path, self._file, self._page = path, file, page
        self.close = weakref.finalize(self, handle.close)
        """Close the file; garbage collection of this object closes it too."""
        self.hw: tuple[int, int] = (int(page.imagelength), int(page.imagewidth))
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, self.hw[0]), self.hw[1])
        self._segment_hw = (int(rows), int(columns))
        self._planes = int(page.samplesperpixel) if int(page.planarconfig) != 1 else 1
        self._decoded: tuple[int, np.ndarray[Any, Any]] | None = None

    @property
    def segment_bytes(self) -> int:
        """Decoded size of one tile or strip."""
        return math.prod(self._segment_hw) * self._pixel_bytes // self._planes

    @property
    def row_bytes(self) -> int:
        """Decoded size of a row of tiles, or of a strip."""
        return min(self._segment_hw[0], self.hw[0]) * self.hw[1] * self._pixel_bytes

    @property
    def _pixel_bytes(self) -> int:
        return int(self._page.samplesperpixel) * int(self._page.bitspersample) // 8

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return rows `top` to `bottom` (exclusive), rows x width x 3, RGB uint8; raises ImageError where they are damaged."""
        return self._as_rgb(self.samples(top, bottom))

    def samples(self, top: int, bottom: int) -> np.ndarray[Any, Any]:
        """Return rows `top` to `bottom` (exclusive) as stored: rows x width x samples, uint8 or uint16; raises ImageError."""
        step = self._segment_hw[0]
        out = np.empty((bottom - top, self.hw[1], int(self._page.samplesperpixel)), self._page.dtype)
        try:
            with _quiet_tifffile():
                for segment_row in range(top // step, -(-bottom // step)):
                    first = segment_row * step
                    decoded_HWC = self._segment_row(segment_row)
                    begin, end = max(top, first), min(bottom, first + len(decoded_HWC))
                    out[begin - top : end - top] = decoded_HWC[begin - first : end - first]
        except MemoryError:
            raise ImageError(f"'{self.path}' is too wide for the available memory; cut it into narrower images.") from None
        except Exception as error:  # damaged data makes decoders raise any type of exception
            raise ImageError(f"'{self.path}' is damaged or cut short ({error_reason(error)}).") from None
        return out

    def _segment_row(self, segment_row: int) -> np.ndarray[Any, Any]:
        """Return a row of tiles, or a strip, as stored: rows x width x samples."""
        if self._decoded is not None and self._decoded[0] == segment_row:
            return self._decoded[1]
        height, width = self.hw
        rows, columns = self._segment_hw
        across, down = -(-width // columns), -(-height // rows)
        samples = int(self._page.samplesperpixel)
        out = np.zeros((min(rows, height - segment_row * rows), width, samples), self._page.dtype)
        for plane in range(self._planes):
            channels = slice(plane, plane + 1) if self._planes > 1 else slice(None)
            for column in range(across):
                values = self._segment((plane * down + segment_row) * across + column)
                if values is not None:
                    left = column * columns
                    values_HWC = values[0, : len(out), : width - left]
                    out[: values_HWC.shape[0], left : left + values_HWC.shape[1], channels] = values_HWC
        self._decoded = (segment_row, out)
        return out

    def _segment(self, index: int) -> Any:
        page, handle = self._page, self._file.filehandle
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
            return None  # a sparse file omits empty segments
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
        if values_HWC.shape[2] >= 3 and values_HWC.dtype == np.uint16:
            values_HWC = (values_HWC >> 8).astype(np.uint8)  # as Pillow decodes 16-bit colours and palettes
        if page.photometric.name == "MINISWHITE":
            values_HWC = np.iinfo(values_HWC.dtype).max - values_HWC
        elif (kind := _fourth_band(page)) is not None and kind != _UNASSOCIATED_ALPHA:
            values_HWC = _without_alpha(values_HWC) if kind == _UNSPECIFIED else _unpremultiplied(values_HWC)
        # read_image takes no array of a single row
        doubled = np.repeat(values_HWC, 2, axis=0) if len(values_HWC) == 1 else values_HWC
        return read_image(doubled)[: len(values_HWC)]


_UNSPECIFIED, _ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA = 0, 1, 2
"""Meanings of a band beyond the colours (TIFF 6.0, ExtraSamples)."""


def _fourth_band(page: Any) -> int | None:
    """Return what the band after grey or RGB means; None where there is none. Without the tag its meaning is unspecified."""
    colors = 3 if page.photometric.name == "RGB" else 1
    if int(page.samplesperpixel) <= colors:
        return None
    kinds = tuple(int(kind) for kind in page.extrasamples or ())
    return kinds[0] if kinds else _UNSPECIFIED


def _without_alpha(values_HWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(values_HWC[..., : 3 if values_HWC.shape[2] > 3 else 1])


def _unpremultiplied(values_HWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return colours that were stored multiplied by their alpha as Pillow decodes them: value * 255 // alpha, at most 255."""
    alpha_HW1 = values_HWC[..., -1:].astype(np.uint32)
    most = int(np.iinfo(values_HWC.dtype).max)
    colors = np.minimum(values_HWC[..., :-1].astype(np.uint64) * most // np.maximum(alpha_HW1, 1), most)
    colors = np.where(alpha_HW1 == 0, values_HWC[..., :-1], colors)
    return np.concatenate([colors.astype(values_HWC.dtype), values_HWC[..., -1:]], axis=2)


def open_tiff(path: Path) -> TiffRowReader | None:
    """Return a reader of a TIFF file's windows.

    Returns:
        None for another kind of file, and, after one line in the log, for a TIFF that cannot be read in windows.
    """
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
                obstacle = _unsupported_reason(page) or _unsupported_colors(page)
                reader = TiffRowReader(path, file, page, handle) if not obstacle else None
                obstacle = obstacle or _size_obstacle(reader)
        except Exception as error:  # damaged headers make the parser raise any type of exception
            known = isinstance(error, tifffile.TiffFileError)
            logger.info(f"{path.name} is not read in windows: {error_reason(error) if known else 'its header is damaged'}")
            return None
        if not obstacle:
            on_failure.pop_all()
            if _fourth_band(page) == _UNSPECIFIED:
                warn_once_per_folder(path, "bands", f"'{path}' has more channels than its colours, which are ignored.")
            return reader
    logger.info(f"{path.name} is decoded whole: {obstacle}")
    return None


def _size_obstacle(reader: TiffRowReader | None) -> str:
    """Return why reading in windows would not save memory, in words; empty where it does."""
    if reader is not None and reader.segment_bytes > _MAX_SEGMENT_BYTES:
        return f"one tile or strip of it holds {reader.segment_bytes / 1e6:.0f} MB"
    if reader is not None and reader.row_bytes > _MAX_ROW_BYTES:
        return f"one row of its tiles holds {reader.row_bytes / 1e6:.0f} MB"
    return ""


def _require_small_segment(deflated: bytes, max_bytes: int) -> None:
    """Raise ValueError for a segment that inflates to more: tifffile would hold all of it."""
    if len(zlib.decompressobj().decompress(deflated, max_bytes + 1)) > max_bytes:
        raise ValueError(f"a tile or strip of it inflates to more than {max_bytes} bytes")


@contextlib.contextmanager
def _quiet_tifffile() -> Iterator[None]:
    """Keep tifffile from logging damage that an ImageError reports."""
    before, _decoder_log.disabled = _decoder_log.disabled, True
    try:
        yield
    finally:
        _decoder_log.disabled = before


def _unsupported_colors(page: Any) -> str:
    """Return why a page's samples cannot be turned into RGB as `read_image` does, in words; empty where they can."""
    samples, photometric = int(page.samplesperpixel), page.photometric.name
    if photometric not in ("RGB", "MINISBLACK", "MINISWHITE", "PALETTE"):
        return f"its colours are {photometric}"
    if photometric == "PALETTE" and getattr(page.colormap, "shape", None) != (3, 2 ** int(page.bitspersample)):
        return "it has no palette for all of its values"
    most = {"RGB": 4, "MINISBLACK": 2}.get(photometric, 1)
    if not (3 if photometric == "RGB" else 1) <= samples <= most or (samples > 1 and int(page.planarconfig) != 1):
        return f"its {samples} channels are not stored pixel by pixel as grey or RGB"
    if _fourth_band(page) not in (None, _UNSPECIFIED, _ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA):
        return "its last channel has an unknown meaning"
    return ""


def _unsupported_reason(page: Any) -> str:
    """Return why a page's samples cannot be decoded in windows, in words; empty where they can."""
    orientation = page.tags.get("Orientation")
    if orientation is not None and int(orientation.value) not in (0, 1):
        return "it is stored turned"
    if str(page.dtype) not in ("uint8", "uint16") or int(page.bitspersample) not in (8, 16):
        return f"its values are {page.dtype} of {page.bitspersample} bits"
    if page.compression.name in ("LZMA", "ZSTD"):
        return f"the size of its {page.compression.name} segments cannot be limited"
    if page.imagedepth != 1:
        return "it is a volume"
    if page.decode.__name__.startswith("decode_raise"):  # tifffile's placeholder where a codec is missing
        return f"tifffile decodes {page.compression.name} only with the package imagecodecs"
    return ""


class ResizedRowReader:
    """An image resized row by row; rows that were read and are still needed are kept.

    Bilinear with antialiasing, by Pillow on a window that includes the neighbours: the same pixels as of the whole image,
    however it is cut. Rows must be requested from top to bottom.

    Args:
        image: The image at its own size.
        hw: Height and width to resize to, in pixels.
    """

    def __init__(self, image: RowReader, hw: tuple[int, int]) -> None:
        self._image, self.hw = image, hw
        self._top = 0
        self._kept: Pixels = np.zeros((0, hw[1], 3), np.uint8)

    def rows(self, top: int, bottom: int) -> Pixels:
        """Return rows `top` to `bottom` (exclusive), RGB uint8; `top` must not be above that of the last call."""
        held_to = self._top + len(self._kept)
        new = self._read(max(top, held_to), bottom)
        kept = self._kept[top - self._top :]
        self._kept, self._top = (np.concatenate([kept, new]) if len(kept) else new), top
        return self._kept

    def _read(self, top: int, bottom: int) -> Pixels:
        if self.hw == self._image.hw:
            return self._image.rows(top, bottom)
        out = np.empty((max(0, bottom - top), self.hw[1], 3), np.uint8)
        ratio = self._image.hw[0] / self.hw[0]
        step = max(1, int(_MAX_RESIZE_PIXELS / (ratio * self._image.hw[1])))
        for at in range(top, bottom, step):
            out[at - top : at - top + step] = self._resized(at, min(bottom, at + step), ratio)
        return out

    def _resized(self, top: int, bottom: int, ratio: float) -> Pixels:
        height, width = self._image.hw
        reach = math.ceil(max(1.0, ratio)) + 1  # of the filter, in pixels of the source
        first, last = max(0, int(top * ratio) - reach), min(height, math.ceil(bottom * ratio) + reach)
        window = Image.fromarray(self._image.rows(first, last))
        box = (0.0, top * ratio - first, float(width), min(bottom * ratio - first, float(last - first)))
        return np.asarray(window.resize((self.hw[1], bottom - top), Image.Resampling.BILINEAR, box=box))


def open_row_reader(source: ImageSource, *, max_pixels: int | None = None) -> RowReader:
    """Return the rows of an image: windows of a TIFF where its layout allows it, else rows of the image decoded whole.

    Windows need tifffile (`pip install "deeplabzoo[large]"`). Everything else is decoded whole by Pillow: 3 bytes a pixel, so
    300 MB for 10 000 x 10 000.

    Args:
        source: Path, Pillow image or array.
        max_pixels: Largest image that is read; None means `MAX_PIXELS` for what is decoded whole, and for windows no limit but
            a side of 2^20 pixels.

    Raises:
        ImageError: The image cannot be read or is too large.
    """
    if isinstance(source, str | os.PathLike):
        windows = open_tiff(Path(source))
        if windows is not None:
            _check_size(windows, source, max_pixels)
            return windows
    return ArrayRowReader(read_image(source, max_pixels=max_pixels or MAX_PIXELS))


def _check_size(windows: TiffRowReader, source: Any, max_pixels: int | None) -> None:
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


def read_input(source: ImageSource, channels: int, *, max_pixels: int = MAX_PIXELS) -> tuple[InputPixels, Pixels]:
    """Return an image as input of a model that takes `channels` channels, and as RGB to draw on.

    Models of 3 channels get what `read_image` returns, those of 1 channel its grey values. Models of other numbers of channels
    get arrays H x W x channels, `.npy` files of such arrays, TIFF files of so many samples (tifffile) and, for 4 channels,
    RGBA images; uint8 or uint16, the latter divided by 257 without rounding.

    Args:
        source: Path, Pillow image or array.
        channels: Channels of the model's input (`net.config.in_chans`).
        max_pixels: Largest image that is read, in pixels.

    Returns:
        Input, H x W x channels, uint8 or float32 in 0...255; RGB, H x W x 3 uint8: the first three channels, or the first one
        as grey.

    Raises:
        ImageError: The image cannot be read, or has another number of channels.
    """
    is_npy = isinstance(source, str | os.PathLike) and Path(source).suffix.lower() == ".npy"
    if channels in (1, 3):
        image_HWC = read_image(_read_npy(Path(source), max_pixels) if is_npy else source, max_pixels=max_pixels)  # type: ignore[arg-type]
        return with_channels(image_HWC, channels), image_HWC
    samples_HWC, name = _read_samples(source, channels, max_pixels, is_npy=is_npy)
    if samples_HWC.ndim != 3 or samples_HWC.shape[2] != channels:
        raise ImageError(
            f"{name} has shape {samples_HWC.shape}, and the model takes {channels} channels; expected H x W x {channels}."
        )
    if min(samples_HWC.shape[:2]) < 2 or samples_HWC.dtype not in (np.uint8, np.uint16):
        raise ImageError(
            f"{name} holds {samples_HWC.dtype} of shape {samples_HWC.shape}, expected uint8 or uint16 of at least 2 x 2 pixels."
        )
    image_HWC = read_image(np.ascontiguousarray(samples_HWC[..., : 3 if channels > 3 else 1]))
    if samples_HWC.dtype == np.uint16:
        return samples_HWC.astype(np.float32) / np.float32(257), image_HWC
    return np.ascontiguousarray(samples_HWC), image_HWC


def _read_samples(source: Any, channels: int, max_pixels: int, *, is_npy: bool) -> tuple[np.ndarray[Any, Any], str]:
    if isinstance(source, np.ndarray):
        return source, "The array"
    if isinstance(source, Image.Image):
        return np.asarray(source), "The image"
    path = require_file(source)
    if is_npy:
        return _read_npy(path, max_pixels), f"'{path}'"
    if path.suffix.lower() in _SUFFIXES:
        return _read_tiff_samples(path, max_pixels), f"'{path}'"
    with open_image(path, f"'{path}'", max_pixels) as image:
        upright = decode_image(image, f"'{path}'", max_pixels)
        if upright.mode != "RGBA" or channels != 4:
            raise ImageError(
                f"'{path}' has pixels of mode {upright.mode}, and the model takes {channels} channels; give an array, a .npy "
                f"or a TIFF file of {channels} channels."
            )
        return np.asarray(upright), f"'{path}'"


def _read_npy(path: Path, max_pixels: int) -> np.ndarray[Any, Any]:
    path = require_file(path)
    try:
        mapped: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        if mapped.ndim < 2 or math.prod(mapped.shape[:2]) > max_pixels:
            raise ImageError(
                f"'{path}' holds an array of shape {mapped.shape}, expected H x W x channels of at most {max_pixels} pixels."
            )
        return np.array(mapped)
    except (OSError, ValueError, EOFError, TypeError, SyntaxError) as error:
        raise ImageError(f"'{path}' is not a NumPy file of numbers ({error_reason(error)}).") from None


def _read_tiff_samples(path: Path, max_pixels: int) -> np.ndarray[Any, Any]:
    tifffile = require_module("tifffile", extra="large", purpose="reading a TIFF of several channels")
    try:
        with _quiet_tifffile(), path.open("rb") as handle, tifffile.TiffFile(handle) as file:
            page = file.pages.first
            obstacle = _unsupported_reason(page)
            reader = TiffRowReader(path, file, page, handle)
            obstacle = obstacle or _size_obstacle(reader)
            if obstacle:
                raise ImageError(f"'{path}' cannot be read as channels: {obstacle}.")
            _check_size(reader, path, max_pixels)
            return reader.samples(0, reader.hw[0])
    except ImageError:
        raise
    except Exception as error:  # damaged headers make the parser raise any type of exception
        raise ImageError(f"'{path}' is damaged or no TIFF ({error_reason(error)}).") from None
