"""Real photos as a quantiser wants them: what the user gave, prepared as the weights expect it, one at a time."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from deeplabzoo.data.images import Pixels, read_image
from deeplabzoo.errors import UsageError
from deeplabzoo.inference.preprocess import prepare
from deeplabzoo.inference.sources import find_photos
from deeplabzoo.models.deeplab import DeepLab

CalibrationImages = str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Pixels] | npt.NDArray[np.uint8] | torch.Tensor
"""A folder or pattern, a list of photos (paths or uint8 H x W x 3), an array N x H x W x 3, or prepared images N x C x H x W
(a float tensor)."""

MOST = 64
"""Photos used of a larger folder, spread over it; more did not move the figures."""


class Calibration:
    """The pictures that a quantised network is fitted to; iterate to get prepared arrays 1 x C x H x W."""

    def __init__(self, net: DeepLab, images: CalibrationImages | None) -> None:
        """Find the pictures; raises UsageError where there are none, ImageError where a folder or file cannot be read."""
        self.net = net
        self.images = _listed(images)

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.images)

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        """Read, prepare and yield them in order."""
        for image in self.images:
            if isinstance(image, torch.Tensor):
                yield image[None].detach().cpu().float().numpy()
            else:
                pixels = image if isinstance(image, np.ndarray) else read_image(image)
                yield prepare(pixels, self.net.preprocessing).tensor_1CHW.numpy()


def _listed(images: CalibrationImages | None) -> list[Path | Pixels | torch.Tensor]:
    if images is None or (not isinstance(images, str | os.PathLike) and len(images) == 0):
        raise UsageError(
            "precision='int8' needs calibration=, some twenty or more photos of the kind that the network will see: "
            "a folder, a list of files, or arrays."
        )
    if isinstance(images, str | os.PathLike):
        found: list[Path | Pixels | torch.Tensor] = [source.path for source in find_photos([os.fspath(images)])]
    else:
        found = [Path(one) if isinstance(one, str | os.PathLike) else one for one in images]
    if len(found) <= MOST:
        return found
    return [found[round(index * (len(found) - 1) / (MOST - 1))] for index in range(MOST)]
