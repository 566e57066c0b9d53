"""What is proven of an exported file before it counts as written: same answers, and the mIoU that it keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from deeplabzoo.data.dataset import SegmentationDataset
from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.errors import DeepLabZooError
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.onnx_export import RELATIVE_TOLERANCE, ExportModule, Output, Runner, output_difference
from deeplabzoo.processing.postprocessing import class_logits
from deeplabzoo.processing.preprocessing import PreparedImage, image_labels, prepare

MAX_LABEL_MISMATCH = 0.001
"""Share of pixels of a real photo whose label may differ: ties between classes, decided by rounding."""
MAX_LABEL_MISMATCH_RANDOM = 0.01
MAX_LABEL_MISMATCH_INT8 = 0.1
"""For 8 bits: what is beyond is not rounding. What they cost in mIoU is what `--check` measures."""
_DYNAMIC_SHAPES = ((1, 64, 96), (3, 65, 33), (2, 97, 113))


@dataclass(frozen=True)
class AccuracyCheck:
    """mIoU in percent of the network and of its exported file on the same pictures."""

    data: str
    split: str
    images: int
    miou_original: float
    miou_exported: float

    def __str__(self) -> str:
        return (
            f"mIoU {self.miou_exported:.2f} exported, {self.miou_original:.2f} original, "
            f"{self.miou_exported - self.miou_original:+.2f} points on the first {self.images} of {self.data} {self.split}"
        )


def require_export_parity(
    net: DeepLab, run: Runner, output: Output, size: tuple[int, int] | None, images: Sequence[Pixels], *, int8: bool
) -> str:
    """Compare a file with its network on random images of several shapes and on photos; returns a sentence of what was seen.

    Raises DeepLabZooError where they differ by more than rounding (int8: where a tenth of the labels of a photo differ).
    """
    form = ExportModule(net, output).eval()
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, *size),) if size else _DYNAMIC_SHAPES
    random = [torch.randn(batch, net.config.in_chans, *hw, generator=generator) for batch, *hw in shapes]
    channels = net.config.in_chans
    real = [prepare(photo, preprocessing_for(net, size), channels=channels).tensor_1CHW for photo in images]
    apart = 0.0 if int8 else max(_logits_difference(form, run, image, output) for image in random)
    allowed = RELATIVE_TOLERANCE if output == "logits" else MAX_LABEL_MISMATCH_RANDOM
    _require(apart <= allowed, "random images", apart, allowed)
    mismatch_on_images = max((_label_mismatch(form, run, image, output) for image in real), default=0.0)
    allowed = MAX_LABEL_MISMATCH_INT8 if int8 else MAX_LABEL_MISMATCH
    _require(mismatch_on_images <= allowed, "real photos", mismatch_on_images, allowed)
    what = "int8" if int8 else f"{apart:.1e} apart on {len(random)} random batches"
    return (
        f"{what}, {100 * (1 - mismatch_on_images):.3f} % of labels equal on {len(real)} photos"
        if real
        else f"{what}, no photo tried"
    )


def measure_miou(
    net: DeepLab, run: Runner, output: Output, size: tuple[int, int] | None, data: SegmentationDataset, count: int
) -> AccuracyCheck:
    """Return the mIoU of the network and of the file on the first `count` pictures, each at the labels' own size."""
    count = min(count, len(data))
    original, exported = (ConfusionMatrix(len(data.classes), data.ignore_index) for _ in range(2))
    for index in tqdm(range(count), desc="check", unit="image", disable=None):
        sample = data[index]
        channels = net.config.in_chans
        original.update(image_labels(net, prepare(sample.image, net.preprocessing, channels=channels)), sample.labels)
        prepared = prepare(sample.image, preprocessing_for(net, size), channels=channels)
        exported.update(_labels(run(prepared.tensor_1CHW.numpy()), prepared, output), sample.labels)
    scores = [100 * matrix.scores().miou for matrix in (original, exported)]
    return AccuracyCheck(data.name, data.split, count, scores[0], scores[1])


def preprocessing_for(net: DeepLab, size: tuple[int, int] | None) -> Preprocessing:
    """Return the network's preprocessing; for a file of one fixed size the photo is fitted into it and padded."""
    if size is None:
        return net.preprocessing
    fields: dict[str, Any] = {**net.preprocessing.to_dict(), "size": size, "resize": "longest", "pad": True}
    return Preprocessing(**fields)


def _logits_difference(form: ExportModule, run: Runner, image: torch.Tensor, output: Output) -> float:
    with torch.inference_mode():
        expected = form(image).numpy()
    return output_difference(expected, run(image.numpy()))


def _label_mismatch(form: ExportModule, run: Runner, image: torch.Tensor, output: Output) -> float:
    with torch.inference_mode():
        expected = form(image).numpy()
    given = run(image.numpy())
    if expected.shape != given.shape:
        return 1.0
    if output == "logits" and expected.shape[1] == 1:  # a binary model: the logit of a sigmoid
        expected, given = np.greater(expected, 0), np.greater(given, 0)
    elif output == "logits":
        expected, given = expected.argmax(axis=1), given.argmax(axis=1)
    return float(np.asarray(expected != given).mean())


def _require(good: bool, images: str, apart: float, allowed: float) -> None:
    if not good:
        raise DeepLabZooError(
            f"The exported file does not give the network's answers on {images} (difference {apart:.2g}, at most {allowed:g} "
            "allowed), so it was not kept; try another --format."
        )


def _labels(answer: npt.NDArray[Any], prepared: PreparedImage, output: Output) -> Labels:
    """Bring a file's answer to the photo's own size: logits bilinearly, as the package does; labels to the nearest."""
    height, width = prepared.valid_hw
    if output == "logits":
        logits_1CHW = torch.from_numpy(answer)[:, :, :height, :width]
        if prepared.valid_hw != prepared.original_hw:
            logits_1CHW = F.interpolate(logits_1CHW, size=prepared.original_hw, mode="bilinear", align_corners=False)
        labels: Labels = class_logits(logits_1CHW)[0].argmax(0).to(torch.int32).numpy().astype(np.uint16)
        return labels
    labels_HW = answer[0, :height, :width].astype(np.int32)
    if prepared.valid_hw == prepared.original_hw:
        return labels_HW.astype(np.uint16)
    nearest = Image.fromarray(labels_HW).resize(prepared.original_hw[::-1], Image.Resampling.NEAREST)
    return np.asarray(nearest).astype(np.uint16)
