"""Scores on what breaks scores: against exact fractions and torchmetrics, whatever the labels, their type and their number."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_scores import SlowScores, slow_scores
from torchmetrics.functional import classification as oracle
from trust_record import TrustRecord, write_record

from deeplabzoo import numba_jit
from deeplabzoo.data.classes import default_palette
from deeplabzoo.data.dataset import Sample
from deeplabzoo.errors import DataError, DeepLabZooError, UsageError
from deeplabzoo.evaluation.evaluate import evaluate
from deeplabzoo.evaluation.metrics import OTHER_MIOU_RULES, ConfusionMatrix, Scores
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab

CLOSE = 1e-12
"""Float64 divisions and a sum over at most 300 classes; a fraction has no error."""
DTYPES = (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.uint64)
CI_EXAMPLES, SOAK_EXAMPLES = 25, 1000


@dataclass(frozen=True)
class Labelled:
    """Pictures of one data set: each a predicted and a true array of the same shape."""

    classes: int
    ignore_index: int | None
    pictures: tuple[tuple[np.ndarray, np.ndarray], ...]

    def matrix(self) -> ConfusionMatrix:
        return ConfusionMatrix(self.classes, self.ignore_index)

    def pixels(self) -> list[tuple[int, int, int]]:
        """What is scored."""
        pairs = [
            pair
            for predicted, true in self.pictures
            for pair in zip(true.ravel().tolist(), predicted.ravel().tolist(), strict=True)
        ]
        return [(true, predicted, 1) for true, predicted in pairs if true != self.ignore_index]

    @property
    def ignored_class(self) -> int | None:
        """The ignored label where it is one of the classes."""
        return self.ignore_index if self.ignore_index in range(self.classes) else None


@st.composite
def data_sets(draw: st.DrawFn, *, spoilt: bool = False) -> Labelled:
    """Few labels of possibly many classes, so that most are absent; pictures of no or only void pixels; any integer type."""
    classes = draw(st.sampled_from([1, 2, 3, 19, 21, 150, 255, 256, 257, 300]))
    ignore_index = draw(st.sampled_from([None, 0, classes - 1, classes, 127, 255, 65535, -1]))
    used = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=4))
    void = [] if ignore_index is None else [ignore_index]
    pictures = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(1, 1), (0, 5), (1, 7), (7, 1), (5, 6), (3,), (2, 3, 4)]))
        true_labels, predicted_labels = draw(st.sampled_from([used, used + void, void or used])), draw(st.permutations(used))
        if spoilt:
            wrong = draw(st.sampled_from([-1, -128, classes, classes + 1, 2**15, 2**31, 2**63 - 1]))
            target = draw(st.sampled_from([true_labels, predicted_labels]))
            true_labels, predicted_labels = list(true_labels), list(predicted_labels)
            (true_labels if target is true_labels else predicted_labels).append(wrong)
        count = math.prod(shape)
        arrays = []
        for labels in (predicted_labels, true_labels):
            values = draw(st.lists(st.sampled_from(labels), min_size=count, max_size=count))
            fitting = [one for one in DTYPES if all(np.iinfo(one).min <= v <= np.iinfo(one).max for v in values)]
            arrays.append(np.array(values, draw(st.sampled_from(fitting))).reshape(shape))
        pictures.append((arrays[0], arrays[1]))
    return Labelled(classes, ignore_index, tuple(pictures))


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Counts of thousands of pictures: beyond what float32 (2^24), 32 bits (2^31) and their neighbours hold."""
    classes = draw(st.integers(1, 6))
    edges = [2**24, 2**31, 2**32, 2**40, 65536 * 2048 * 1024]
    cell = st.one_of(
        st.just(0), st.integers(0, 3), st.builds(lambda edge, by: edge + by, st.sampled_from(edges), st.integers(-3, 3))
    )
    cells = draw(st.lists(cell, min_size=classes**2, max_size=classes**2))
    return np.array(cells, np.int64).reshape(classes, classes)


