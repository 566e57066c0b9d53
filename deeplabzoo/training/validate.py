"""Measuring the network while it trains: every process its own pictures, one exact confusion matrix."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from deeplabzoo.data.dataset import Sample, SegmentationDataset
from deeplabzoo.device import eval_mode
from deeplabzoo.evaluation.metrics import ConfusionMatrix, Scores
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.processing.preprocessing import image_logits, prepare
from deeplabzoo.training.distributed import DistributedContext

_ONE_CLASS_FRACTION = 0.99
"""Share of all predictions above which one class is reported: the black picture that scores well (asks.md theme N)."""


@dataclass(frozen=True, eq=False)
class PredictionSample:
    """A photo, its labels and the network's, for looking at."""

    name: str
    image_HWC: npt.NDArray[np.uint8]
    truth_HW: npt.NDArray[Any]
    prediction_HW: npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ValidationResult:
    """Scores on (a part of) a split, the mean cross-entropy over its valid pixels, and a few pictures."""

    scores: Scores
    loss: float
    """`nan` where no pixel is valid."""
    pixels: int
    """Valid ones."""
    images: int
    samples: list[PredictionSample]


def center_crop_resize(sample: Sample, side: int) -> Sample:
    """Return the middle of a sample whose shorter side was resized to `side`; labels by nearest neighbour."""
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
    """Score `net` at the labels' own resolution, single scale; the pictures of the split are shared out without repeats.

    The bare network runs here, never the parallel one: shards may differ in length. Says so if one class swallows everything.
    """
    indices = evenly_spaced(len(data), limit)
    matrix = ConfusionMatrix(len(data.classes), data.ignore_index)
    loss, pixels = 0.0, 0
    kept: list[PredictionSample] = []
    with eval_mode(net):
        for place in distributed.shard(len(indices)):
            sample = data[indices[place]] if crop is None else center_crop_resize(data[indices[place]], crop)
            logits_1CHW = image_logits(net, prepare(sample.image, net.preprocessing))
            labels_1HW = torch.from_numpy(sample.labels.astype(np.int64))[None].to(logits_1CHW.device)
            loss += float(F.cross_entropy(logits_1CHW, labels_1HW, ignore_index=data.ignore_index, reduction="sum"))
            pixels += int((labels_1HW != data.ignore_index).sum())
            prediction_HW = logits_1CHW[0].argmax(0).cpu().numpy()
            matrix.update(prediction_HW, sample.labels)
            if len(kept) < num_samples:
                kept.append(PredictionSample(sample.name, sample.image, sample.labels, prediction_HW))
    matrix.counts = distributed.all_reduce_sum(torch.from_numpy(matrix.counts)).numpy()
    sums = distributed.all_reduce_sum(torch.tensor([loss, pixels], dtype=torch.float64))
    _warn_if_one_class(matrix, data)
    mean_loss = float(sums[0] / sums[1]) if sums[1] else math.nan
    return ValidationResult(matrix.scores(), mean_loss, round(float(sums[1])), len(indices), kept)


def _warn_if_one_class(matrix: ConfusionMatrix, data: SegmentationDataset) -> None:
    total = max(1, int(matrix.counts.sum()))
    predicted, true = matrix.counts.sum(axis=0) / total, matrix.counts.sum(axis=1) / total
    most = int(predicted.argmax())
    if predicted[most] > _ONE_CLASS_FRACTION > true[most]:
        logger.info(
            f"{100 * predicted[most]:.1f} % of all predictions are '{data.classes[most]}', which has {100 * true[most]:.1f} % "
            "of the labelled pixels; if this stays, weigh classes (class_weights) or lower lr"
        )
