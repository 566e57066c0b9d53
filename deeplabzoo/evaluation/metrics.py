"""Segmentation metrics: one int64 confusion matrix, and mIoU, per-class IoU, Dice and accuracies computed from it.

docs/metrics.md defines them: mIoU is the mean over the classes whose union is not empty, each union summed over the whole
dataset at the labels' own resolution. What other projects print under the same name is in `OTHER_MIOU_RULES`.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deeplabzoo import numba_jit
from deeplabzoo.errors import DataError, UsageError

Counts = npt.NDArray[np.int64]
Labels = npt.NDArray[Any]

VOID = 255
"""The usual label of pixels that are not scored; above 255 classes it is a class like any other."""
MAX_PIXELS_PER_CHUNK = 2**30
"""Pixels counted in 32 bits before they go into the 64-bit matrix."""


@dataclass(frozen=True)
class Scores:
    """Scores in 0...1; a class without a score has None and is in `absent_classes`.

    Without a score is a class that neither the ground truth nor the predictions contain, and a class that is itself the ignored
    label. Where not a single pixel was scored, every mean is NaN.
    """

    miou: float
    per_class_iou: tuple[float | None, ...]
    pixel_accuracy: float
    mean_accuracy: float
    """Mean recall over the classes that the ground truth contains."""
    frequency_weighted_iou: float
    """IoU weighted by the class's share of the true pixels."""
    dice: float
    """Mean over the same classes as `miou` of 2 |A and B| / (|A| + |B|)."""
    per_class_dice: tuple[float | None, ...]
    absent_classes: tuple[int, ...]


