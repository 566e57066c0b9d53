"""A photo in, a `Result` out: labels, areas, overlay, and the files made of them."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deeplabzoo.data.image_io import MAX_PIXELS, ImageSource, Labels, Pixels, read_image
from deeplabzoo.device import choose_device, eval_mode
from deeplabzoo.errors import DeepLabZooError, OutputError, UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.inference.large_image import ArrayRowReader, RowReader
from deeplabzoo.inference.tiling import Band, Tiling, parse_tiling, predict_bands, tiling_for
from deeplabzoo.inference.visualization import Color, blend, with_legend
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.autotune import OptimizedModelCache
from deeplabzoo.optimization.optimized_model import OptimizedDeepLab, require_known_engine
from deeplabzoo.processing.postprocessing import ClassArea, Confidence, class_areas
from deeplabzoo.processing.preprocessing import PreparedImage, image_labels, image_labels_with_confidence, prepare

# What a result can be written as, and which file names can hold it; imports nothing heavy.


Kind = Literal["overlay", "labels", "json"]
KINDS: tuple[Kind, ...] = ("overlay", "labels", "json")

IMAGE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Suffix of a picture file -> Pillow's name of the format."""

LOSSLESS_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
"""Where label numbers survive: the other formats blur them, and a label between two others is a third class."""

_MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}
"""Longest side that a format holds, in pixels: the limits of libjpeg and of WebP itself."""

VIDEO_FORMATS = {
    ".mp4": ("mp4", "libx264"),
    ".m4v": ("mp4", "libx264"),
    ".mov": ("mov", "libx264"),
    ".mkv": ("matroska", "libx264"),
    ".webm": ("webm", "libvpx-vp9"),
}
"""Suffix of a video that can be written -> FFmpeg's names of the container and the encoder."""
VIDEO_SUFFIXES = (*VIDEO_FORMATS, ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv", ".3gp")
"""What counts as a video to read."""


def is_video(path: str | Path) -> bool:
    """Whether a file's name is that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def video_format(path: Path) -> tuple[str, str]:
    """Return container and encoder for a video file to write; raises UsageError for a suffix that has none."""
    if path.suffix.lower() not in VIDEO_FORMATS:
        raise UsageError(f"'{path}' cannot hold a video; use a file name that ends in {', '.join(VIDEO_FORMATS)}.")
    return VIDEO_FORMATS[path.suffix.lower()]


def require_size_fits_format(path: Path, size: tuple[int, int]) -> None:
    """Raise OutputError where a picture of this width and height is larger than the format of `path` can hold."""
    name = IMAGE_FORMATS[path.suffix.lower()]
    most = _MAX_SIDE.get(name)
    if most is not None and max(size) > most:
        raise OutputError(f"'{path}' cannot hold {size[0]} x {size[1]} pixels: {name} ends at {most} a side; use .png or .tif.")


def output_kind(path: Path, kind: Kind | None = None) -> Kind:
    """Return what to write into `path`: `kind` if its suffix allows it, else what the suffix means; raises UsageError."""
    suffix = path.suffix.lower()
    if kind is None:
        kind = "json" if suffix == ".json" else "overlay"
    if kind not in KINDS:
        raise UsageError(f"Unknown kind {kind!r}; expected 'overlay', 'labels' or 'json'.")
    allowed = {"overlay": tuple(IMAGE_FORMATS), "labels": LOSSLESS_SUFFIXES, "json": (".json",)}[kind]
    if suffix not in allowed:
        why = " (lossy formats change class numbers)" if kind == "labels" and suffix in IMAGE_FORMATS else ""
        raise UsageError(f"'{path}' cannot hold {kind}{why}; use a file name that ends in {', '.join(allowed)}.")
    return kind


# The mark in a result that tells what it was made of; `deeplabzoo.inference.batch` makes and compares it.


STAMP_KEY = "made_of"
"""Keyword of the text in a PNG, and key in the JSON."""


def stamp_for_kind(stamp: str, kind: Kind, alpha: float, legend: bool) -> str:
    """Return the stamp as a file of this kind carries it: an overlay depends on how it is drawn, too."""
    return f"{stamp} alpha {alpha:g}{' legend' if legend else ''}" if kind == "overlay" else stamp


def png_stamp_metadata(stamp: str) -> PngInfo:
    """Return what Pillow writes into a PNG for it."""
    info = PngInfo()
    info.add_text(STAMP_KEY, stamp)
    return info


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Result:
    """What the network says about one photo."""

    image: Pixels
    """The photo as it was read: upright, RGB, H x W x 3."""
    labels: Labels
    """Class number of every pixel of `image`: uint8 (uint16 above 256 classes), H x W."""
    classes: tuple[str, ...]
    palette: tuple[Color, ...]
    seconds: float
    """Time from decoded photo to labels."""
    confidence: Confidence | None = None
    """Probability of each pixel's label, float32 0...1, H x W, where the predictor was asked for it."""

    def found(self) -> list[ClassArea]:
        """Return the classes that occur in the photo with their pixels and share, largest first."""
        return class_areas(self.labels, self.classes)

    @property
    def areas(self) -> dict[str, float]:
        """Share of the photo in 0...1 by class name, only classes that occur, largest first; the shares sum to 1."""
        areas: dict[str, float] = {}
        for area in self.found():
            areas[area.name] = areas.get(area.name, 0.0) + area.share
        return areas

    def overlay(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """Return the photo tinted by class, with a legend below it that names what was found and its share.

        `alpha` is the weight of the colours, 0...1. Without the legend the picture has exactly the photo's size.
        """
        photo = Image.fromarray(blend(self.image, self.labels, self.classes, self.palette, alpha))
        return with_legend(photo, self.found(), self.palette) if legend else photo

    def label_image(self) -> Image.Image:
        """Return the labels as a palette picture: pixel values are the class numbers, drawn in the class colours.

        Above 256 classes, which no palette holds, it is a 16-bit grey picture of the class numbers.
        """
        picture = Image.fromarray(self.labels)
        if self.labels.dtype == np.uint8:
            picture.putpalette([value for color in self.palette for value in color])
        return picture

    def to_dict(self) -> dict[str, Any]:
        """Return size, time and the classes found as plain JSON values."""
        height, width = self.labels.shape
        return {
            "height": height,
            "width": width,
            "classes": [dataclasses.asdict(area) for area in self.found()],
            "seconds": round(self.seconds, 4),
        }

    def save(
        self,
        path: str | os.PathLike[str],
        kind: Kind | None = None,
        *,
        alpha: float = 0.5,
        legend: bool = True,
        facts: dict[str, Any] | None = None,
        stamp: str | None = None,
    ) -> None:
        """Write one file, whole or not at all: the overlay, the palette picture of labels, or the JSON of areas.

        Without `kind`, `.json` means JSON and a picture suffix the overlay. `facts` are put in front of the JSON's own;
        `stamp` says in JSON and PNG what the result was made of (`deeplabzoo.inference.batch`).
        Raises UsageError where kind and suffix do not go together, OutputError where the file cannot be written.
        """
        path = Path(path)
        kind = output_kind(path, kind)
        if kind == "json":
            made_of = {} if stamp is None else {STAMP_KEY: stamp}
            text = json.dumps({**(facts or {}), **self.to_dict(), **made_of}, indent=2, ensure_ascii=False) + "\n"
            write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))  # for names of odd bytes
            return
        picture = self.label_image() if kind == "labels" else self.overlay(alpha, legend)
        image_format = IMAGE_FORMATS[path.suffix.lower()]
        require_size_fits_format(path, picture.size)
        options: dict[str, Any] = {"JPEG": {"quality": 92, "subsampling": 0}, "WEBP": {"quality": 92}}.get(image_format, {})
        if image_format == "PNG" and kind == "overlay":
            options = {"compress_level": 3}  # a photo: hardly larger than at Pillow's own level 6, and written much faster
        if image_format == "PNG" and stamp is not None:
            options["pnginfo"] = png_stamp_metadata(stamp_for_kind(stamp, kind, alpha, legend))
        write_atomically(path, lambda file: picture.save(file, format=image_format, **options))


