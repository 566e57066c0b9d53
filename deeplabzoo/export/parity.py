"""Parity checks of an exported file: outputs on random and real images, and mIoU on a dataset, against those of the model."""

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
"""Accepted share of pixels of a real image whose label differs: near-ties between classes, decided by rounding."""
MAX_LABEL_MISMATCH_RANDOM = 0.01
"""The same for random images, which have more near-ties."""
MAX_LABEL_MISMATCH_INT8 = 0.1
"""The same for int8 files; detects a wrong file. `--check` measures the loss of mIoU."""
_DYNAMIC_SHAPES = ((1, 64, 96), (3, 65, 33), (2, 97, 113))


@dataclass(frozen=True)
class AccuracyCheck:
    """mIoU of a model and of its exported file on the same images."""

    data: str
    """Name of the dataset."""
    split: str
    images: int
    """Number of images."""
    miou_original: float
    """mIoU of the model in percent."""
    miou_exported: float
    """mIoU of the file in percent."""

    def __str__(self) -> str:
        return (
            f"mIoU {self.miou_exported:.2f} exported, {self.miou_original:.2f} original, "
            f"{self.miou_exported - self.miou_original:+.2f} points on the first {self.images} of {self.data} {self.split}"
        )


def require_export_parity(
    net: DeepLab, run: Runner, output: Output, size: tuple[int, int] | None, images: Sequence[Pixels], *, int8: bool
) -> str:
    """Compare the outputs of a file and its model on random images of several shapes and on real images.

    Args:
        net: The model, on the CPU in eval mode.
        run: Runs the file.
        output: Output of the file: `logits`, `argmax` or `uint8`.
        size: Fixed (height, width) of the file in pixels; None for dynamic shapes.
        images: Real images, H x W x 3 uint8; may be empty.
        int8: Whether the file is quantized: then only the labels of the real images are compared.

    Returns:
        The result in words, which the report and the file's metadata store.

    Raises:
        DeepLabZooError: The outputs differ by more than rounding (int8: in more than a tenth of the labels of an image).
    """
    form = ExportModule(net, output).eval()
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, *size),) if size else _DYNAMIC_SHAPES
    random = [torch.randn(batch, net.config.in_chans, *hw, generator=generator) for batch, *hw in shapes]
    channels = net.config.in_chans
    real = [prepare(image, preprocessing_for(net, size), channels=channels).tensor_1CHW for image in images]
    apart = 0.0 if int8 else max(_logits_difference(form, run, image, output) for image in random)
    allowed = RELATIVE_TOLERANCE if output == "logits" else MAX_LABEL_MISMATCH_RANDOM
    _require(apart <= allowed, "random images", apart, allowed)
    mismatch_on_images = max((_label_mismatch(form, run, image, output) for image in real), default=0.0)
    allowed = MAX_LABEL_MISMATCH_INT8 if int8 else MAX_LABEL_MISMATCH
    _require(mismatch_on_images <= allowed, "real images", mismatch_on_images, allowed)
    what = "int8" if int8 else f"largest difference {apart:.1e} on {len(random)} random batches"
    if not real:
        return f"{what}, no real images compared"
    return f"{what}, {100 * (1 - mismatch_on_images):.3f} % of labels equal on {len(real)} images"


def measure_miou(
    net: DeepLab, run: Runner, output: Output, size: tuple[int, int] | None, data: SegmentationDataset, count: int
) -> AccuracyCheck:
    """Measure the mIoU of a model and its file on the first `count` images of a dataset, at the size of the ground truth.

    Args:
        net: The model.
        run: Runs the file.
        output: Output of the file: `logits`, `argmax` or `uint8`.
        size: Fixed (height, width) of the file in pixels; None for dynamic shapes.
        data: The dataset.
        count: Number of images.
    """
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
    """Return the preprocessing for a file: that of the model, or with a fixed `size`, resizing images into it and padding."""
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
            f"The outputs of the exported file differ from those of the model on {images} (difference {apart:.2g}, at most "
            f"{allowed:g} accepted), so it was not kept; try another --format."
        )


def _labels(answer: npt.NDArray[Any], prepared: PreparedImage, output: Output) -> Labels:
    """Return the labels of a file's output at the original size of the image: logits resized bilinearly, labels to nearest."""
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