class ConfusionMatrix:
    """Counts how often a pixel of true class i was predicted as j, over any number of images.

    Integers, because float32 sums stop growing at 16.7 million pixels a cell, about 80 images.

    Args:
        num_classes: Number of classes; labels are 0 ... num_classes - 1.
        ignore_index: Label of true pixels that are not scored, None for none. If it is one of the classes, that class has no
            score and is left out of the means, as in torchmetrics. "auto" is 255 unless that is a class (above 255 classes).

    Raises:
        UsageError: `num_classes` is not a whole number above 0, or `ignore_index` no whole number.

    >>> matrix = ConfusionMatrix(2)
    >>> matrix.update(np.array([[0, 1, 1]]), np.array([[0, 0, 1]]))
    >>> matrix.scores().miou
    0.5
    """

    def __init__(self, num_classes: int, ignore_index: int | Literal["auto"] | None = "auto") -> None:
        self.num_classes = _whole_number(num_classes, "num_classes")
        if self.num_classes < 1:
            raise UsageError(f"num_classes must be at least 1, not {num_classes}.")
        if ignore_index == "auto":
            ignore_index = VOID if self.num_classes <= VOID else None
        self.ignore_index = None if ignore_index is None else _whole_number(ignore_index, "ignore_index")
        self.counts: Counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        """int64, rows are true classes, columns predicted ones."""

    @property
    def ignored_class(self) -> int | None:
        """The class that is the ignored label, or None where the ignored label is no class."""
        return self.ignore_index if self.ignore_index is not None and 0 <= self.ignore_index < self.num_classes else None

    def update(self, labels_pred_HW: Any, labels_true_HW: Any) -> None:
        """Add one image, or any two integer arrays of the same shape; true pixels of `ignore_index` are left out.

        Args:
            labels_pred_HW: Predicted class numbers: a numpy array or a torch tensor (any device), H x W or of any other shape.
            labels_true_HW: True class numbers, of the same shape.

        Raises:
            UsageError: The shapes differ, labels are no integers, or a prediction is no class. Nothing is counted then.
            DataError: A true label is neither a class nor `ignore_index`. Nothing is counted then.
        """
        predicted, true = _label_array(labels_pred_HW), _label_array(labels_true_HW)
        if predicted.shape != true.shape:
            scores = predicted.ndim == true.ndim + 1
            raise UsageError(
                f"Predicted labels have shape {predicted.shape} but true labels {true.shape}; "
                + ("if these are scores of each class, take their argmax; else " if scores else "")
                + "resize the prediction to the ground truth, never the ground truth."
            )
        true, predicted = np.ascontiguousarray(true).reshape(-1), np.ascontiguousarray(predicted).reshape(-1)
        if true.dtype == predicted.dtype == np.uint8:
            self._update_uint8(true, predicted)
            return
        if self.ignore_index is not None:
            scored = true != self.ignore_index
            true, predicted = true[scored], predicted[scored]
        if true.size == 0:
            return
        self._check_label_range(int(true.min()), int(true.max()), int(predicted.min()), int(predicted.max()))
        cells = true.astype(np.int64) * self.num_classes + predicted.astype(np.int64)
        self.counts += np.bincount(cells, minlength=self.num_classes**2).reshape(self.counts.shape)

    def _update_uint8(self, true: Labels, predicted: Labels) -> None:
        """Count all 256 x 256 pairs in one pass over the pixels, and look at what they are afterwards."""
        pairs = _pair_counts(true, predicted)
        if self.ignore_index is not None and 0 <= self.ignore_index < len(pairs):
            pairs[self.ignore_index] = 0
        classes = self.num_classes
        if pairs[classes:].any() or pairs[:classes, classes:].any():
            rows, columns = np.flatnonzero(pairs.any(axis=1)), np.flatnonzero(pairs.any(axis=0))
            self._check_label_range(int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1]))
        known = pairs[:classes, :classes]
        self.counts[: len(known), : len(known)] += known

    def _check_label_range(self, first_true: int, last_true: int, first_predicted: int, last_predicted: int) -> None:
        if first_true < 0 or last_true >= self.num_classes:
            raise DataError(
                f"True labels reach from {first_true} to {last_true}, expected 0..{self.num_classes - 1}"
                + ("." if self.ignore_index is None else f" or {self.ignore_index}.")
            )
        if first_predicted < 0 or last_predicted >= self.num_classes:
            raise UsageError(
                f"Predicted labels reach from {first_predicted} to {last_predicted}, expected 0..{self.num_classes - 1}."
            )

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add what another matrix counted, e.g. on another part of the data: exact, whatever the parts' sizes.

        Args:
            other: A matrix of as many classes with the same `ignore_index`.

        Raises:
            UsageError: The other has a different number of classes or ignores another label.
        """
        if (other.num_classes, other.ignore_index) != (self.num_classes, self.ignore_index):
            raise UsageError(
                f"A matrix of {other.num_classes} classes ignoring {other.ignore_index} cannot be added to "
                f"one of {self.num_classes} classes ignoring {self.ignore_index}."
            )
        self.counts += other.counts

    def scores(self) -> Scores:
        """Return all scores of what was counted so far."""
        hit, true, predicted = _class_areas(self.counts)
        union = true + predicted - hit
        present, labelled, total = union > 0, true > 0, int(true.sum())
        if self.ignored_class is not None:  # it has no true pixels left, so its IoU would be 0 wherever it is predicted
            present[self.ignored_class] = False
        iou = np.where(present, _ratio(hit, union), np.nan)
        dice = np.where(present, _ratio(2 * hit, true + predicted), np.nan)
        recall = _ratio(hit, true)
        return Scores(
            miou=_mean(iou[present]),
            per_class_iou=_nan_to_none(iou),
            pixel_accuracy=int(hit.sum()) / total if total else float("nan"),
            mean_accuracy=_mean(recall[labelled]),
            frequency_weighted_iou=float((true[labelled] * iou[labelled]).sum() / total) if total else float("nan"),
            dice=_mean(dice[present]),
            per_class_dice=_nan_to_none(dice),
            absent_classes=tuple(int(index) for index in np.flatnonzero(~present)),
        )


def _whole_number(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, not {value!r}.") from None


def _label_array(labels: Any) -> Labels:
    """Return labels as a numpy array of integers; raises UsageError for anything else."""
    if hasattr(labels, "detach"):  # a torch tensor; this module works without torch
        if labels.is_floating_point() or labels.is_complex():  # numpy has no bfloat16
            raise _not_integers(labels.dtype)
        labels = labels.detach().cpu().numpy()
    try:
        array = np.asarray(labels)
    except ValueError:
        raise UsageError("Predicted and true labels must be arrays, not lists of rows of unequal length.") from None
    if array.dtype.kind not in "iub":
        raise _not_integers(array.dtype)
    return array


def _not_integers(dtype: Any) -> UsageError:
    return UsageError(f"Predicted and true labels must be integers, not {dtype}; take the argmax of scores first.")


def _miou_with_absent_as(value: float) -> Callable[[Counts], float]:
    def miou(counts: Counts) -> float:
        hit, true, predicted = _class_areas(counts)
        iou = _ratio(hit, true + predicted - hit)
        return float(np.where(np.isnan(iou), value, iou).mean())

    return miou


def _miou_over_true_classes(counts: Counts) -> float:
    hit, true, predicted = _class_areas(counts)
    return _mean(_ratio(hit, true + predicted - hit)[true > 0])


def _pooled_iou(counts: Counts) -> float:
    hit, true, predicted = _class_areas(counts)
    union = int((true + predicted - hit).sum())
    return int(hit.sum()) / union if union else float("nan")


OTHER_MIOU_RULES: dict[str, Callable[[Counts], float]] = {
    "absent_is_nan": _miou_with_absent_as(float("nan")),
    "true_classes": _miou_over_true_classes,
    "absent_is_one": _miou_with_absent_as(1.0),
    "absent_is_zero": _miou_with_absent_as(0.0),
    "pooled": _pooled_iou,
}
"""Other definitions of mIoU, computed from the counts alone; docs/metrics.md lists who uses which.

