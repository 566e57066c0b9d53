"""Every score of docs/metrics.md in plain Python and exact fractions, counted pixel by pixel: slow, and nothing can round."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

Pixel = tuple[int, int, int]
"""True label, predicted label, and how often the two stand at the same place."""


@dataclass(frozen=True)
class SlowScores:
    """Fields of `deeplabzoo.evaluation.metrics.Scores`, and the other rules called mIoU; None without valid pixels."""

    miou: Fraction | None
    per_class_iou: tuple[Fraction | None, ...]
    pixel_accuracy: Fraction | None
    mean_accuracy: Fraction | None
    frequency_weighted_iou: Fraction | None
    dice: Fraction | None
    per_class_dice: tuple[Fraction | None, ...]
    absent_classes: tuple[int, ...]
    other_rules: dict[str, Fraction | None]


def slow_scores(pixels: Iterable[Pixel], classes: int, ignored_class: int | None = None) -> SlowScores:
    """Return every score of pixels of which none is void; a class that is the ignored label itself has none."""
    both, true, predicted, total = [0] * classes, [0] * classes, [0] * classes, 0
    for true_label, predicted_label, times in pixels:
        total += times
        true[true_label] += times
        predicted[predicted_label] += times
        if true_label == predicted_label:
            both[true_label] += times
    either = [true[index] + predicted[index] - both[index] for index in range(classes)]
    iou = [_share(both[index], either[index]) for index in range(classes)]
    dice = [_share(2 * both[index], true[index] + predicted[index]) for index in range(classes)]
    found = [_share(both[index], true[index]) for index in range(classes)]
    rules = _other_rules(iou, true, both, either)
    if ignored_class is not None:
        iou[ignored_class] = dice[ignored_class] = None
    with_truth = [index for index in range(classes) if true[index]]
    weighted = [true[index] * (iou[index] or 0) for index in with_truth]
    return SlowScores(
        miou=_mean([one for one in iou if one is not None]),
        per_class_iou=tuple(iou),
        pixel_accuracy=_share(sum(both), total),
        mean_accuracy=_mean([one for one in found if one is not None]),
        frequency_weighted_iou=Fraction(sum(weighted), 1) / total if total else None,
        dice=_mean([one for one in dice if one is not None]),
        per_class_dice=tuple(dice),
        absent_classes=tuple(index for index in range(classes) if iou[index] is None),
        other_rules=rules,
    )


def _other_rules(
    iou: Sequence[Fraction | None], true: Sequence[int], both: Sequence[int], either: Sequence[int]
) -> dict[str, Fraction | None]:
    return {
        "absent_is_nan": None if None in iou else _mean([one for one in iou if one is not None]),
        "true_classes": _mean([iou[index] or Fraction(0) for index in range(len(iou)) if true[index]]),
        "absent_is_one": _mean([Fraction(1) if one is None else one for one in iou]),
        "absent_is_zero": _mean([one or Fraction(0) for one in iou]),
        "pooled": _share(sum(both), sum(either)),
    }


def _share(part: int, whole: int) -> Fraction | None:
    return Fraction(part, whole) if whole else None


def _mean(values: Sequence[Fraction]) -> Fraction | None:
    return sum(values, Fraction(0)) / len(values) if values else None
