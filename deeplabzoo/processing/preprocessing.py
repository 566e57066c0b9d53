"""From an image to the tensor that the weights expect, through the model, and back to the image's own pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.device import device_of
from deeplabzoo.errors import UsageError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.processing.postprocessing import (
    Confidence,
    OutputGeometry,
    argmax_labels,
    argmax_labels_with_confidence,
    class_logits,
    upsampled_logits,
)

InputPixels = Pixels | np.ndarray[Any, np.dtype[np.float32]]
"""H x W x channels: uint8, or float32 in 0...255."""
MIN_INPUT_SIZE = 33
"""Models take sides of at least 33 pixels: at output stride 32 that is a 2 x 2 map. Smaller images are padded up to it."""


class LowResolutionModel(Protocol):
    """What preprocessing and postprocessing need of a model: a DeepLab or an OptimizedDeepLab."""

    config: DeepLabConfig
    preprocessing: Preprocessing

    @property
    def device(self) -> torch.device:
        """Device of the input."""
        ...

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the head's logits, B x channels x h x w."""
        ...


@dataclass(frozen=True)
class PreparedImage:
    """An image as model input, with what postprocessing needs; sizes are (height, width) in pixels."""

    tensor_1CHW: torch.Tensor
    """Normalized float32, 1 x channels x H x W."""
    valid_hw: tuple[int, int]
    """Size of the resized image inside the tensor, from the top left corner; what lies beyond is padding."""
    original_hw: tuple[int, int]
    """Size of the image itself."""
    flipped: bool = False
    """Whether the image was mirrored left to right."""


def prepare(
    image_HWC: InputPixels,
    preprocessing: Preprocessing,
    *,
    scale: float = 1.0,
    flip: bool = False,
    channels: int | None = None,
) -> PreparedImage:
    """Resize, normalize and pad an image as the weights expect it; on the CPU.

    The resize is bilinear with antialiasing (without it a large image turns into noise), by torch on 8-bit values: much faster
    than Pillow's on large images, and within one grey level of it. An image that is larger than `preprocessing.size` after
    the resize is neither padded nor cropped.

    Args:
        image_HWC: Pixels, H x W x channels: uint8, or float32 in 0...255; three channels are RGB.
        preprocessing: What the weights expect (`net.preprocessing`).
        scale: Multiplies the resized image and the size that it is padded to, keeping the latter of the form stride x n + 1
            (513 at scale 0.5 -> 257), for evaluation at several scales.
        flip: Mirror the image left to right.
        channels: Channels of the model's input (`net.config.in_chans`); an RGB image becomes grey for a model of one channel.

    Returns:
        The tensor and where the image lies in it.

    Raises:
        UsageError: `scale` is not above 0, or the image's channels do not fit `channels` or `preprocessing`.
    """
    if scale <= 0:
        raise UsageError(f"scale must be above 0, not {scale!r}.")
    image_HWC = image_HWC if channels is None else with_channels(image_HWC, channels)
    mean, std = channel_statistics(preprocessing, image_HWC.shape[2])
    original_hw = (image_HWC.shape[0], image_HWC.shape[1])
    valid_hw = resized_hw(original_hw, preprocessing, scale)
    pixels_1CHW = torch.from_numpy(image_HWC if image_HWC.flags.writeable else image_HWC.copy()).permute(2, 0, 1)[None]
    if valid_hw != original_hw:
        pixels_1CHW = F.interpolate(pixels_1CHW, size=valid_hw, mode="bilinear", antialias=True, align_corners=False)
    if flip:
        pixels_1CHW = pixels_1CHW.flip(3)
    if preprocessing.channel_order == "BGR" and image_HWC.shape[2] == 3:
        pixels_1CHW = pixels_1CHW.flip(1)
    tensor_1CHW = pixels_1CHW.to(torch.float32).div_(255).sub_(mean).div_(std).contiguous()
    target_hw = [round((side - 1) * scale) + 1 for side in preprocessing.size] if preprocessing.pad else [0, 0]
    bottom, right = (max(0, target - valid, MIN_INPUT_SIZE - valid) for target, valid in zip(target_hw, valid_hw, strict=True))
    if bottom or right:
        tensor_1CHW = F.pad(tensor_1CHW, (0, right, 0, bottom))
    return PreparedImage(tensor_1CHW, valid_hw, original_hw, flip)


def with_channels(image_HWC: InputPixels, channels: int) -> InputPixels:
    """Return an image with the number of channels that a model takes: RGB becomes grey (ITU-R BT.601) for one channel.

    Raises:
        UsageError: The image has another number of channels that cannot be converted.
    """
    given = image_HWC.shape[2]
    if given == channels:
        return image_HWC
    if (given, channels) == (3, 1) and image_HWC.dtype == np.uint8:
        return np.asarray(Image.fromarray(image_HWC).convert("L"))[..., None]
    raise UsageError(
        f"The model takes {channels} channels and the image has {given}; give an array of shape H x W x {channels}, or a "
        f".npy or TIFF file of {channels} channels."
    )


