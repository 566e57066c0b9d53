"""The models that the page offers: made at their first use, kept warm, one photo at a time in each."""

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

# One uploaded photo through one model: what the page shows of it, and how long each stage took.


_LOSSLESS_PIXELS = 2**20
"""Photos up to so many pixels go back as they are, as PNG; larger ones as JPEG, which is written and sent much faster."""


def segment_upload(upload: bytes, predictor: Predictor, max_pixels: int) -> dict[str, Any]:
    """Return the labels of a photo, the photo as it was read, the areas and the seconds of each stage, as JSON values.

    `labels` are the class numbers row by row, as many bytes each as `label_bytes` says (least first), deflated, in base64;
    `labels_png` is the palette picture that `predict --labels` writes. Nothing touches the disk. Raises ImageError for an
    upload that is no photo or has more than `max_pixels` pixels.
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
    clock.stage("picture")
    return {**content, "seconds": clock.seconds}


def _labels(image_HWC: Pixels, predictor: Predictor, clock: "_StageTimer") -> Labels:
    """Do what the predictor does with a photo, a stage at a time; tiles are labelled as they come, so theirs are one stage."""
    if predictor.tiling_for((image_HWC.shape[0], image_HWC.shape[1])) is not None:
        labels_HW = predictor(image_HWC).labels
        clock.stage("network and labels, tile by tile")
        return labels_HW
    net = predictor.current_model()
    with eval_mode(net):
        low_1CHW, grid = low_resolution_logits(net, predictor.prepare(image_HWC))
        low_1CHW = low_1CHW.cpu()  # an accelerator has answered only when its answer is here
        clock.stage("network")
        labels_HW = argmax_labels(low_1CHW, grid)
    clock.stage("labels")
    return labels_HW


def _image_fields(image_HWC: Pixels) -> dict[str, str]:
    small = image_HWC.shape[0] * image_HWC.shape[1] <= _LOSSLESS_PIXELS
    picture = Image.fromarray(image_HWC)
    return {"photo_type": f"image/{'png' if small else 'jpeg'}", "photo": _text(_encoded(picture, "PNG" if small else "JPEG"))}


def _encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    options: dict[str, Any] = {"PNG": {"compress_level": 1}, "JPEG": {"quality": 92, "subsampling": 0}}[kind]
    picture.save(file, format=kind, **options)
    return file.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class _StageTimer:
    """Splits time into named stages that follow each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        """End the stage that runs, under this name."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 5)
        self._last = now


class BusyError(DeepLabZooError):
    """More photos wait for a model than it will work through soon."""


class UploadBudget:
    """Memory for uploads that wait, of all models together; the first of them always has room."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._reserved_bytes = max_bytes, 0
        self._counting = threading.Lock()

    @contextmanager
    def reserve(self, count_bytes: int) -> Iterator[None]:
        """Hold room for an upload, before it is read; raises BusyError where there is none left."""
        with self._counting:
            if self._reserved_bytes and self._reserved_bytes + count_bytes > self._max_bytes:
                raise BusyError("Too many large photos wait at the moment; try again in a few seconds.")
            self._reserved_bytes += count_bytes
        try:
            yield
        finally:
            with self._counting:
                self._reserved_bytes -= count_bytes


class ServedModel:
    """One model: loaded at its first photo, then kept; photos wait for each other, at most `max_queued` of them."""

    def __init__(self, name: str, load: Callable[[], Predictor], max_queued: int) -> None:
        self.name = name
        self._load = load
        self._predictor: Predictor | None = None
        self._inference_lock = threading.Lock()
        self._queue_slots = threading.BoundedSemaphore(max_queued)

    def warm(self) -> None:
        """Load the model now and bring it into the form that runs; raises what loading raises."""
        with self._inference_lock:
            self._loaded_predictor()

    @contextmanager
    def queue_slot(self) -> Iterator[None]:
        """Hold a place in the queue; taken before an upload is read, so that what waits is bounded. Raises BusyError."""
        if not self._queue_slots.acquire(blocking=False):
            raise BusyError(f"Too many photos wait for {self.name} at the moment; try again in a few seconds.")
        try:
            yield
        finally:
            self._queue_slots.release()

    def segment(self, upload: bytes, max_pixels: int) -> dict[str, Any]:
        """Return `segment_upload` for an upload when its turn comes, with the seconds it waited; raises ImageError."""
        asked = time.perf_counter()
        with self._inference_lock:
            waited = time.perf_counter() - asked
            content = segment_upload(upload, self._loaded_predictor(), max_pixels)
        return {**content, "model": self.name, "seconds": {"wait": round(waited, 5), **content["seconds"]}}

    def _loaded_predictor(self) -> Predictor:
        if self._predictor is None:
            self._predictor = self._load()
            self._predictor.current_model()
        return self._predictor


class ModelPool:
    """What the page offers, by the name that it shows; the first is taken unless another is chosen."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Predictor], max_queued: int) -> None:
        self._models: dict[str, ServedModel] = {}
        for name in dict.fromkeys(names):
            shown = Path(name).name if Path(name).is_file() else name
            shown = name if shown in self._models else shown
            self._models[shown] = ServedModel(shown, lambda name=name: load(name), max_queued)  # type: ignore[misc]

    @property
    def names(self) -> list[str]:
        """Names in the order of the list that the page shows."""
        return list(self._models)

    def __getitem__(self, name: str) -> ServedModel:
        """Return a model; raises UnknownNameError, as only what the command line named can be asked for."""
        if name not in self._models:
            raise UnknownNameError(
                f"This demo has no model {name[:80]!r}; it offers {', '.join(self._models)}.{did_you_mean(name, self._models)}"
            )
        return self._models[name]


def bundled_models() -> list[str]:
    """Return the models whose weights came with the package, the VOC classes first: they know the most kinds of things."""
    rows = [row for row in released().rows if isinstance(row.source, BundledSource)]
    return [row.full_name for row in sorted(rows, key=lambda row: -row.config.num_classes)]
