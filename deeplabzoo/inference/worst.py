"""The pictures that an evaluation did worst on, kept while it runs."""

import heapq
from dataclasses import dataclass, field

from deeplabzoo.data.base import Sample
from deeplabzoo.data.images import Labels
from deeplabzoo.metrics import ConfusionMatrix


@dataclass(frozen=True, order=True)
class Poor:
    """One picture, its prediction and its own scores; the better of two is the lesser, as a heap throws that out first."""

    badness: float
    """1 - mIoU over the classes of this picture, in its labels or its prediction."""
    order: int
    sample: Sample = field(compare=False)
    predicted: Labels = field(compare=False)
    iou: tuple[float | None, ...] = field(compare=False)
    """By class; None where it is absent."""

    @property
    def miou(self) -> float:
        """Mean IoU of this picture alone, 0...1."""
        return 1 - self.badness


class WorstPictures:
    """Holds the `count` pictures of lowest mIoU, of any number seen; of equal ones those that came first."""

    def __init__(self, count: int, num_classes: int, ignore_index: int) -> None:
        self.count, self.num_classes, self.ignore_index = count, num_classes, ignore_index
        self._heap: list[Poor] = []
        self._seen = 0

    def see(self, sample: Sample, predicted: Labels) -> None:
        """Score one picture by itself and keep it if it is among the worst; one that is void all over is not."""
        matrix = ConfusionMatrix(self.num_classes, self.ignore_index)
        matrix.update(predicted, sample.labels)
        self._seen += 1
        if not matrix.counts.any():
            return
        scores = matrix.scores()
        heapq.heappush(self._heap, Poor(1 - scores.miou, -self._seen, sample, predicted, tuple(scores.per_class_iou)))
        if len(self._heap) > self.count:
            heapq.heappop(self._heap)

    def ranked(self) -> list[Poor]:
        """Return them, the worst first."""
        return sorted(self._heap, reverse=True)
