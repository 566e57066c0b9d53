"""Labels, overlays and areas of images: `Predictor` runs a model on an image and returns a `Result`."""

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

from deeplabzoo.data.image_io import MAX_PIXELS, ImageSource, Labels, Pixels
from deeplabzoo.device import choose_device, eval_mode, without_wrappers
from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.inference.inputs import (
    IMAGE_FORMATS,
    STAMP_KEY,
    Kind,
    output_kind,
    png_stamp_metadata,
    require_size_fits_format,
    stamp_for_kind,
)
from deeplabzoo.inference.large_image import ArrayRowReader, RowReader, read_input
from deeplabzoo.inference.tiling import Band, Tiling, parse_tiling, predict_bands, tiling_for
from deeplabzoo.inference.visualization import Color, blend, with_legend
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.optimized_model import OptimizedDeepLab, OptimizedModelCache, require_known_engine
from deeplabzoo.processing.postprocessing import ClassArea, Confidence, class_areas, class_logits, class_probability
from deeplabzoo.processing.preprocessing import (
    InputPixels,
    PreparedImage,
    image_labels,
    image_labels_with_confidence,
    low_resolution_logits,
    prepare,
    resized_hw,
)

_Answer = TypeVar("_Answer")

_SCALE_MISMATCH = 1.5
"""Factor between the size of objects in tiles and after the weights' own resize from which on a warning is logged."""