def channel_statistics(preprocessing: Preprocessing, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and std for an image of so many channels, 1 x channels x 1 x 1 each.

    The three values of an RGB model whose first convolution was adapted are averaged for one channel and repeated in turn for
    more, as the convolution's weights are.

    Raises:
        UsageError: The preprocessing has neither three values nor one for each channel.
    """
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    if len(mean) != channels and len(mean) != 3:
        raise UsageError(f"The preprocessing has mean and std of {len(mean)} channels, and the image has {channels}.")
    if len(mean) != channels:
        in_turn = torch.arange(channels) % 3
        mean, std = (one.mean()[None] if channels == 1 else one[in_turn] for one in (mean, std))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def resized_hw(hw: tuple[int, int], preprocessing: Preprocessing, scale: float = 1.0) -> tuple[int, int]:
    """Return the height and width that preprocessing resizes an image to: `longest` fits into `size`, `shortest` covers it.

    Fractions of a pixel are rounded, with `shortest` truncated, as torchvision and transformers do (500 x 333 -> 780 x 520).

    Args:
        hw: Height and width of the image, in pixels.
        preprocessing: What the weights expect.
        scale: Factor on top of the resize.
    """
    ratios = [target / side for target, side in zip(preprocessing.size, hw, strict=True)]
    factor = {"none": 1.0, "longest": min(ratios), "shortest": max(ratios)}[preprocessing.resize]
    if preprocessing.only_shrink:
        factor = min(factor, 1.0)
    height, width = (side * factor * scale for side in hw)
    if preprocessing.resize == "shortest":
        height, width = math.floor(height + 1e-6), math.floor(width + 1e-6)  # a whole number may come out a hair too small
    return max(1, round(height)), max(1, round(width))


def image_logits(net: LowResolutionModel, prepared: PreparedImage) -> torch.Tensor:
    """Return logits at the image's own size, 1 x classes x H x W float32, on the model's device.

    The model must be in eval mode (`deeplabzoo.device.eval_mode`). A one-channel model gives two classes.
    """
    low_1CHW, grid = low_resolution_logits(net, prepared)
    return upsampled_logits(low_1CHW, grid)


def image_labels(net: LowResolutionModel, prepared: PreparedImage) -> Labels:
    """Return the label of every pixel of the image, H x W: the arg-max of `image_logits` without computing those logits."""
    low_1CHW, grid = low_resolution_logits(net, prepared)
    return argmax_labels(low_1CHW, grid)


def image_labels_with_confidence(net: LowResolutionModel, prepared: PreparedImage) -> tuple[Labels, Confidence]:
    """Return labels and the probability of each label, both H x W; slower, as every class is interpolated at every pixel."""
    low_1CHW, grid = low_resolution_logits(net, prepared)
    return argmax_labels_with_confidence(low_1CHW, grid)


def image_probabilities(
    net: LowResolutionModel, image_HWC: Pixels, scales: Sequence[float] = (1.0,), flip: bool = False
) -> torch.Tensor:
    """Return class probabilities at the image's own size, averaged over scales and flips as DeepLabV3 does (section 4.1).

    Args:
        net: Model in eval mode.
        image_HWC: Pixels, H x W x 3, RGB uint8.
        scales: Factors on top of the preprocessing's resize.
        flip: Average over the mirrored image too.

    Returns:
        Mean of the softmax outputs, 1 x classes x H x W float32, on the model's device.

    Raises:
        UsageError: `scales` is empty.
    """
    if not scales:
        raise UsageError("scales must name at least one scale, such as (1.0,).")
    total_1CHW: torch.Tensor | None = None
    for scale in scales:
        for flipped in (False, True) if flip else (False,):
            logits_1CHW = image_logits(
                net, prepare(image_HWC, net.preprocessing, scale=scale, flip=flipped, channels=net.config.in_chans)
            )
            probabilities_1CHW = logits_1CHW.softmax(dim=1)
            total_1CHW = probabilities_1CHW if total_1CHW is None else total_1CHW.add_(probabilities_1CHW)
    assert total_1CHW is not None
    return total_1CHW.div_(len(scales) * (2 if flip else 1))


def low_resolution_logits(net: LowResolutionModel, prepared: PreparedImage) -> tuple[torch.Tensor, OutputGeometry]:
    """Return the head's logits, 1 x classes x h x w on the model's device, and where they lie in the image.

    For what happens between model and labels: timing the two apart, averaging the frames of a video. A one-channel model gives
    two classes.

    Raises:
        UsageError: The head's channels are not those of the configuration.
    """
    with torch.inference_mode():
        low_1CHW = net.forward_low_resolution(prepared.tensor_1CHW.to(device_of(net)))
        low_1CHW = class_logits(low_1CHW, net.config.num_classes)
    padded_hw = (prepared.tensor_1CHW.shape[2], prepared.tensor_1CHW.shape[3])
    grid = OutputGeometry(padded_hw, prepared.valid_hw, prepared.original_hw, net.config.align_corners, prepared.flipped)
    return low_1CHW, grid
