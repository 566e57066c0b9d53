"""How well labels match the truth: one int64 confusion matrix, and every score read off it.

The definition is in docs/metrics.md: mIoU is the mean over the classes whose union is not empty, each union summed over the
whole data set at the labels' own resolution. What other projects print under the same name is in `OTHER_MIOU_RULES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deeplabzoo import numba_jit
from deeplabzoo.errors import DataError, UsageError

Counts = npt.NDArray[np.int64]
Labels = npt.NDArray[Any]

MAX_PIXELS_PER_CHUNK = 2**30
"""Pixels counted in 32 bits before they go into the 64-bit matrix."""


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

        Raises UsageError if the shapes differ, labels are no integers or a prediction is no class, DataError if a true label is
        no class; nothing is counted then.
        """
        if labels_pred_HW.shape != labels_true_HW.shape:
            raise UsageError(
                f"Predicted labels have shape {labels_pred_HW.shape} but true labels {labels_true_HW.shape}; "
                "resize the prediction to the truth, never the truth."
            )
        for labels in (labels_pred_HW, labels_true_HW):
            if labels.dtype.kind not in "iub":
                raise UsageError(
                    f"Predicted and true labels must be integers, not {labels.dtype}; take the argmax of scores first."
                )
        true, predicted = np.ascontiguousarray(labels_true_HW).reshape(-1), np.ascontiguousarray(labels_pred_HW).reshape(-1)
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
        hit, true, predicted = _class_areas(self.counts)
        union = true + predicted - hit
        present, labelled, total = union > 0, true > 0, int(true.sum())
        iou = _ratio(hit, union)
        dice = _ratio(2 * hit, true + predicted)
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
"""Other rules called mIoU that can be read off the same matrix; docs/metrics.md says who uses which, and one more that cannot.

They equal ours where every class has true pixels, except `pooled`, which is another quantity altogether.
"""


def _pair_counts(true: Labels, predicted: Labels) -> Counts:
    """How often each pair of bytes stands at the same place: 256 x 256, by true and predicted label."""
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
    """Eight labels a number; always read-only and aligned, as numba compiles a loop anew for every other kind of memory."""
    words: npt.NDArray[np.uint64] = (labels if labels.ctypes.data % 8 == 0 else labels.copy()).view(np.uint64)
    words.flags.writeable = False
    return words


def _count_label_pairs(true: npt.NDArray[np.uint64], predicted: npt.NDArray[np.uint64], tables: npt.NDArray[np.int32]) -> None:
    """Count eight pixels a step: as one where they are alike, as most are, else in four tables in turn.

    One table would make each pixel wait until its neighbour's count, usually the same one, is back in memory.
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
    """Pixels per class: predicted rightly, in the truth, in the predictions."""
    return np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)


def _ratio(part: Counts, whole: Counts) -> npt.NDArray[np.float64]:
    """`part / whole`, NaN where the whole is empty."""
    ratio: npt.NDArray[np.float64] = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return ratio


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _nan_to_none(values: npt.NDArray[np.float64]) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(value) for value in values)