@dataclass(frozen=True, eq=False)
class Result:
    """The labels of one image, and what can be made of them."""

    image: Pixels
    """The image as it was read: upright, RGB, H x W x 3 uint8."""
    labels: Labels
    """Class number of every pixel of `image`: H x W, uint8 (uint16 above 256 classes)."""
    classes: tuple[str, ...]
    """Class names; label i is `classes[i]`."""
    palette: tuple[Color, ...]
    """One (red, green, blue) per class."""
    seconds: float
    """Time from decoded image to labels."""
    confidence: Confidence | None = None
    """Probability of each pixel's label: H x W, float32 in 0...1; None without `Predictor(confidence=True)`."""

    def found(self) -> list[ClassArea]:
        """Return the classes that occur in the image with their pixels and share, largest first."""
        return class_areas(self.labels, self.classes)

    @property
    def areas(self) -> dict[str, float]:
        """Share of the image in 0...1 by class name, only classes that occur, largest first; the shares sum to 1."""
        areas: dict[str, float] = {}
        for area in self.found():
            areas[area.name] = areas.get(area.name, 0.0) + area.share
        return areas

    def overlay(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """Return the image tinted by class.

        Args:
            alpha: Weight of the class colours, 0...1.
            legend: Add a legend with names and shares of the classes below the image; without it the overlay has the image's
                size.

        Raises:
            UsageError: `alpha` is outside 0...1.
        """
        tinted = Image.fromarray(blend(self.image, self.labels, self.classes, self.palette, alpha))
        return with_legend(tinted, self.found(), self.palette) if legend else tinted

    def label_image(self) -> Image.Image:
        """Return the labels as a palette image: pixel values are the class numbers, shown in the class colours.

        Above 256 classes, which no palette holds, it is a 16-bit grey image of the class numbers.
        """
        image = Image.fromarray(self.labels)
        if self.labels.dtype == np.uint8:
            image.putpalette([value for color in self.palette for value in color])
        return image

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
        """Write one file atomically: the overlay, the palette image of labels, or the JSON of areas.

        Args:
            path: File to write.
            kind: "overlay", "labels" or "json"; by default JSON for the suffix `.json`, else the overlay.
            alpha: Weight of the class colours in the overlay, 0...1.
            legend: Whether the overlay has a legend.
            facts: Entries put before the JSON's own.
            stamp: Hash of what the result was made of, kept in JSON and PNG (`deeplabzoo.inference.batch`).

        Raises:
            UsageError: The suffix cannot hold `kind`.
            OutputError: The file cannot be written.
        """
        path = Path(path)
        kind = output_kind(path, kind)
        if kind == "json":
            write_json(path, {**(facts or {}), **self.to_dict()}, stamp)
            return
        image = self.label_image() if kind == "labels" else self.overlay(alpha, legend)
        image_format = IMAGE_FORMATS[path.suffix.lower()]
        require_size_fits_format(path, image.size)
        options: dict[str, Any] = {"JPEG": {"quality": 92, "subsampling": 0}, "WEBP": {"quality": 92}}.get(image_format, {})
        if image_format == "PNG" and kind == "overlay":
            options = {"compress_level": 3}  # an image is hardly larger than at Pillow's default 6, and written much faster
        if image_format == "PNG" and stamp is not None:
            options["pnginfo"] = png_stamp_metadata(stamp_for_kind(stamp, kind, alpha, legend))
        write_atomically(path, lambda file: image.save(file, format=image_format, **options))


def write_json(path: Path, facts: dict[str, Any], stamp: str | None) -> None:
    """Write facts, and the stamp where there is one, as an indented JSON file; raises OutputError."""
    made_of = {} if stamp is None else {STAMP_KEY: stamp}
    text = json.dumps({**facts, **made_of}, indent=2, ensure_ascii=False) + "\n"
    # file names may hold bytes that are not UTF-8, which Python keeps as lone surrogates
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def unwrap_model(model: Any, caller: str) -> Any:
    """Return the DeepLab inside wrappers (`device.without_wrappers`); an optimized one as it is.

    Args:
        model: What a user gave as the model.
        caller: Name of the public function, for the error.

    Raises:
        UsageError: It is no DeepLab, such as a name, a path or another module.
    """
    if isinstance(model, OptimizedDeepLab):
        return model
    inner = without_wrappers(model)
    if inner is not model and any("_orig_mod" in module._modules for module in model.modules()):
        logger.warning(f"{caller} does not run the model that torch.compile returned; use engine='compiled' for that")
    if isinstance(inner, torch.nn.Module) and hasattr(inner, "forward_low_resolution") and hasattr(inner, "config"):
        if any(parameter.is_meta for parameter in inner.parameters()):
            raise UsageError(f"{caller} got a model on the device 'meta', which holds no values; load its weights first.")
        return inner
    if isinstance(inner, str | os.PathLike):
        raise UsageError(
            f"{caller} takes a model, not the name or path '{inner}'; use deeplabzoo.create(name, pretrained=True) or "
            "deeplabzoo.load(path)."
        )
    inside = (
        next((name for name, one in inner.named_modules() if isinstance(one, DeepLab)), None)
        if isinstance(inner, torch.nn.Module)
        else None
    )
    hint = f"pass its submodule '{inside}'" if inside else "build one with deeplabzoo.create or deeplabzoo.load"
    raise UsageError(f"{caller} takes a DeepLab or an optimized model, not a {type(inner).__name__}; {hint}.")


class Predictor:
    """Runs a model on images: preprocessing, model, and labels at the image's own size.

    Lists are processed image by image, so an image's labels do not depend on the others in the list. Any number of threads may
    call a predictor at once, and it can be pickled to other processes, where its optimized model is built again.

        predictor = Predictor(deeplabzoo.create("deeplabv3_mobilenetv2_voc", pretrained=True))
        predictor("cat.jpg").overlay().show()

    Args:
        net: The model; it is moved to the device. A model in DataParallel, DistributedDataParallel or torch.compile's wrapper
            is unwrapped. An OptimizedDeepLab is run as it is.
        device: "auto" (CUDA, MPS, CPU in this order) or a torch device.
        engine: Backend as `DeepLab.optimize` takes it; "auto" takes the one that an earlier `measure_engines` found fastest,
            else torch. The optimized model is built again when the weights have changed since the last call.
        precision: fp32, bf16, fp16 or int8, where backend and hardware can.
        tile: Side of the overlapping tiles that images are cut into, or (height, width), in pixels of the image times `scale`,
            instead of the weights' own resize; "auto" cuts only where the model's input would exceed 2048 x 2048 pixels after
            that resize; None never cuts.
        overlap: Pixels that neighbouring tiles share (default: a quarter of the tile).
        scale: Factor that images are resized by before they are cut (default 1).
        max_pixels: Largest image that is read (default 256 million pixels for images that are decoded whole).
        confidence: Return the probability of every label too, for images that are not cut.

    Attributes:
        net: The DeepLab whose weights are used.
        device: Where it runs.
        backend: (engine, precision) as given, or those of the OptimizedDeepLab.
        tiling: How images are cut: a Tiling, "auto" or None.
        max_pixels: As given.
        confidence: As given.

    Raises:
        UsageError: `net` is no DeepLab, or an engine, a device or a setting is unknown or contradictory.
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
        net = unwrap_model(net, "Predictor")
        require_known_engine(engine, precision)
        if max_pixels is not None and max_pixels < 4:
            raise UsageError(f"max_pixels must be at least 4, not {max_pixels!r}.")
        self.tiling, self.max_pixels = parse_tiling(tile, overlap, scale), max_pixels
        self.backend, self.confidence = (engine, precision), confidence
        self._scale_warned = False
        if net.config.in_chans not in (1, 3):
            if isinstance(self.tiling, Tiling):
                raise UsageError(
                    f"Tiles are cut from grey or RGB images, not from {net.config.in_chans} channels; use tile=None."
                )
            self.tiling = None
        if isinstance(net, OptimizedDeepLab):
            self.device, self.net = net.device, net.net
            self.backend = (net.engine, net.precision)
            self._optimized: OptimizedModelCache | OptimizedDeepLab = net
        else:
            self.device = choose_device(device, net)
            self.net = net.to(self.device)
            self._optimized = OptimizedModelCache(self.net, engine, precision)

    @overload
    def __call__(self, source: ImageSource) -> Result: ...
    @overload
    def __call__(self, source: list[Any] | tuple[Any, ...]) -> list[Result]: ...
    def __call__(self, source: ImageSource | list[Any] | tuple[Any, ...]) -> Result | list[Result]:
        """Label an image, or a list of images.

        Args:
            source: Path, Pillow image or array: uint8 or uint16, H x W x 3 RGB, H x W grey, or H x W x channels for a model of
                other than 1 or 3 channels, which also takes `.npy` and TIFF files. A list of these gives a list; so does an
                array N x H x W x channels.

        Returns:
            A `Result`, or a list of them in the order of the images.

        Raises:
            ImageError: An image cannot be read, or has other channels than the model takes.
        """
        if isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim == 4):
            return [self._predict_image(image) for image in source]
        return self._predict_image(source)

    def probability(self, source: ImageSource, label: int | str) -> Confidence:
        """Return the probability of one class at every pixel of an image.

        Args:
            source: Path, Pillow image or array.
            label: Class number or name.

        Returns:
            Softmax of the class, H x W float32 in 0...1; sigmoid for a model of one output channel.

        Raises:
            UsageError: The model has no such class, or the image would be cut into tiles.
            ImageError: The image cannot be read.
        """
        names = self.net.classes
        index = names.index(label) if isinstance(label, str) and label in names else label
        if not isinstance(index, int) or not 0 <= index < len(names):
            raise UsageError(
                f"The model has no class {label!r}; its classes are 0 to {len(names) - 1}: {', '.join(names[:30])}."
            )
        input_HWC, image_HWC = self._read(source)
        self._require_whole(image_HWC, "probability")
        return self._predict_whole(
            input_HWC, lambda net, prepared: class_probability(*low_resolution_logits(net, prepared), index)
        )

    def prepare(self, input_HWC: InputPixels) -> PreparedImage:
        """Return pixels, H x W x 3 RGB uint8 or H x W x the model's channels, as the model's input."""
        return prepare(input_HWC, self.net.preprocessing, channels=self.net.config.in_chans)

    def tiling_for(self, hw: tuple[int, int]) -> Tiling | None:
        """Return how an image of this height and width is cut into tiles; None where the model sees it whole."""
        return tiling_for(hw, self.net.preprocessing, self.tiling)

    def predict_bands(self, image: RowReader, tiling: Tiling, *, first_row: int = 0) -> Iterator[Band]:
        """Yield (first row, labels) of an image cut into tiles, holding one row of tiles.

        Args:
            image: Rows of the image.
            tiling: How to cut it.
            first_row: Row of the image to start at.

        Yields:
            Bands from `first_row` to the last row: the number of the band's first row, and its labels, rows x W.
        """
        net = self.current_model()
        self._warn_of_scale(image.hw, tiling)
        with eval_mode(net):
            yield from predict_bands(
                lambda tile_1CHW: class_logits(net.forward_low_resolution(tile_1CHW.to(self.device)), net.config.num_classes),
                image,
                net.preprocessing,
                tiling,
                align_corners=net.config.align_corners,
                channels=net.config.in_chans,
                first_row=first_row,
            )

    def current_model(self) -> DeepLab | OptimizedDeepLab:
        """Return the model that runs: the optimized form of `net` with the weights that it has now."""
        return self._optimized.current() if isinstance(self._optimized, OptimizedModelCache) else self._optimized

    def _read(self, source: ImageSource) -> tuple[InputPixels, Pixels]:
        return read_input(source, self.net.config.in_chans, max_pixels=self.max_pixels or MAX_PIXELS)

    def _predict_image(self, source: ImageSource) -> Result:
        input_HWC, image_HWC = self._read(source)
        start = time.perf_counter()
        height, width = image_HWC.shape[:2]
        tiling, confidence_HW = self.tiling_for((height, width)), None
        if self.confidence:
            self._require_whole(image_HWC, "confidence")
        try:
            if tiling is not None:
                labels_HW = self._predict_in_tiles(image_HWC, tiling)
            elif self.confidence:
                labels_HW, confidence_HW = self._predict_whole(input_HWC, image_labels_with_confidence)
            else:
                labels_HW = self._predict_whole(input_HWC, image_labels)
        except torch.OutOfMemoryError:
            raise DeepLabZooError(
                f"The memory of {self.device} is too small for an image of {width} x {height} pixels; use device 'cpu', "
                "smaller tiles (tile=512), or a smaller image."
            ) from None
        seconds = time.perf_counter() - start
        return Result(image_HWC, labels_HW, self.net.classes, self.net.palette, seconds, confidence_HW)

    def _predict_whole(
        self, input_HWC: InputPixels, answer: Callable[[DeepLab | OptimizedDeepLab, PreparedImage], _Answer]
    ) -> _Answer:
        net = self.current_model()
        prepared = self.prepare(input_HWC)
        with eval_mode(net):
            return answer(net, prepared)

    def _require_whole(self, image_HWC: Pixels, what: str) -> None:
        height, width = image_HWC.shape[:2]
        if self.tiling_for((height, width)) is not None:
            raise UsageError(
                f"{what} is computed for images that the model sees whole, but this one of {width} x {height} pixels is cut "
                f"into tiles; use tile=None{', or leave confidence out' if what == 'confidence' else ''}."
            )

    def _predict_in_tiles(self, image_HWC: Pixels, tiling: Tiling) -> Labels:
        if self.tiling == "auto":
            height, width = image_HWC.shape[:2]
            logger.info(
                f"{width} x {height} pixels are cut into tiles of {tiling.tile[1]} x {tiling.tile[0]} (tile=None: never)"
            )
        bands = list(self.predict_bands(ArrayRowReader(image_HWC), tiling))
        return np.concatenate([labels_HW for _, labels_HW in bands])

    def _warn_of_scale(self, hw: tuple[int, int], tiling: Tiling) -> None:
        """Log once where tiles show objects at another size than the weights' own resize does."""
        usual = resized_hw(hw, self.net.preprocessing)[0] / hw[0]
        if tiling.scale is None or self._scale_warned or 1 / _SCALE_MISMATCH < tiling.scale / usual < _SCALE_MISMATCH:
            return
        self._scale_warned = True
        logger.warning(
            f"tiles show the model an image of {hw[1]} x {hw[0]} pixels at {tiling.scale:g} of its size, and these weights "
            f"resize such images by {usual:.3g}: objects are {tiling.scale / usual:.3g} times as large as the weights expect; "
            f"scale {usual:.3g} (predict --scale) keeps their size"
        )
