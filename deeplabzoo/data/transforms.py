"""Augmentation of an image and its labels together: random scale, crop, flip, colour and blur, in 8 bits, seeded per sample.

Only the part of the image that survives the crop is resized, and it is written where it is wanted: the result
is that of scale-then-crop at a fraction of the cost.
"""

import functools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

from deeplabzoo import numba_jit
from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.errors import UsageError
from deeplabzoo.log import logger
from deeplabzoo.models.config import Preprocessing

if TYPE_CHECKING:
    import torch

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the source; fractions are meant."""

_HUE_FRACTION = 0.1  # of a full turn, at colour strength 1: skies and skins keep their kind of colour
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])  # NTSC: greys have no chroma
_TO_RGB = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What may happen to a training sample; the defaults are the papers' (scale 0.5-2, flip; DeepLabV3, section 4.1).

    Raises UsageError when a value makes no sense.
    """

    crop: tuple[int, int]
    """(height, width) in pixels of everything that comes out."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the uniformly drawn factor by which height and width are multiplied before the crop."""
    flip: float = 0.5
    """Probability of mirroring left and right."""
    colour: float = 0.0
    """Strength: brightness, contrast and saturation are each multiplied by 1 ± colour, hue is turned by ± colour / 10."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 1.5)
    """Range of the blur's standard deviation, in pixels of the crop."""

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or not all(isinstance(side, int) and side >= 1 for side in self.crop):
            raise UsageError(f"crop must be (height, width), two whole numbers of at least 1, not {self.crop!r}.")
        for field in ("scale", "blur_sigma"):
            bounds = getattr(self, field)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < float("inf"):
                raise UsageError(f"{field} must be (low, high) with 0 < low <= high, not {bounds!r}.")
        for field in ("flip", "blur", "colour"):
            value = getattr(self, field)
            if not 0 <= value <= 1:
                raise UsageError(f"{field} must lie between 0 and 1, not {value!r}.")


def augment(
    sample: Sample,
    augmentation: Augmentation,
    rng: np.random.Generator,
    *,
    mean_fill: tuple[int, int, int],
    ignore_index: int,
    out_HWC: Pixels | None = None,
) -> tuple[Pixels, Labels]:
    """Return (image_HWC uint8, labels_HW) of size `augmentation.crop`: a pure function of the sample and the generator's state.

    A scaled image smaller than the crop is extended at the bottom and right, as at evaluation, with `mean_fill` (RGB, the
    value that normalises to about 0) and `ignore_index`. The image is resampled bilinearly with antialiasing, labels by nearest
    neighbour, so no label value is invented. With `out_HWC`, a place in a batch, the image is written there. The same number of
    random values is drawn whatever happens: switching colour on does not move the crops.
    """
    u_scale, u_top, u_left, u_flip, u_blur, u_sigma, *u_colour = rng.random(10).tolist()
    low, high = augmentation.scale
    scale = low + (high - low) * u_scale
    height, width = sample.labels.shape
    scaled_hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    crop_hw = augmentation.crop
    visible_hw = (min(scaled_hw[0], crop_hw[0]), min(scaled_hw[1], crop_hw[1]))
    top = int(u_top * (scaled_hw[0] - visible_hw[0] + 1))
    left = int(u_left * (scaled_hw[1] - visible_hw[1] + 1))

    flip = u_flip < augmentation.flip

    if out_HWC is None:
        out_HWC = np.empty((*crop_hw, 3), np.uint8)
    box = _box(sample.image.shape[:2], scaled_hw, (top, left), visible_hw)
    if augmentation.colour or u_blur < augmentation.blur:
        pixels_HWC = np.empty((*visible_hw, 3), np.uint8)
        resize_into(pixels_HWC, sample.image, box, visible_hw, flip=False, fill=mean_fill)
        image = Image.fromarray(pixels_HWC)
        if augmentation.colour:
            image = _color_jitter(image, augmentation.colour, u_colour)
        if u_blur < augmentation.blur:
            smallest, largest = augmentation.blur_sigma
            image = image.filter(ImageFilter.GaussianBlur(smallest + (largest - smallest) * u_sigma))
        paste_into(out_HWC, np.asarray(image), flip=flip, fill=mean_fill)
    else:
        resize_into(out_HWC, sample.image, box, visible_hw, flip=flip, fill=mean_fill)
    labels_HW = _resize_labels(sample.labels, scaled_hw, (top, left), visible_hw, flip)
    return out_HWC, _pad_labels(labels_HW, crop_hw, ignore_index)