They equal ours where every class has true pixels, except `pooled`, which is a different quantity. All count every class: use
them where no class is the ignored label.
"""


def _pair_counts(true: Labels, predicted: Labels) -> Counts:
    """Return how often each pair of bytes occurs at the same pixel: 256 x 256, by true and predicted label."""
    pairs = np.zeros((256, 256), np.int64)
    for start in range(0, true.size, MAX_PIXELS_PER_CHUNK):
        part = true[start : start + MAX_PIXELS_PER_CHUNK], predicted[start : start + MAX_PIXELS_PER_CHUNK]
        if numba_jit.numba_available():
            tables = np.zeros((4, 256 * 256), np.int32)
            eights = part[0].size // 8 * 8
            numba_jit.cached_njit(_count_label_pairs)(*(_as_uint64(labels[:eights]) for labels in part), tables.reshape(-1))
            pairs += tables.sum(axis=0, dtype=np.int64).reshape(pairs.shape)
            part = part[0][eights:], part[1][eights:]
        pairs += np.bincount(part[0].astype(np.uint16) * np.uint16(256) + part[1], minlength=256 * 256).reshape(pairs.shape)
    return pairs


def _as_uint64(labels: Labels) -> npt.NDArray[np.uint64]:
    """Pack eight labels into a number; always read-only and aligned, as numba compiles again for any other kind of array."""
    words: npt.NDArray[np.uint64] = (labels if labels.ctypes.data % 8 == 0 else labels.copy()).view(np.uint64)
    words.flags.writeable = False
    return words


def _count_label_pairs(true: npt.NDArray[np.uint64], predicted: npt.NDArray[np.uint64], tables: npt.NDArray[np.int32]) -> None:
    """Count eight pixels per iteration: as one where they are equal, as most are, else in four tables in turn.

    With one table each pixel would wait until its neighbour's count, usually the same cell, is back in memory.
    """
    ones, byte = np.uint64(0x0101010101010101), np.uint64(255)
    for n in range(len(true)):
        t, p = true[n], predicted[n]
        first_t, first_p = t & byte, p & byte
        if t == first_t * ones and p == first_p * ones:
            tables[(first_t << np.uint64(8)) | first_p] += 8
        else:
            shift = np.uint64(0)
            for place in range(8):
                pair = (((t >> shift) & byte) << np.uint64(8)) | ((p >> shift) & byte)
                tables[(np.uint64(place & 3) << np.uint64(16)) | pair] += 1
                shift += np.uint64(8)


def _class_areas(counts: Counts) -> tuple[Counts, Counts, Counts]:
    """Return pixels per class: correctly predicted, in the ground truth, in the predictions."""
    return np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)


def _ratio(part: Counts, whole: Counts) -> npt.NDArray[np.float64]:
    """Return `part / whole`, NaN where the whole is 0."""
    ratio: npt.NDArray[np.float64] = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return ratio


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _nan_to_none(values: npt.NDArray[np.float64]) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(value) for value in values)
