"""Validation during training: the evaluation loop on this rank's shard, one exact confusion matrix for all ranks."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from deeplabzoo.data.dataset import Sample, SegmentationDataset
from deeplabzoo.data.image_io import Labels
from deeplabzoo.device import eval_mode
from deeplabzoo.evaluation.evaluate import evaluate_images, warn_if_one_class
from deeplabzoo.evaluation.metrics import Scores
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.distributed import DistributedContext


@dataclass(frozen=True, eq=False)
class PredictionSample:
    """An image with its true and predicted labels, for the log."""

    name: str
    image_HWC: npt.NDArray[np.uint8]
    truth_HW: npt.NDArray[Any]
    prediction_HW: npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ValidationResult:
    """Scores on (a part of) a split, the mean cross-entropy over its labelled pixels, and a few predictions."""

    scores: Scores
    loss: float
    """NaN where no pixel is labelled; images that are cut into tiles have no part in it."""
    pixels: int
    """Labelled pixels that `loss` is the mean of."""
    images: int
    samples: list[PredictionSample]


def center_crop_resize(sample: Sample, side: int) -> Sample:
    """Return the central square of a sample, resized to `side` x `side`; labels by nearest neighbour."""
    height, width = sample.labels.shape
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    image = Image.fromarray(sample.image).resize((side, side), Image.Resampling.BILINEAR, box=box)
    rows, columns = ((start + (np.arange(side) + 0.5) * short / side).astype(int) for start in (top, left))
    return Sample(np.asarray(image), sample.labels[rows][:, columns], sample.name)


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """Return at most `limit` indices of `count`, spread over all of them.

    >>> evenly_spaced(10, 3)
    [0, 3, 6]
    """
    kept = count if limit is None else min(limit, count)
    return [index * count // kept for index in range(kept)]


def validate(
    net: DeepLab,
    data: SegmentationDataset,
    distributed: DistributedContext,
    *,
    limit: int | None = None,
    num_samples: int = 0,
    crop: int | None = None,
) -> ValidationResult:
    """Score a model at the labels' own resolution in a single pass, as `evaluate` does, and measure its loss.

    Each rank evaluates its own shard; shards are disjoint and complete, so no image counts twice.

    Args:
        net: The bare model, not its DistributedDataParallel wrapper: shards may differ in length.
        data: The val split.
        distributed: This process among those of the run.
        limit: Evaluate at most so many images, evenly spaced.
        num_samples: Keep so many predictions of this rank.
        crop: Evaluate on central squares of this side in pixels instead of whole images.
    """
    indices = evenly_spaced(len(data), limit)
    kept: list[PredictionSample] = []

    def keep(sample: Sample, prediction_HW: Labels) -> None:
        if len(kept) < num_samples:
            kept.append(PredictionSample(sample.name, sample.image, sample.labels, prediction_HW))

    def cropped(sample: Sample) -> Sample:
        return sample if crop is None else center_crop_resize(sample, crop)

    with eval_mode(net):
        shard = [indices[place] for place in distributed.shard(len(indices))]
        sums = evaluate_images(net, data, shard, with_loss=True, transform=cropped, seen=keep)
    sums.matrix.counts = distributed.all_reduce_sum(torch.from_numpy(sums.matrix.counts)).numpy()
    totals = distributed.all_reduce_sum(torch.tensor([sums.loss, sums.loss_pixels], dtype=torch.float64))
    warn_if_one_class(sums.matrix, data.classes)
    mean_loss = float(totals[0] / totals[1]) if totals[1] else math.nan
    return ValidationResult(sums.matrix.scores(), mean_loss, round(float(totals[1])), len(indices), kept)