def tried(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int) -> int:
    """Run a check on so many examples, the same ones every time; return their number."""
    count = 0

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(example: Any) -> None:
        nonlocal count
        count += 1
        check(example)

    run()
    return count


def require_equal(scores: Scores, counts: np.ndarray, exact: SlowScores) -> None:
    """Every score, of every class, and every other rule."""
    for name in ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "dice"):
        assert near(getattr(scores, name), getattr(exact, name)), name
    for name in ("per_class_iou", "per_class_dice"):
        pairs = zip(getattr(scores, name), getattr(exact, name), strict=True)
        assert all((one is None) == (other is None) for one, other in pairs), name
        assert all(
            near(one, other) for one, other in zip(getattr(scores, name), getattr(exact, name), strict=True) if one is not None
        )
    assert scores.absent_classes == exact.absent_classes
    assert set(OTHER_MIOU_RULES) == set(exact.other_rules)
    for name, rule in OTHER_MIOU_RULES.items():
        assert near(rule(counts), exact.other_rules[name]), name


def near(found: float, exact: Fraction | None) -> bool:
    return math.isnan(found) if exact is None else abs(found - exact) <= CLOSE


def check_against_fractions(data: Labelled) -> None:
    matrix = data.matrix()
    for predicted, true in data.pictures:
        matrix.update(predicted, true)
    require_equal(matrix.scores(), matrix.counts, slow_scores(data.pixels(), data.classes, data.ignored_class))


def check_large_counts(counts: np.ndarray) -> None:
    matrix = ConfusionMatrix(len(counts))
    matrix.counts[:] = counts
    cells = [(true, predicted, times) for (true, predicted), times in np.ndenumerate(counts.astype(object))]
    require_equal(matrix.scores(), matrix.counts, slow_scores(cells, len(counts)))


def check_against_torchmetrics(data: Labelled) -> None:
    """Counts, and the two means that both define alike; the whole pixels are given to it, with the ignored label."""
    true, predicted = (
        torch.tensor([label for one in data.pictures for label in one[side].ravel().tolist()], dtype=torch.int64)
        for side in (1, 0)
    )
    if not data.pixels():
        return
    matrix = data.matrix()
    for picture in data.pictures:
        matrix.update(*picture)
    options = {"num_classes": max(2, data.classes), "ignore_index": data.ignore_index}
    counts = oracle.multiclass_confusion_matrix(predicted, true, **options)
    np.testing.assert_array_equal(matrix.counts, counts[: data.classes, : data.classes])
    macro = oracle.multiclass_jaccard_index(predicted, true, average="macro", **options)
    assert matrix.scores().miou == pytest.approx(float(macro), abs=1e-6, nan_ok=True)
    if data.ignored_class is None:
        micro = oracle.multiclass_jaccard_index(predicted, true, average="micro", **options)
        assert OTHER_MIOU_RULES["pooled"](matrix.counts) == pytest.approx(float(micro), abs=1e-6)


def check_refusals(data: Labelled) -> None:
    """A label that is no class is refused in a sentence with nothing counted, unless void hides it; all else is counted."""
    matrix = data.matrix()
    for predicted, true in data.pictures:
        before = matrix.counts.copy()
        scored = [
            pair for pair in zip(true.ravel().tolist(), predicted.ravel().tolist(), strict=True) if pair[0] != data.ignore_index
        ]
        fine = all(0 <= label < data.classes for pair in scored for label in pair)
        if fine:
            matrix.update(predicted, true)
            assert matrix.counts.sum() - before.sum() == len(scored)
        else:
            with pytest.raises((DataError, UsageError), match=r"expected 0\.\."):
                matrix.update(predicted, true)
            np.testing.assert_array_equal(matrix.counts, before)


