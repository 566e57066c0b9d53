"""From a photo to the tensor that the weights expect, through the network, and back to the photo's own pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.device import device_of
from deeplabzoo.errors import UsageError
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.processing.postprocessing import (
    Confidence,
    OutputGeometry,
    argmax_labels,
    argmax_labels_with_confidence,
    upsampled_logits,
)

if TYPE_CHECKING:
    from deeplabzoo.models.deeplab import DeepLab
    from deeplabzoo.optimization.optimized_model import OptimizedDeepLab


MIN_INPUT_SIZE = 33
"""Networks take sides of at least 33 pixels: at output stride 32 that is a 2 x 2 map. Smaller photos are padded up to it."""


@dataclass(frozen=True)
class PreparedImage:
    """A photo as network input: normalize_images float32, with what is needed to find the way back; sizes are (height, width)."""

    tensor_1CHW: torch.Tensor
    valid_hw: tuple[int, int]
    """The photo inside the tensor, from the top left corner; what lies beyond is padding."""
    original_hw: tuple[int, int]
    flipped: bool = False


def prepare(image_HWC: Pixels, preprocessing: Preprocessing, *, scale: float = 1.0, flip: bool = False) -> PreparedImage:
    """Resize, normalise and pad an 8-bit RGB photo as the weights expect it; on the CPU.

    `scale` multiplies the resized photo and the size that it is padded to, keeping the latter of the form stride x n + 1
    (513 at scale 0.5 -> 257), for evaluation at several scales; `flip` mirrors the photo left to right. A photo that is
    larger than `preprocessing.size` after the resize is not padded and not cut.

    The resize is bilinear with antialiasing (without it a large photo turns into noise), by torch on 8-bit values: much faster
    than Pillow's on large photos, and within one grey level of it.
    """
    if scale <= 0:
        raise UsageError(f"scale must be above 0, not {scale!r}.")
    original_hw = (image_HWC.shape[0], image_HWC.shape[1])
    valid_hw = resized_hw(original_hw, preprocessing, scale)
    pixels_1CHW = torch.from_numpy(image_HWC if image_HWC.flags.writeable else image_HWC.copy()).permute(2, 0, 1)[None]
    if valid_hw != original_hw:
        pixels_1CHW = F.interpolate(pixels_1CHW, size=valid_hw, mode="bilinear", antialias=True, align_corners=False)
    if flip:
        pixels_1CHW = pixels_1CHW.flip(3)
    if preprocessing.channel_order == "BGR":
        pixels_1CHW = pixels_1CHW.flip(1)
    mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    tensor_1CHW = pixels_1CHW.to(torch.float32).div_(255).sub_(mean).div_(std).contiguous()
    target_hw = [round((side - 1) * scale) + 1 for side in preprocessing.size] if preprocessing.pad else [0, 0]
    bottom, right = (max(0, target - valid, MIN_INPUT_SIZE - valid) for target, valid in zip(target_hw, valid_hw, strict=True))
    if bottom or right:
        tensor_1CHW = F.pad(tensor_1CHW, (0, right, 0, bottom))
    return PreparedImage(tensor_1CHW, valid_hw, original_hw, flip)


def resized_hw(hw: tuple[int, int], preprocessing: Preprocessing, scale: float = 1.0) -> tuple[int, int]:
    """Return height and width that a photo is brought to: `longest` fits into `size`, `shortest` covers it.

    Fractions of a pixel are rounded, but cut off with `shortest`, as torchvision and transformers do (500 x 333 -> 780 x 520).
    """
    ratios = [target / side for target, side in zip(preprocessing.size, hw, strict=True)]
    factor = {"none": 1.0, "longest": min(ratios), "shortest": max(ratios)}[preprocessing.resize]
    if preprocessing.only_shrink:
        factor = min(factor, 1.0)
    height, width = (side * factor * scale for side in hw)
    if preprocessing.resize == "shortest":
        height, width = math.floor(height + 1e-6), math.floor(width + 1e-6)  # a whole number may come out a hair too small
    return max(1, round(height)), max(1, round(width))


def image_logits(net: "DeepLab | OptimizedDeepLab", prepared: PreparedImage) -> torch.Tensor:
    """Return float32 logits at the photo's own size, 1 x classes x H x W, on the network's device.

    The caller has put the network into eval mode (`device.eval_mode` does).
    """
    low_1CHW, grid = low_resolution_logits(net, prepared)
    return upsampled_logits(low_1CHW, grid)


def image_labels(net: "DeepLab | OptimizedDeepLab", prepared: PreparedImage) -> Labels:
    """Return the label of every pixel of the photo, H x W: the argmax of `image_logits` without holding it whole."""
    low_1CHW, grid = low_resolution_logits(net, prepared)
    return argmax_labels(low_1CHW, grid)


def image_labels_with_confidence(net: "DeepLab | OptimizedDeepLab", prepared: PreparedImage) -> tuple[Labels, Confidence]:
    """Return the labels and the probability of each, H x W both; it takes every class at every pixel, so it is slower."""
    low_1CHW, grid = low_resolution_logits(net, prepared)
    return argmax_labels_with_confidence(low_1CHW, grid)


def image_probabilities(
    net: "DeepLab | OptimizedDeepLab", image_HWC: Pixels, scales: Sequence[float] = (1.0,), flip: bool = False
) -> torch.Tensor:
    """Return class probabilities at the photo's own size, averaged over `scales` and, with `flip`, over the mirrored photo.

    Float32, 1 x classes x H x W, on the network's device; the average is of softmax outputs, as DeepLabV3 (section 4.1) does.
    """
    if not scales:
        raise UsageError("scales must name at least one scale, such as (1.0,).")
    total_1CHW: torch.Tensor | None = None
    for scale in scales:
        for flipped in (False, True) if flip else (False,):
            logits_1CHW = image_logits(net, prepare(image_HWC, net.preprocessing, scale=scale, flip=flipped))
            probabilities_1CHW = logits_1CHW.softmax(dim=1)
            total_1CHW = probabilities_1CHW if total_1CHW is None else total_1CHW.add_(probabilities_1CHW)
    assert total_1CHW is not None
    return total_1CHW.div_(len(scales) * (2 if flip else 1))


def low_resolution_logits(net: "DeepLab | OptimizedDeepLab", prepared: PreparedImage) -> tuple[torch.Tensor, OutputGeometry]:
    """Return the logits as the head gives them, 1 x classes x h x w on the network's device, and where they lie in the photo.

    For what happens between network and labels: timing the two apart, averaging the frames of a video.
    """
    with torch.inference_mode():
        low_1CHW = net.forward_low_resolution(prepared.tensor_1CHW.to(device_of(net)))
    padded_hw = (prepared.tensor_1CHW.shape[2], prepared.tensor_1CHW.shape[3])
    grid = OutputGeometry(padded_hw, prepared.valid_hw, prepared.original_hw, net.config.align_corners, prepared.flipped)
    return low_1CHW, grid