def _box(hw: tuple[int, ...], scaled_hw: tuple[int, int], corner: tuple[int, int], visible_hw: tuple[int, int]) -> Box:
    """Return where the window at `corner` (top, left) of size `visible_hw` of the scaled image lies in the image itself."""
    row_step, column_step = hw[0] / scaled_hw[0], hw[1] / scaled_hw[1]
    (top, left), (height, width) = corner, visible_hw
    # Rounding may leave the box a hair outside the image.
    return (
        left * column_step,
        top * row_step,
        min((left + width) * column_step, hw[1]),
        min((top + height) * row_step, hw[0]),
    )


def _resize_labels(
    labels_HW: Labels, scaled_hw: tuple[int, int], corner: tuple[int, int], visible_hw: tuple[int, int], flip: bool
) -> Labels:
    """Return the same window of the labels: each pixel takes the label under its centre, in integer arithmetic."""
    rows, columns = (
        ((2 * np.arange(start, start + kept) + 1) * size) // (2 * scaled)
        for start, kept, size, scaled in zip(corner, visible_hw, labels_HW.shape, scaled_hw, strict=True)
    )
    columns = columns[::-1] if flip else columns
    window: Labels
    if scaled_hw[0] <= labels_HW.shape[0]:
        window = labels_HW[rows].take(columns, axis=1)
    else:  # a row that is shown more than once is picked from once
        window = labels_HW[rows[0] : rows[-1] + 1].take(columns, axis=1)[rows - rows[0]]
    return window


def _color_jitter(image: Image.Image, strength: float, u_colour: list[float]) -> Image.Image:
    """Change brightness, contrast, saturation and hue in one pass; `u_colour` are four values in [0, 1).

    All four are linear in RGB (hue as a turn of the chroma plane of YIQ), so they are one 3 x 4 matrix: a tenth of the time of
    one after the other, and nothing is clipped in between.
    """
    brightness, contrast, saturation, turn = (strength * (2 * u - 1) for u in u_colour)
    angle = 2 * math.pi * _HUE_FRACTION * turn
    chroma = (1 + saturation) * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    yiq_to_yiq = np.eye(3)
    yiq_to_yiq[1:, 1:] = chroma
    matrix = (1 + brightness) * (1 + contrast) * (_TO_RGB @ yiq_to_yiq @ _TO_YIQ)
    mean = _TO_YIQ[0] @ np.array(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)), np.float64)
    offset = np.full((3, 1), -contrast * (1 + brightness) * mean)  # contrast leaves the mean brightness where it was
    return image.convert("RGB", tuple(np.hstack([matrix, offset]).ravel().tolist()))


def _pad_labels(labels_HW: Labels, crop_hw: tuple[int, int], ignore_index: int) -> Labels:
    if labels_HW.shape == crop_hw:
        return labels_HW
    height, width = labels_HW.shape
    padded = np.full(crop_hw, ignore_index, np.result_type(labels_HW.dtype, np.min_scalar_type(ignore_index)))
    padded[:height, :width] = labels_HW
    return padded


# Normalisation: bytes to the float32 input that the weights expect.


_RGB = 3


def normalize_images(image_BCHW: "torch.Tensor", preprocessing: Preprocessing) -> "torch.Tensor":
    """Return uint8 RGB as the float32 input that the weights expect, on the image's own device, in channels_last memory.

    A byte has 256 values, so on a processor the arithmetic is done for those alone and looked up for each pixel. Elsewhere it
    is done in place and image by image, on rows of pixels. The steps are those of inference.
    """
    import torch  # here, because recipes import this module and listing them needs no torch

    if preprocessing.channel_order == "BGR":
        image_BCHW = image_BCHW.flip(1)
    batch, channels, height, width = image_BCHW.shape
    device = image_BCHW.device
    mean, std = (torch.tensor(one) for one in (preprocessing.mean, preprocessing.std))
    pixels = image_BCHW.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    normal = torch.empty(pixels.shape, dtype=torch.float32, device=device)
    if device.type == "cpu" and channels == _RGB and numba_jit.numba_available():
        table_3N = _normalize_in_place(torch.arange(256.0)[:, None].repeat(1, _RGB), mean, std).T.contiguous()
        numba_jit.cached_njit(_look_up)(pixels.reshape(-1).numpy(), table_3N.numpy(), normal.view(-1).numpy())
    else:
        mean, std = (one.repeat(width).to(device) for one in (mean, std))
        for one, given in zip(normal, pixels, strict=True):
            _normalize_in_place(one.copy_(given), mean, std)
    return normal.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _normalize_in_place(values: "torch.Tensor", mean: "torch.Tensor", std: "torch.Tensor") -> "torch.Tensor":
    """Normalise in place, by the operations of inference one after the other: joined ones would round otherwise."""
    return values.div_(255).sub_(mean).div_(std)