def check_shards(drawn: tuple[Labelled, list[int], list[int]]) -> None:
    """Pictures dealt to shards, shards merged in any order, a tree or a chain: one matrix, bit for bit."""
    data, deal, order = drawn
    whole = data.matrix()
    shards = [data.matrix() for _ in order]
    for place, picture in enumerate(data.pictures):
        whole.update(*picture)
        shards[deal[place % len(deal)] % len(shards)].update(*picture)
    while len(shards) > 1:
        first, second = (shards.pop(order[len(shards) - 1] % len(shards)) for _ in range(2))
        first.merge(second)
        shards.append(first)
    np.testing.assert_array_equal(shards[0].counts, whole.counts)
    assert repr(shards[0].scores()) == repr(whole.scores())


SHARDS = st.tuples(
    data_sets(), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.lists(st.integers(0, 9), min_size=1, max_size=6)
)
CHECKS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "exact fractions": (data_sets(), check_against_fractions),
    "counts beyond float32 and 32 bits": (matrices(), check_large_counts),
    "torchmetrics": (data_sets(), check_against_torchmetrics),
    "labels that are no class": (data_sets(spoilt=True), check_refusals),
    "shards in any order": (SHARDS, check_shards),
}


@pytest.fixture(params=["compiled", "numpy"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to count bytes."""
    if request.param == "numpy":
        monkeypatch.setattr(numba_jit, "numba_available", lambda: False)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("name", CHECKS)
def test_scores_hold_on_adversarial_labels(name: str) -> None:
    """Absent classes, only void, one pixel or none, any type, 300 classes, any ignored label: the definition, exactly."""
    assert tried(*CHECKS[name], CI_EXAMPLES) > 0


def test_unsigned_labels_of_64_bits_are_counted() -> None:
    """A prediction of uint64 beside a truth of another type became a float64 on the way, and ended in numpy's own words."""
    matrix = ConfusionMatrix(3)
    matrix.update(np.array([0, 2], np.uint64), np.array([1, 2], np.uint8))
    assert matrix.counts.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, "U1", object])
@pytest.mark.parametrize("side", ["predicted", "true"])
def test_labels_that_are_no_integers_are_a_sentence(dtype: Any, side: str) -> None:
    """Logits or probabilities passed for labels ended in numpy's own words; nothing is rounded in silence."""
    arrays = {"predicted": np.zeros((2, 2), np.uint8), "true": np.zeros((2, 2), np.uint8)}
    arrays[side] = np.zeros((2, 2), dtype)
    with pytest.raises(UsageError, match=r"labels must be integers, not"):
        ConfusionMatrix(2).update(arrays["predicted"], arrays["true"])


def test_more_pixels_than_a_float32_counts() -> None:
    """2^24 + 1 real pixels of one cell, in one picture and in two."""
    pixels = np.zeros(2**24 + 1, np.uint8)
    once, twice = ConfusionMatrix(2), ConfusionMatrix(2)
    once.update(pixels, pixels)
    twice.update(pixels[: 2**24], pixels[: 2**24])
    twice.update(pixels[:1], pixels[:1])
    assert once.counts[0, 0] == twice.counts[0, 0] == 2**24 + 1
    assert np.float32(2**24 + 1) == np.float32(2**24), "else this number proves nothing"


