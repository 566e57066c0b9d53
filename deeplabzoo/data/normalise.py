"""Pictures in bytes → the float32 input that weights expect, on the device where the bytes are."""

import numpy as np
import torch

from deeplabzoo import jit
from deeplabzoo.models.config import Preprocessing

_RGB = 3


def normalised(image_BCHW: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Return uint8 RGB as the float32 input that the weights expect, on the image's own device, in channels_last memory.

    A byte has 256 values, so on a processor the arithmetic is done for those alone and looked up for each pixel. Elsewhere it
    is done in place and picture by picture, on rows of pixels. The steps are those of inference.
    """
    if preprocessing.channel_order == "BGR":
        image_BCHW = image_BCHW.flip(1)
    batch, channels, height, width = image_BCHW.shape
    device = image_BCHW.device
    mean, std = (torch.tensor(one) for one in (preprocessing.mean, preprocessing.std))
    pixels = image_BCHW.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    normal = torch.empty(pixels.shape, dtype=torch.float32, device=device)
    if device.type == "cpu" and channels == _RGB and jit.available():
        table_3N = _in_steps(torch.arange(256.0)[:, None].repeat(1, _RGB), mean, std).T.contiguous()
        jit.compiled(_look_up)(pixels.reshape(-1).numpy(), table_3N.numpy(), normal.view(-1).numpy())
    else:
        mean, std = (one.repeat(width).to(device) for one in (mean, std))
        for one, given in zip(normal, pixels, strict=True):
            _in_steps(one.copy_(given), mean, std)
    return normal.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _in_steps(values: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
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
