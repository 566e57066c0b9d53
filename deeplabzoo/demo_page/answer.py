"""One uploaded photo through one model: what the page shows of it, and how long each stage took."""

import base64
import io
import time
import zlib
from typing import Any

from PIL import Image

from deeplabzoo.data.images import Labels, Pixels, read_image_bytes
from deeplabzoo.inference.device import evaluating
from deeplabzoo.inference.labels import class_areas, labels_on_grid
from deeplabzoo.inference.predictor import Predictor, Result
from deeplabzoo.inference.preprocess import low_resolution, prepare

_LOSSLESS_PIXELS = 2**20
"""Photos up to so many pixels go back as they are, as PNG; larger ones as JPEG, which is written and sent much faster."""


def answer(upload: bytes, predictor: Predictor, max_pixels: int) -> dict[str, Any]:
    """Return the labels of a photo, the photo as it was read, the areas and the seconds of each stage, as JSON values.

    `labels` are the class numbers row by row, as many bytes each as `label_bytes` says (least first), deflated, in base64;
    `labels_png` is the palette picture that `predict --labels` writes. Nothing touches the disk. Raises ImageError for an
    upload that is no photo or has more than `max_pixels` pixels.
    """
    clock = _Clock()
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
        **_photo(image_HWC),
    }
    clock.stage("picture")
    return {**content, "seconds": clock.seconds}


def _labels(image_HWC: Pixels, predictor: Predictor, clock: "_Clock") -> Labels:
    """Do what the predictor does with a photo, a stage at a time; tiles are labelled as they come, so theirs are one stage."""
    if predictor.tiling_for((image_HWC.shape[0], image_HWC.shape[1])) is not None:
        labels_HW = predictor(image_HWC).labels
        clock.stage("network and labels, tile by tile")
        return labels_HW
    net = predictor.form()
    with evaluating(net):
        low_1CHW, grid = low_resolution(net, prepare(image_HWC, net.preprocessing))
        low_1CHW = low_1CHW.cpu()  # an accelerator has answered only when its answer is here
        clock.stage("network")
        labels_HW = labels_on_grid(low_1CHW, grid)
    clock.stage("labels")
    return labels_HW


def _photo(image_HWC: Pixels) -> dict[str, str]:
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


class _Clock:
    """Splits time into named stages that follow each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        """End the stage that runs, under this name."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 5)
        self._last = now