class Predictor:
    """Runs a network on photos: preprocessing, network, and labels at the photo's own size.

    The network is moved to the device chosen, and runs in its inference form, by `engine` and in `precision` as
    `DeepLab.optimize` takes them; "auto" takes the engine that an earlier measurement chose (`measure_engines`), else torch.
    When its weights have changed since the last call, the form is made anew; an OptimizedDeepLab is run as it is. Lists are
    worked through photo by photo, so a photo's labels do not depend on what stands beside it in the list. Any number of threads
    may call it at once, and it can be sent to other processes, where its form is made again.

        predictor = Predictor(deeplabzoo.create("deeplabv3_mobilenetv2_voc", pretrained=True))
        predictor("cat.jpg").overlay().show()

    `tile` cuts pictures into overlapping tiles of that side, or (height, width), at their own resolution times `scale` instead
    of resizing them as the weights' preprocessing says; "auto" cuts only where the network's input would exceed 2048 x 2048
    pixels even so; None never cuts. `overlap` is what neighbours share, in pixels (default: a quarter of the tile). Pictures of
    more than `max_pixels` are refused (default 256 million, for what has to be decoded whole). With `confidence` each result
    has the probability of every label too, for photos that are not cut.

    Raises UsageError for an unknown engine or device, settings that make no sense, or a network that does not take three
    channels.
    """

    def __init__(
        self,
        net: DeepLab | OptimizedDeepLab,
        device: str | torch.device = "auto",
        engine: str = "auto",
        *,
        precision: str = "fp32",
        tile: int | tuple[int, int] | Literal["auto"] | None = "auto",
        overlap: int | None = None,
        scale: float | None = None,
        max_pixels: int | None = None,
        confidence: bool = False,
    ) -> None:
        require_known_engine(engine, precision)
        if net.config.in_chans != 3:
            raise UsageError(f"The network takes {net.config.in_chans} channels; photos have 3, so it cannot be run on them.")
        if max_pixels is not None and max_pixels < 4:
            raise UsageError(f"max_pixels must be at least 4, not {max_pixels!r}.")
        self.tiling, self.max_pixels = parse_tiling(tile, overlap, scale), max_pixels
        self.computed, self.confidence = (engine, precision), confidence
        if isinstance(net, OptimizedDeepLab):
            self.device, self.net = net.device, net.net
            self.computed = (net.engine, net.precision)
            self._form: OptimizedModelCache | OptimizedDeepLab = net
        else:
            self.device = choose_device(device, net)
            self.net = net.to(self.device)
            self._form = OptimizedModelCache(self.net, engine, precision)

    @overload
    def __call__(self, source: ImageSource) -> Result: ...
    @overload
    def __call__(self, source: list[Any] | tuple[Any, ...]) -> list[Result]: ...
    def __call__(self, source: ImageSource | list[Any] | tuple[Any, ...]) -> Result | list[Result]:
        """Return the `Result` for a path, a Pillow image or a uint8 array (H x W x 3 RGB, or H x W grey).

        A list of these, mixed as they come, gives a list; so does an array N x H x W x 3. Raises ImageError for a photo that
        cannot be read.
        """
        if isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim == 4):
            return [self._predict_image(photo) for photo in source]
        return self._predict_image(source)

    def tiling_for(self, hw: tuple[int, int]) -> Tiling | None:
        """Return how a picture of this height and width is cut into tiles; None where it goes through the network whole."""
        return tiling_for(hw, self.net.preprocessing, self.tiling)

    def bands(self, picture: RowReader, tiling: Tiling, *, first_row: int = 0) -> Iterator[Band]:
        """Yield (first row, labels) of a picture cut into tiles, from `first_row` to its end, holding one row of tiles."""
        net = self.form()
        with eval_mode(net):
            yield from predict_bands(
                lambda tile_1CHW: net.forward_low_resolution(tile_1CHW.to(self.device)),
                picture,
                net.preprocessing,
                tiling,
                align_corners=net.config.align_corners,
                first_row=first_row,
            )

    def _predict_image(self, source: ImageSource) -> Result:
        image_HWC = read_image(source, max_pixels=self.max_pixels or MAX_PIXELS)
        start = time.perf_counter()
        tiling, confidence_HW = self.tiling_for((image_HWC.shape[0], image_HWC.shape[1])), None
        if tiling is not None and self.confidence:
            height, width = image_HWC.shape[:2]
            raise UsageError(
                f"confidence is known of photos that go through the network whole, but this one of {width} x {height} pixels "
                "is cut into tiles; use tile=None, or leave confidence out."
            )
        try:
            if tiling is not None:
                labels_HW = self._in_tiles(image_HWC, tiling)
            elif self.confidence:
                labels_HW, confidence_HW = self._predict_whole(image_HWC, image_labels_with_confidence)
            else:
                labels_HW = self._predict_whole(image_HWC, image_labels)
        except torch.OutOfMemoryError:
            height, width = image_HWC.shape[:2]
            raise DeepLabZooError(
                f"The memory of {self.device} is too small for a photo of {width} x {height} pixels; use device 'cpu', "
                "smaller tiles (tile=512), or a smaller photo."
            ) from None
        seconds = time.perf_counter() - start
        return Result(image_HWC, labels_HW, self.net.classes, self.net.palette, seconds, confidence_HW)

    def _predict_whole(self, image_HWC: Pixels, answer: Callable[[DeepLab | OptimizedDeepLab, PreparedImage], T]) -> T:
        net = self.form()
        prepared = prepare(image_HWC, net.preprocessing)
        with eval_mode(net):
            return answer(net, prepared)

    def form(self) -> DeepLab | OptimizedDeepLab:
        """Return what runs now: the inference form of the network with the weights that it has at this moment."""
        return self._form.current() if isinstance(self._form, OptimizedModelCache) else self._form

    def _in_tiles(self, image_HWC: Pixels, tiling: Tiling) -> Labels:
        if self.tiling == "auto":
            height, width = image_HWC.shape[:2]
            logger.info(
                f"{width} x {height} pixels are cut into tiles of {tiling.tile[1]} x {tiling.tile[0]} (tile=None: never)"
            )
        bands = list(self.bands(ArrayRowReader(image_HWC), tiling))
        return np.concatenate([labels_HW for _, labels_HW in bands])
