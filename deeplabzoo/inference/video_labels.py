"""Labels of the frames of a video: each as a photo, or averaged over time so that they do not flicker."""

import numpy as np
import torch

from deeplabzoo.data.images import Labels, Pixels
from deeplabzoo.errors import UsageError
from deeplabzoo.inference.device import evaluating
from deeplabzoo.inference.labels import ClassArea, labels_on_grid
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.preprocess import low_resolution, prepare


class FrameLabels:
    """Labels of one frame after another, H x W, and the areas of all of them.

    With `smooth` N above 1 the class probabilities are averaged over time, at the resolution of the head's logits:
    the newest frame counts 2 / (N + 1), each older one that much less, so labels flicker less and follow changes N / 2 frames
    late (an exponential moving average whose weights have the mean age of a plain average over N frames). With 0 or 1 a frame
    gets what the predictor says of it as a photo. Raises UsageError for a negative N, or for N with frames that are cut into
    tiles.
    """

    def __init__(self, predictor: Predictor, hw: tuple[int, int], smooth: int = 0) -> None:
        self._in_tiles = predictor.tiling_for(hw) is not None
        if smooth < 0:
            raise UsageError(f"smooth must be 0 (each frame alone) or the number of frames to average over, not {smooth}.")
        if smooth > 1 and self._in_tiles:
            raise UsageError("Smoothing does not go with tiles: leave one of them out (predict --smooth, --tile).")
        self.predictor = predictor
        self._newest = 2 / (smooth + 1) if smooth > 1 else 1.0
        self._mean_1CHW: torch.Tensor | None = None
        self._counts = np.zeros(len(predictor.net.classes), np.int64)

    def __call__(self, image_HWC: Pixels) -> Labels:
        """Return the labels of the next frame."""
        labels_HW = self.predictor(image_HWC).labels if self._in_tiles else self._whole(image_HWC)
        self._counts += np.bincount(labels_HW.ravel(), minlength=len(self._counts))
        return labels_HW

    def areas(self) -> tuple[ClassArea, ...]:
        """Return the classes that occurred, counted over every pixel of every frame so far, largest first."""
        order = sorted(np.flatnonzero(self._counts).tolist(), key=lambda index: -int(self._counts[index]))
        counts, total = self._counts, int(self._counts.sum())
        names = self.predictor.net.classes
        return tuple(ClassArea(index, names[index], int(counts[index]), int(counts[index]) / total) for index in order)

    def _whole(self, image_HWC: Pixels) -> Labels:
        net = self.predictor.form()
        with evaluating(net):
            low_1CHW, grid = low_resolution(net, prepare(image_HWC, net.preprocessing))
            if self._newest == 1:
                return labels_on_grid(low_1CHW, grid)
            now_1CHW = low_1CHW.float().softmax(dim=1)
            self._mean_1CHW = now_1CHW if self._mean_1CHW is None else self._mean_1CHW.lerp(now_1CHW, self._newest)
            # The log of one frame's probabilities is its logits but for a constant, so a still picture keeps its labels.
            return labels_on_grid(self._mean_1CHW.clamp_min(torch.finfo(torch.float32).tiny).log(), grid)