def _look_up(pixels, table_3N, out):  # type: ignore[no-untyped-def]
    """Write `table_3N[channel, byte]` for each byte of rows of RGB pixels, all of them flat."""
    red, green, blue = table_3N
    for pixel in range(pixels.size // 3):
        at = np.uintp(3) * np.uintp(pixel)
        out[at] = red[np.uintp(pixels[at])]
        out[at + np.uintp(1)] = green[np.uintp(pixels[at + np.uintp(1)])]
        out[at + np.uintp(2)] = blue[np.uintp(pixels[at + np.uintp(2)])]


# A window of the resized image, without resizing the rest: bilinear with antialiasing, as Pillow does it.
#
# Pillow's box resize reads the same source pixels with the same weights as resizing the whole image would. Here it runs in
# one of two ways that give the same pixels bit for bit: compiled by numba (the extra `fast`), or by Pillow itself.


@functools.cache
def load_kernel() -> ModuleType | None:
    """Return the module of compiled functions, or None (logged once) without numba; call it before workers fork."""
    try:
        from deeplabzoo.data import resize_numba
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        logger.info(
            f"resize: numba cannot be used ({reason}), so Pillow resizes the training images: the same pixels, but slower "
            '(pip install "deeplabzoo[fast]").'
        )
        return None
    return resize_numba


def resize_into(
    out_HWC: Pixels, image_HWC: Pixels, box: Box, visible_hw: tuple[int, int], *, flip: bool, fill: tuple[int, int, int]
) -> None:
    """Write the window `box`, resized to `visible_hw` and mirrored with `flip`, into the top left of `out_HWC`; `fill` beyond.

    All are uint8 RGB; `out_HWC` is contiguous and at least as large as `visible_hw`.
    """
    (left, right), columns = _source_window(box[0], box[2], visible_hw[1], image_HWC.shape[1])
    (top, bottom), rows = _source_window(box[1], box[3], visible_hw[0], image_HWC.shape[0])
    part_HWC = image_HWC[rows, columns]
    compiled = load_kernel()
    if compiled is None:
        paste_into(out_HWC, _resize_with_pillow(part_HWC, (left, top, right, bottom), visible_hw), flip=flip, fill=fill)
        return
    across = compiled.taps(part_HWC.shape[1], left, _step(left, right, visible_hw[1]), visible_hw[1])
    down = compiled.taps(part_HWC.shape[0], top, _step(top, bottom, visible_hw[0]), visible_hw[0])
    whole = image_HWC if image_HWC.flags.c_contiguous else np.ascontiguousarray(image_HWC)
    compiled.resample_into(whole[rows], columns.start, *across, *down, flip, np.array(fill, np.uint8), out_HWC)


def paste_into(out_HWC: Pixels, pixels_HWC: Pixels, *, flip: bool, fill: tuple[int, int, int]) -> None:
    """Write an image, mirrored with `flip`, into the top left corner of `out_HWC`, and `fill` (RGB) beyond it."""
    height, width = pixels_HWC.shape[:2]
    out_HWC[:height, :width] = pixels_HWC[:, ::-1] if flip else pixels_HWC
    out_HWC[height:] = fill
    out_HWC[:height, width:] = fill


def _step(start: float, stop: float, count: int) -> float:
    """Return how many source pixels an output covers; Pillow subtracts in float32."""
    return float(np.float32(stop) - np.float32(start)) / count


def _source_window(start: float, stop: float, count: int, size: int) -> tuple[tuple[float, float], slice]:
    """Return the source pixels that a side of the window can touch, and the window's ends counted from the first of them.

    The ends are float32, as in Pillow's interface; a whole number can be taken from them without rounding.
    """
    first, last = float(np.float32(start)), float(np.float32(stop))
    reach = max(1.0, (last - first) / count) + 1
    begin, end = max(0, math.floor(first - reach)), min(size, math.ceil(last + reach))
    return (first - begin, last - begin), slice(begin, end)


def _resize_with_pillow(part_HWC: Pixels, box: Box, visible_hw: tuple[int, int]) -> Pixels:
    """Resize columns first and then rows, in two calls: which comes first within one call depends on Pillow's version."""
    (left, top, right, bottom), (height, width) = box, visible_hw
    bilinear, rows = Image.Resampling.BILINEAR, part_HWC.shape[0]
    across = Image.fromarray(part_HWC).resize((width, rows), bilinear, box=(left, 0, right, rows))
    return np.asarray(across.resize((width, height), bilinear, box=(0, top, width, bottom)))