class Pictures:
    """A data set in memory."""

    name, split, ignore_index = "adversarial", "val", 65535

    def __init__(self, classes: int, labels: list[np.ndarray]) -> None:
        self.classes = tuple(f"class_{index}" for index in range(classes))
        self.palette = default_palette(classes)
        self.labels = labels
        self.names = tuple(str(index) for index in range(len(labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        height, width = self.labels[index].shape
        image = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
        return Sample(image, self.labels[index], self.names[index])

    def read_labels(self, index: int) -> np.ndarray:
        return self.labels[index]


@pytest.fixture(scope="module")
def net_of_300_classes() -> DeepLab:
    torch.manual_seed(0)
    config = DeepLabConfig(architecture="deeplabv3", encoder="lcnet_050", num_classes=300, head_channels=16)
    return DeepLab(config, preprocessing=Preprocessing(size=(65, 65))).eval()


def test_evaluate_scores_300_classes_one_pixel_and_void_images(net_of_300_classes: DeepLab) -> None:
    """uint16 ids above 255; a picture that is void but for one pixel, one that is void, one of 1 x 1: the slow count of all."""
    rng = np.random.default_rng(0)
    many, one, void = rng.integers(0, 300, (40, 50)), np.full((41, 33), 65535), np.full((37, 35), 65535)
    one[7, 9] = 299
    labels = [array.astype(np.uint16) for array in (many, one, void, np.full((1, 1), 280))]
    seen: list[tuple[int, int, int]] = []

    def see(sample: Sample, predicted: np.ndarray) -> None:
        pairs = zip(sample.labels.ravel().tolist(), predicted.ravel().tolist(), strict=True)
        seen.extend((true, label, 1) for true, label in pairs if true != 65535)

    report = evaluate(net_of_300_classes, Pictures(300, labels), device="cpu", progress=False, seen=see)  # type: ignore[arg-type]
    assert len(seen) == 40 * 50 + 2
    require_equal(report.scores, np.array(report.confusion_matrix), slow_scores(seen, 300))


@pytest.mark.parametrize(("label", "sentence"), [(65535, "All pixels of these 2 images are void"), (300, "from 300 to 300")])
def test_evaluate_refuses_what_cannot_be_scored(net_of_300_classes: DeepLab, label: int, sentence: str) -> None:
    """Nothing but void, or a label that is no class: a sentence, never a score of nothing."""
    labels = [np.full((33, 34), label, np.uint16)] * 2
    with pytest.raises(DeepLabZooError, match=sentence):
        evaluate(net_of_300_classes, Pictures(300, labels), device="cpu", progress=False)  # type: ignore[arg-type]


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_thousands_of_adversarial_data_sets_are_scored_exactly() -> None:
    """The checks of CI on many more examples; 65 536 pictures; and more than 2^31 pixels of one cell in one picture."""
    started = time.perf_counter()
    counts = {name: tried(*check, SOAK_EXAMPLES) for name, check in CHECKS.items()}
    pictures, pixels_in_a_cell = sixty_five_thousand_pictures(), more_than_32_bits()
    write_record(
        TrustRecord(
            name="metrics_adversarial",
            area="numbers",
            what="Scores of adversarial labels against exact fractions in plain Python and against torchmetrics",
            command="python -m pytest -m soak tests/trust/test_metrics_adversarial.py",
            seconds=round(time.perf_counter() - started, 1),
            inputs=sum(counts.values()) + 2,
            survived=sum(counts.values()) + 2,
            details={"examples": counts, "pictures_of_one_data_set": pictures, "pixels_of_one_cell": pixels_in_a_cell},
        )
    )


def sixty_five_thousand_pictures() -> int:
    """Score one picture 65 536 times: every count is that of one picture times as many, and the scores are the same."""
    rng = np.random.default_rng(0)
    true = np.repeat(np.repeat(rng.integers(0, 21, (24, 32)), 16, 0), 16, 1).astype(np.uint8)
    predicted = np.where(rng.random(true.shape) < 0.01, 20 - true, true).astype(np.uint8)
    one, all_of_them, pictures = ConfusionMatrix(21), ConfusionMatrix(21), 65536
    one.update(predicted, true)
    for _ in range(pictures):
        all_of_them.update(predicted, true)
    np.testing.assert_array_equal(all_of_them.counts, pictures * one.counts)
    assert all_of_them.counts.max() > 2**24
    assert all_of_them.counts.sum() > 2**33
    assert all_of_them.scores() == one.scores()
    return pictures


def more_than_32_bits() -> int:
    """Count one picture of more than 2^31 pixels of one class, whose memory is one page of zeros."""
    assert numba_jit.numba_available(), "the test extra contains numba"
    pixels = np.zeros(2**31 + 9, np.uint8)
    matrix = ConfusionMatrix(2)
    matrix.update(pixels, pixels)
    assert matrix.counts.tolist() == [[2**31 + 9, 0], [0, 0]]
    assert matrix.scores().pixel_accuracy == 1
    return len(pixels)
