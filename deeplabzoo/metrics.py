"""How well labels match the truth: one int64 confusion matrix, and every score read off it (numpy alone).

The definition is in docs/metrics.md: mIoU is the mean over the classes whose union is not empty, each union summed over the
whole data set at the labels' own resolution. What other projects print under the same name is in `OTHER_MIOU_RULES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deeplabzoo.errors import DataError, UsageError

Counts = npt.NDArray[np.int64]
Labels = npt.NDArray[Any]


@dataclass(frozen=True)
class Scores:
    """Scores in 0...1; a class that stands neither in the truth nor in the predictions has None and is in `absent_classes`.

    Where not a single pixel was scored, every mean is NaN.
    """

    miou: float
    per_class_iou: tuple[float | None, ...]
    pixel_accuracy: float
    mean_accuracy: float
    """Mean over the classes that the truth contains of the share of their pixels that was found."""
    frequency_weighted_iou: float
    """IoU weighted by the class's share of the true pixels."""
    dice: float
    """Mean over the same classes as `miou` of 2 |A and B| / (|A| + |B|)."""
    per_class_dice: tuple[float | None, ...]
    absent_classes: tuple[int, ...]


class ConfusionMatrix:
    """Counts how often a pixel of true class i was predicted as j, over any number of pictures.

    Integers, because float32 sums stop growing at 16.7 million pixels a cell, about 80 photos.

    >>> matrix = ConfusionMatrix(2)
    >>> matrix.update(np.array([[0, 1, 1]]), np.array([[0, 0, 1]]))
    >>> matrix.scores().miou
    0.5
    """

    def __init__(self, num_classes: int, ignore_index: int | None = 255) -> None:
        if num_classes < 1:
            raise UsageError(f"num_classes must be at least 1, not {num_classes}.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts: Counts = np.zeros((num_classes, num_classes), np.int64)
        """int64, rows are true classes, columns predicted ones."""

    def update(self, labels_pred_HW: Labels, labels_true_HW: Labels) -> None:
        """Add one picture, or any two integer arrays of the same shape; true pixels of `ignore_index` are left out.

        Raises UsageError if the shapes differ or a prediction is no class, DataError if a true label is no class.
        """
        if labels_pred_HW.shape != labels_true_HW.shape:
            raise UsageError(
                f"Predicted labels have shape {labels_pred_HW.shape} but true labels {labels_true_HW.shape}; "
                "resize the prediction to the truth, never the truth."
            )
        true, predicted = labels_true_HW.reshape(-1), labels_pred_HW.reshape(-1)
        if self.ignore_index is not None:
            scored = true != self.ignore_index
            true, predicted = true[scored], predicted[scored]
        if true.size == 0:
            return
        if int(true.min()) < 0 or int(true.max()) >= self.num_classes:
            raise DataError(
                f"True labels reach from {true.min()} to {true.max()}, expected 0..{self.num_classes - 1}"
                + ("." if self.ignore_index is None else f" or {self.ignore_index}.")
            )
        if int(predicted.min()) < 0 or int(predicted.max()) >= self.num_classes:
            raise UsageError(
                f"Predicted labels reach from {predicted.min()} to {predicted.max()}, expected 0..{self.num_classes - 1}."
            )
        cells = true.astype(np.int64) * self.num_classes + predicted
        self.counts += np.bincount(cells, minlength=self.num_classes**2).reshape(self.counts.shape)

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add what another matrix counted, e.g. on another part of the data: exact, whatever the parts' sizes.

        Raises UsageError if the other has a different number of classes or ignores another label.
        """
        if (other.num_classes, other.ignore_index) != (self.num_classes, self.ignore_index):
            raise UsageError(
                f"A matrix of {other.num_classes} classes ignoring {other.ignore_index} cannot be added to "
                f"one of {self.num_classes} classes ignoring {self.ignore_index}."
            )
        self.counts += other.counts

    def scores(self) -> Scores:
        """Return every score of what was counted so far."""
        hit, true, predicted = _areas(self.counts)
        union = true + predicted - hit
        present, labelled, total = union > 0, true > 0, int(true.sum())
        iou = _ratio(hit, union)
        dice = _ratio(2 * hit, true + predicted)
        recall = _ratio(hit, true)
        return Scores(
            miou=_mean(iou[present]),
            per_class_iou=_with_none(iou),
            pixel_accuracy=int(hit.sum()) / total if total else float("nan"),
            mean_accuracy=_mean(recall[labelled]),
            frequency_weighted_iou=float((true[labelled] * iou[labelled]).sum() / total) if total else float("nan"),
            dice=_mean(dice[present]),
            per_class_dice=_with_none(dice),
            absent_classes=tuple(int(index) for index in np.flatnonzero(~present)),
        )


def _absent_as(value: float) -> Callable[[Counts], float]:
    def miou(counts: Counts) -> float:
        hit, true, predicted = _areas(counts)
        iou = _ratio(hit, true + predicted - hit)
        return float(np.where(np.isnan(iou), value, iou).mean())

    return miou


def _over_true_classes(counts: Counts) -> float:
    hit, true, predicted = _areas(counts)
    return _mean(_ratio(hit, true + predicted - hit)[true > 0])


def _pooled(counts: Counts) -> float:
    hit, true, predicted = _areas(counts)
    union = int((true + predicted - hit).sum())
    return int(hit.sum()) / union if union else float("nan")


OTHER_MIOU_RULES: dict[str, Callable[[Counts], float]] = {
    "absent_is_nan": _absent_as(float("nan")),
    "true_classes": _over_true_classes,
    "absent_is_one": _absent_as(1.0),
    "absent_is_zero": _absent_as(0.0),
    "pooled": _pooled,
}
"""Other rules called mIoU that can be read off the same matrix; docs/metrics.md says who uses which, and one more that cannot.

They equal ours where every class has true pixels, except `pooled`, which is another quantity altogether.
"""


def _areas(counts: Counts) -> tuple[Counts, Counts, Counts]:
    """Pixels per class: predicted rightly, in the truth, in the predictions."""
    return np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)


def _ratio(part: Counts, whole: Counts) -> npt.NDArray[np.float64]:
    """`part / whole`, NaN where the whole is empty."""
    ratio: npt.NDArray[np.float64] = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return ratio


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _with_none(values: npt.NDArray[np.float64]) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(value) for value in values)
