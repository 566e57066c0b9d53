"""The models of the demo: loaded at first use, kept in memory, one image at a time each; and the answer to an upload."""

import base64
import io
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from deeplabzoo.data.image_io import Labels, Pixels, read_image_bytes
from deeplabzoo.device import eval_mode
from deeplabzoo.errors import DeepLabZooError, UnknownNameError, did_you_mean
from deeplabzoo.hub.manifest import BundledSource, released
from deeplabzoo.inference.predictor import Predictor, Result
from deeplabzoo.processing.postprocessing import argmax_labels, class_areas
from deeplabzoo.processing.preprocessing import low_resolution_logits

_LOSSLESS_PIXELS = 2**20
"""Images of up to so many pixels are sent back as PNG; larger ones as JPEG, which is much faster to encode and send."""


def segment_upload(upload: bytes, predictor: Predictor, max_pixels: int) -> dict[str, Any]:
    """Return labels, image, areas and the seconds of each stage as JSON values; nothing is written to disk.

    `labels` are the class indices in row-major order, `label_bytes` bytes each (little-endian), deflated, in base64;
    `labels_png` is the palette PNG of `predict --labels`. Raises ImageError for an upload that is not an image or has more
    than `max_pixels` pixels.
    """
    clock = _StageTimer()
    image_HWC = read_image_bytes(upload, "The upload", max_pixels=max_pixels)
    clock.stage("read")
    labels_HW = _labels(image_HWC, predictor, clock)
    result = Result(image_HWC, labels_HW, predictor.net.classes, predictor.net.palette, sum(clock.seconds.values()))
    little_endian = labels_HW.astype(labels_HW.dtype.newbyteorder("<"), copy=False)
    content = {
        "width": image_HWC.shape[1],
        "height": image_HWC.shape[0],
        "label_bytes": labels_HW.dtype.itemsize,
        "labels": _text(zlib.compress(little_endian.tobytes(), 1)),
        "labels_png": _text(_encoded(result.label_image(), "PNG")),
        "classes": [
            {"index": area.index, "name": area.name, "pixels": area.pixels, "share": area.share}
            for area in class_areas(labels_HW, predictor.net.classes)
        ],
        "palette": [list(color) for color in predictor.net.palette],
        **_image_fields(image_HWC),
    }
    clock.stage("encode")
    return {**content, "seconds": clock.seconds}


def _labels(image_HWC: Pixels, predictor: Predictor, clock: "_StageTimer") -> Labels:
    """Do what the predictor does, timing each stage; tiled inference is one stage."""
    if predictor.tiling_for((image_HWC.shape[0], image_HWC.shape[1])) is not None:
        labels_HW = predictor(image_HWC).labels
        clock.stage("model and labels, tile by tile")
        return labels_HW
    net = predictor.current_model()
    with eval_mode(net):
        low_1CHW, grid = low_resolution_logits(net, predictor.prepare(image_HWC))
        low_1CHW = low_1CHW.cpu()  # waits for an accelerator, so that the stage is timed whole
        clock.stage("model")
        labels_HW = argmax_labels(low_1CHW, grid)
    clock.stage("labels")
    return labels_HW


def _image_fields(image_HWC: Pixels) -> dict[str, str]:
    small = image_HWC.shape[0] * image_HWC.shape[1] <= _LOSSLESS_PIXELS
    image = Image.fromarray(image_HWC)
    return {"photo_type": f"image/{'png' if small else 'jpeg'}", "photo": _text(_encoded(image, "PNG" if small else "JPEG"))}


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    options: dict[str, Any] = {"PNG": {"compress_level": 1}, "JPEG": {"quality": 92, "subsampling": 0}}[kind]
    image.save(file, format=kind, **options)
    return file.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class _StageTimer:
    """Times consecutive named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        """End the current stage and record it under this name."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 5)
        self._last = now


class BusyError(DeepLabZooError):
    """The queue of a model is full."""


class UploadBudget:
    """Memory budget of queued uploads of all models; a single upload always fits."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._reserved_bytes = max_bytes, 0
        self._counting = threading.Lock()

    @contextmanager
    def reserve(self, count_bytes: int) -> Iterator[None]:
        """Reserve memory for an upload before it is read; raises BusyError if the budget is used up."""
        with self._counting:
            if self._reserved_bytes and self._reserved_bytes + count_bytes > self._max_bytes:
                raise BusyError("Too many large images are queued; try again in a few seconds.")
            self._reserved_bytes += count_bytes
        try:
            yield
        finally:
            with self._counting:
                self._reserved_bytes -= count_bytes


class ServedModel:
    """One model: loaded at its first image, then kept; at most `max_queued` images are queued."""

    def __init__(self, name: str, load: Callable[[], Predictor], max_queued: int) -> None:
        self.name = name
        self._load = load
        self._predictor: Predictor | None = None
        self._inference_lock = threading.Lock()
        self._queue_slots = threading.BoundedSemaphore(max_queued)

    def warm(self) -> None:
        """Load and optimize the model now; raises what loading raises."""
        with self._inference_lock:
            self._loaded_predictor()

    @contextmanager
    def queue_slot(self) -> Iterator[None]:
        """Hold a place in the queue, taken before the upload is read; raises BusyError if the queue is full."""
        if not self._queue_slots.acquire(blocking=False):
            raise BusyError(f"Too many images are queued for {self.name}; try again in a few seconds.")
        try:
            yield
        finally:
            self._queue_slots.release()

    def segment(self, upload: bytes, max_pixels: int) -> dict[str, Any]:
        """Return `segment_upload` of an upload, with the seconds it was queued; raises ImageError."""
        queued = time.perf_counter()
        with self._inference_lock:
            waited = time.perf_counter() - queued
            content = segment_upload(upload, self._loaded_predictor(), max_pixels)
        return {**content, "model": self.name, "seconds": {"wait": round(waited, 5), **content["seconds"]}}

    def _loaded_predictor(self) -> Predictor:
        if self._predictor is None:
            self._predictor = self._load()
            self._predictor.current_model()
        return self._predictor


class ModelPool:
    """The served models by the name that the page shows; the first one is the default."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Predictor], max_queued: int) -> None:
        self._models: dict[str, ServedModel] = {}
        for name in dict.fromkeys(names):
            shown = Path(name).name if Path(name).is_file() else name
            shown = name if shown in self._models else shown
            self._models[shown] = ServedModel(shown, lambda name=name: load(name), max_queued)  # type: ignore[misc]

    @property
    def names(self) -> list[str]:
        """Names in the order of the page's list."""
        return list(self._models)

    def __getitem__(self, name: str) -> ServedModel:
        """Return a model; raises UnknownNameError for a name that is not served."""
        if name not in self._models:
            raise UnknownNameError(
                f"This demo has no model {name[:80]!r}; it has {', '.join(self._models)}.{did_you_mean(name, self._models)}"
            )
        return self._models[name]


def bundled_models() -> list[str]:
    """Return the bundled models, the one with the most classes (VOC) first."""
    rows = [row for row in released().rows if isinstance(row.source, BundledSource)]
    return [row.full_name for row in sorted(rows, key=lambda row: -row.config.num_classes)]
