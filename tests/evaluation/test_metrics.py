"""The confusion matrix and its scores, against torchmetrics, a slow reference in plain Python, and numbers worked by hand."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torchmetrics.functional import classification as oracle

from deeplabzoo import numba_jit
from deeplabzoo.errors import DataError, UsageError
from deeplabzoo.evaluation import metrics
from deeplabzoo.evaluation.metrics import OTHER_MIOU_RULES, ConfusionMatrix, Scores

CLASSES = 5
DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


@st.composite
def label_maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true labels drawn from random subsets of the classes, so that absent classes are common."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    in_truth = draw(st.lists(st.sampled_from([*range(CLASSES), 255]), min_size=1, unique=True))
    in_prediction = draw(st.lists(st.integers(0, CLASSES - 1), min_size=1, unique=True))
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.int64]))
    true = draw(arrays.arrays(dtype, shape, elements=st.sampled_from(in_truth)))
    predicted = draw(arrays.arrays(dtype, shape, elements=st.sampled_from(in_prediction)))
    return predicted, true


def counted(predicted: np.ndarray, true: np.ndarray, classes: int = CLASSES) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    matrix.update(predicted, true)
    return matrix


def as_tensor(labels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(labels.astype(np.int64))


@settings(deadline=None, max_examples=150)
@given(label_maps())
def test_scores_agree_with_torchmetrics(maps: tuple[np.ndarray, np.ndarray]) -> None:
    matrix = counted(*maps)
    predicted, true = map(as_tensor, maps)
    options = {"num_classes": CLASSES, "ignore_index": 255}
    counts = oracle.multiclass_confusion_matrix(predicted, true, **options)
    np.testing.assert_array_equal(matrix.counts, counts)
    assert matrix.counts.dtype == np.int64
    scores = matrix.scores()
    if not (maps[1] != 255).any():
        assert np.isnan([scores.miou, scores.dice, scores.pixel_accuracy, scores.mean_accuracy]).all()
        assert scores.absent_classes == tuple(range(CLASSES))
        return
    iou = oracle.multiclass_jaccard_index(predicted, true, average=None, **options)
    f1 = oracle.multiclass_f1_score(predicted, true, average=None, multidim_average="global", **options)
    recall = oracle.multiclass_accuracy(predicted, true, average=None, **options)
    for index in range(CLASSES):
        if index in scores.absent_classes:
            assert scores.per_class_iou[index] is None
            assert scores.per_class_dice[index] is None
        else:
            assert scores.per_class_iou[index] == pytest.approx(iou[index].item(), abs=1e-6)
            assert scores.per_class_dice[index] == pytest.approx(f1[index].item(), abs=1e-6)
    macro = oracle.multiclass_jaccard_index(predicted, true, average="macro", **options)
    assert scores.miou == pytest.approx(macro.item(), abs=1e-6)
    assert scores.dice == pytest.approx(
        oracle.multiclass_f1_score(predicted, true, average="macro", **options).item(), abs=1e-6
    )
    assert scores.pixel_accuracy == pytest.approx(
        oracle.multiclass_accuracy(predicted, true, average="micro", **options).item(), abs=1e-6
    )
    present = counts.sum(dim=1) > 0
    assert scores.mean_accuracy == pytest.approx(recall[present].mean().item(), abs=1e-6)
    weight = counts.sum(dim=1) / counts.sum()
    assert scores.frequency_weighted_iou == pytest.approx((weight * iou)[present].sum().item(), abs=1e-6)


@st.composite
def label_batches(draw: st.DrawFn) -> tuple[int, int | None, torch.Tensor, torch.Tensor]:
    """(num_classes, ignore_index, predicted, true): torch tensors of any integer type, B x H x W, any label ignored."""
    classes = draw(st.sampled_from([2, 3, 21, 255, 256, 257]))
    ignored = draw(st.sampled_from([None, -100, -1, 0, 1, classes - 1, classes, 255, 300]))
    used = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=4))
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)))
    tensors = []
    for values in (used, used if ignored is None else [*used, ignored]):
        kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        fitting = [kind for kind in kinds if torch.iinfo(kind).min <= min(values) and max(values) <= torch.iinfo(kind).max]
        array = draw(arrays.arrays(np.int64, shape, elements=st.sampled_from(values)))
        tensors.append(torch.from_numpy(array).to(draw(st.sampled_from(fitting))))
    return classes, ignored, *tensors


@settings(deadline=None, max_examples=150)
@given(label_batches())
def test_tensors_of_any_type_and_any_ignored_label_score_as_torchmetrics_says(
    drawn: tuple[int, int | None, torch.Tensor, torch.Tensor],
) -> None:
    """A class that is the ignored label has no IoU and no part in the mean, however often it is predicted."""
    classes, ignored, predicted, true = drawn
    matrix = ConfusionMatrix(classes, ignored)
    matrix.update(predicted, true)
    options = {"num_classes": classes, "ignore_index": ignored}
    counts = oracle.multiclass_confusion_matrix(predicted.long(), true.long(), **options)
    np.testing.assert_array_equal(matrix.counts, counts)
    if not matrix.counts.any():
        return
    scores = matrix.scores()
    macro = oracle.multiclass_jaccard_index(predicted.long(), true.long(), average="macro", **options)
    assert scores.miou == pytest.approx(macro.item(), abs=1e-6, nan_ok=True)
    accuracy = oracle.multiclass_accuracy(predicted.long(), true.long(), average="micro", **options)
    assert scores.pixel_accuracy == pytest.approx(accuracy.item(), abs=1e-6)
    if ignored in range(classes):
        assert scores.per_class_iou[ignored] is None
        assert ignored in scores.absent_classes


def test_no_class_is_ignored_unless_asked_for() -> None:
    """255 is void by default, but not where it is one of the classes."""
    labels = np.full((2, 3), 255, np.uint8)
    many = ConfusionMatrix(256)
    many.update(labels, labels)
    assert many.counts[255, 255] == 6
    assert many.scores().per_class_iou[255] == 1.0
    few = ConfusionMatrix(255)
    few.update(labels, labels)
    assert not few.counts.any()


@pytest.mark.parametrize(
    ("predicted", "sentence"),
    [
        (torch.zeros(2, 3), "must be integers, not torch.float32; take the argmax"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "must be integers, not torch.bfloat16"),
        (torch.zeros(5, 2, 3, dtype=torch.int64), r"take their argmax"),
        ([[0, 1], [2]], "unequal length"),
    ],
)
def test_what_is_no_label_map_gives_a_sentence(predicted: object, sentence: str) -> None:
    """Scores of each class, floats or ragged lists in place of labels."""
    with pytest.raises(UsageError, match=sentence):
        ConfusionMatrix(3).update(predicted, torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(("classes", "ignored"), [(3, 1.5), (2.5, None), ("3", 255), (3, "none")])
def test_settings_of_the_matrix_are_whole_numbers(classes: object, ignored: object) -> None:
    """A float ignore_index would never match, and so ignore nothing."""
    with pytest.raises(UsageError, match="must be a whole number"):
        ConfusionMatrix(classes, ignored)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=150)
@given(label_maps())
def test_scores_agree_with_sets_of_pixels(maps: tuple[np.ndarray, np.ndarray]) -> None:
    """The definition itself, with Python sets and no matrix: intersection over union of the places that have a label."""
    predicted, true = (labels.ravel().tolist() for labels in maps)
    scored = [place for place, label in enumerate(true) if label != 255]
    ious, dices, absent = [], [], []
    for index in range(CLASSES):
        a = {place for place in scored if predicted[place] == index}
        b = {place for place in scored if true[place] == index}
        if not a | b:
            absent.append(index)
            continue
        ious.append(len(a & b) / len(a | b))
        dices.append(2 * len(a & b) / (len(a) + len(b)))
    scores = counted(*maps).scores()
    assert scores.absent_classes == tuple(absent)
    assert [one for one in scores.per_class_iou if one is not None] == pytest.approx(ious, abs=1e-12)
    if ious:
        assert scores.miou == pytest.approx(sum(ious) / len(ious), abs=1e-12)
        assert scores.dice == pytest.approx(sum(dices) / len(dices), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(label_maps(), min_size=1, max_size=5), st.integers(0, 5))
def test_parts_add_up_to_the_whole(pictures: list[tuple[np.ndarray, np.ndarray]], cut: int) -> None:
    """pytorch#25162: uneven shards padded with repeated pictures count some twice; merged matrices need no padding."""
    whole, left, right = ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES)
    for index, (predicted, true) in enumerate(pictures):
        whole.update(predicted, true)
        (left if index < cut else right).update(predicted, true)
    left.merge(right)
    np.testing.assert_array_equal(left.counts, whole.counts)


def test_perfect_and_constant_predictions_have_their_known_scores() -> None:
    """tensorflow/models#3739: black masks score 90 % pixel accuracy; their mIoU must tell."""
    true = np.zeros((10, 10), np.uint8)
    true[0] = 1
    perfect = counted(true, true, 2).scores()
    assert perfect == Scores(1.0, (1.0, 1.0), 1.0, 1.0, 1.0, 1.0, (1.0, 1.0), ())
    black = counted(np.zeros_like(true), true, 2).scores()
    assert black.pixel_accuracy == 0.9
    assert black.per_class_iou == (0.9, 0.0)
    assert black.miou == 0.45
    assert black.mean_accuracy == 0.5
    assert black.frequency_weighted_iou == pytest.approx(0.81)
    assert black.dice == pytest.approx((2 * 90 / 190) / 2)


def test_a_class_predicted_but_not_in_the_truth_counts_as_zero() -> None:
    """qubvel/segmentation_models#553, jfzhang95#16: leaving such a class out rewards inventing it."""
    scores = counted(np.array([[0, 0, 1, 2]]), np.array([[0, 0, 1, 1]]), 4).scores()
    assert scores.per_class_iou == (1.0, 0.5, 0.0, None)
    assert scores.miou == 0.5
    assert scores.mean_accuracy == 0.75
    assert scores.absent_classes == (3,)


def test_what_is_predicted_on_void_pixels_does_not_matter() -> None:
    true = np.array([[0, 255, 255]])
    for on_void in (0, 1, 200):
        assert counted(np.array([[0, on_void, on_void]]), true, 2).counts.tolist() == [[1, 0], [0, 0]]
    matrix = ConfusionMatrix(2, ignore_index=None)
    with pytest.raises(DataError, match=r"from 0 to 255, expected 0\.\.1\."):
        matrix.update(np.zeros_like(true), true)


def test_counts_do_not_stop_growing() -> None:
    """A float32 cell stops at 2^24 = 16.7 million pixels: adding one more pixel leaves it unchanged. Ours is int64."""
    assert np.float32(2**24) + np.float32(1) == np.float32(2**24)
    matrix = ConfusionMatrix(1)
    matrix.counts[0, 0] = 2**40
    matrix.update(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8))
    assert int(matrix.counts[0, 0]) == 2**40 + 1, "compared as integers: numpy would round the right side, too"


def test_misuse_gives_a_sentence() -> None:
    matrix = ConfusionMatrix(3)
    for predicted, true in [((2, 3), (3, 2)), ((3, 2), (2, 3)), ((2, 3), (2, 3, 1)), ((6,), (2, 3))]:
        with pytest.raises(UsageError, match="never the ground truth"):
            matrix.update(np.zeros(predicted, int), np.zeros(true, int))
    for predicted, true in [(np.float32, np.uint8), (np.uint8, np.float64)]:
        with pytest.raises(UsageError, match="must be integers"):
            matrix.update(np.zeros((1, 2), predicted), np.zeros((1, 2), true))
    with pytest.raises(DataError, match=r"from 0 to 7, expected 0\.\.2 or 255"):
        matrix.update(np.zeros((1, 2), int), np.array([[0, 7]]))
    with pytest.raises(DataError, match=r"from 0 to 3, expected 0\.\.2 or 255"):
        matrix.update(np.zeros((1, 2), int), np.array([[0, 3]]))
    with pytest.raises(DataError, match="from -1 to 0"):
        matrix.update(np.zeros((1, 2), int), np.array([[0, -1]]))
    for wrong, logged in [(3, "from 0 to 3"), (4, "from 0 to 4"), (-1, "from -1 to 0")]:
        with pytest.raises(UsageError, match=rf"{logged}, expected 0\.\.2"):
            matrix.update(np.array([[0, wrong]]), np.zeros((1, 2), int))
    for classes, ignored in [(2, 255), (4, 255), (3, 0), (3, 256)]:
        with pytest.raises(UsageError, match=f"{classes} classes ignoring {ignored} cannot be added to one of 3 classes"):
            matrix.merge(ConfusionMatrix(classes, ignored))
    with pytest.raises(UsageError, match="at least 1"):
        ConfusionMatrix(0)
    assert not matrix.counts.any()


def test_the_six_other_definitions_print_what_the_docs_say() -> None:
    """One pair of pictures, seven numbers called mIoU: docs/metrics.md is recomputed here, every figure of it."""
    text = DOCS.read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)
    rows = [[int(cell) for cell in line.split()] for line in blocks[0].splitlines() if re.match(r"^[\d ]+$", line)]
    true_a, true_b, predicted_a, predicted_b = (np.array(rows[i : i + 2], np.uint8) for i in range(0, 8, 2))
    matrix, first, second = ConfusionMatrix(4), counted(predicted_a, true_a, 4), counted(predicted_b, true_b, 4)
    matrix.merge(first)
    matrix.merge(second)

    expected = {name: f"{100 * rule(matrix.counts):.1f}" for name, rule in OTHER_MIOU_RULES.items()}
    expected["ours"] = f"{100 * matrix.scores().miou:.1f}"
    expected["image_wise"] = f"{100 * (first.scores().miou + second.scores().miou) / 2:.1f}"
    printed = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+|nan) \|$", text, flags=re.MULTILINE))
    assert printed == expected
    assert len(set(printed.values())) == 7, "the example must tell the definitions apart"

    classes = re.findall(r"^\| (\d) \| (\d+) \| (\d+) \| ([\d.]+|-) \|$", text, flags=re.MULTILINE)
    hit = np.diagonal(matrix.counts)
    union = matrix.counts.sum(0) + matrix.counts.sum(1) - hit
    iou = [f"{100 * value:.1f}" if value is not None else "-" for value in matrix.scores().per_class_iou]
    assert classes == [(str(i), str(hit[i]), str(union[i]), iou[i]) for i in range(4)]


@settings(deadline=None, max_examples=50)
@given(label_maps())
def test_the_other_rules_equal_ours_where_no_class_is_missing(maps: tuple[np.ndarray, np.ndarray]) -> None:
    """Before two published numbers are called different, their data decides whether the rule could have moved them."""
    matrix = counted(*maps)
    matrix.counts += np.eye(CLASSES, dtype=np.int64)
    for name, rule in OTHER_MIOU_RULES.items():
        if name != "pooled":
            assert rule(matrix.counts) == pytest.approx(matrix.scores().miou)


@pytest.fixture(params=["cached_njit", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to count bytes."""
    if request.param == "numpy":
        monkeypatch.setattr(numba_jit, "numba_available", lambda: False)
    else:
        assert numba_jit.numba_available(), "the test extra contains numba"
    return request.param


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 14), min_size=1, max_size=3),
    classes=st.integers(1, 256),
    ignore_index=st.sampled_from([None, 0, 255, -1, 256, 300]),
    run=st.sampled_from([1, 5, 30]),
    chunk=st.sampled_from([100, 777, 2**30]),
    layout=st.sampled_from(["plain", "transposed", "strided", "read-only", "odd address"]),
    seed=st.integers(0, 99),
)
def test_bytes_are_counted_like_any_other_numbers(way, shape, classes, ignore_index, run, chunk, layout, seed) -> None:
    """One pass over eight pixels at a time sees every pixel once: any shape, memory, number of classes, lengths of runs."""
    rng = np.random.default_rng(seed)

    def labels() -> np.ndarray:
        array = np.repeat(rng.integers(0, classes, np.prod(shape, dtype=int) // run + 1), run)
        array = array[: np.prod(shape, dtype=int)].reshape(shape).astype(np.uint8)
        if layout == "transposed":
            return array.T
        if layout == "strided":
            return np.repeat(array, 2, axis=-1)[..., ::2]
        if layout == "odd address":
            return np.concatenate([[0], array.ravel()]).astype(np.uint8)[1:].reshape(shape)
        array.flags.writeable = layout != "read-only"
        return array

    predicted, true = labels(), labels()
    if ignore_index == 255:
        true = np.where(rng.random(true.shape) < 0.2, 255, true).astype(np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "MAX_PIXELS_PER_CHUNK", chunk)
        fast = ConfusionMatrix(classes, ignore_index)
        fast.update(predicted, true)
    plain = ConfusionMatrix(classes, ignore_index)
    plain.update(predicted.astype(np.int64), true.astype(np.int64))
    np.testing.assert_array_equal(fast.counts, plain.counts)
    assert fast.counts.dtype == np.int64


@pytest.mark.parametrize("types", itertools.product([np.bool_, np.uint8, np.int8, np.uint16, np.int64], repeat=2), ids=str)
def test_any_two_types_of_integers_go_together(way: str, types: tuple[type, type]) -> None:
    """Masks come as bytes, predictions as 64-bit numbers, two classes as truth values: the numbers count."""
    rng = np.random.default_rng(3)
    predicted, true = (rng.integers(0, 2, (5, 16)).astype(one) for one in types)
    expected = [[((true == i) & (predicted == j)).sum() for j in (0, 1)] for i in (0, 1)]
    assert counted(predicted, true, 2).counts.tolist() == expected


def test_bytes_are_counted_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is no byte is not."""
    passes: list[int] = []
    plain = metrics._pair_counts
    monkeypatch.setattr(metrics, "_pair_counts", lambda true, predicted: passes.append(true.size) or plain(true, predicted))
    labels = np.ones((3, 4), np.uint8)
    counted(labels, labels)
    assert passes == [12]
    counted(labels.astype(np.int64), labels)
    assert passes == [12]


def test_eight_bytes_a_step_are_counted_by_the_compiled_loop(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last few; where nothing can be compiled, none."""
    words: list[int] = []
    plain = numba_jit.cached_njit

    def watched(loop):
        def counting(true, predicted, tables):
            words.append(len(true))
            plain(loop)(true, predicted, tables)

        return counting

    monkeypatch.setattr(numba_jit, "cached_njit", watched)
    labels = np.ones((10, 10), np.uint8)
    assert counted(labels, labels).counts[1, 1] == 100
    assert words == ([12] if way == "cached_njit" else [])


@pytest.mark.parametrize("offset", range(9))
def test_uint64_views_are_aligned_and_read_only(offset: int) -> None:
    """Aligned and read-only, whatever was given: the loop is compiled once. What is aligned already is not copied."""
    memory = np.arange(96, dtype=np.uint8)
    start = -memory.ctypes.data % 8 + offset
    labels = memory[start : start + 64]
    words = metrics._as_uint64(labels)
    assert words.ctypes.data % 8 == 0
    assert not words.flags.writeable
    assert labels.flags.writeable
    assert np.shares_memory(words, labels) == (offset % 8 == 0)
    assert words.view(np.uint8).tolist() == labels.tolist()


@pytest.mark.parametrize("run", ["cached_njit", "python"])
def test_the_four_tables_are_used_where_pixels_differ(run: str) -> None:
    """Eight alike are one addition; of others each of the four tables gets every fourth pixel."""
    true = np.array([[3] * 8, [3] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [255] * 8], np.uint8)
    predicted = np.array([[7] * 8, [7] * 7 + [9], [9] * 8, [255] * 8], np.uint8)
    tables = np.zeros((4, 256, 256), np.int32)
    count = numba_jit.cached_njit(metrics._count_label_pairs) if run == "cached_njit" else metrics._count_label_pairs
    count(*(metrics._as_uint64(labels.ravel()) for labels in (true, predicted)), tables.reshape(-1))
    expected = np.zeros_like(tables)
    expected[0, 3, 7] = expected[0, 255, 255] = 8
    for row in (1, 2):
        for place in range(8):
            expected[place % 4, true[row, place], predicted[row, place]] += 1
    np.testing.assert_array_equal(tables, expected)


def test_void_outside_of_bytes_hides_no_byte(way: str) -> None:
    """-1 is no name of 255."""
    labels = np.full((1, 9), 255, np.uint8)
    with pytest.raises(DataError, match=r"from 255 to 255, expected 0\.\.4 or -1"):
        ConfusionMatrix(CLASSES, ignore_index=-1).update(np.zeros_like(labels), labels)


def test_a_chunk_does_not_overflow_its_tables() -> None:
    """Four tables of 32 bits: a picture of one colour puts all of a part into one of them."""
    most = int(np.iinfo(np.int32).max)
    assert most >= metrics.MAX_PIXELS_PER_CHUNK


def test_scores_are_plain_data() -> None:
    """They can be keys, and nobody changes another's."""
    one, other = (counted(labels, labels).scores() for labels in (np.ones((1, 3), int), np.ones((2, 3), int)))
    assert {one: "all right"}[other] == "all right"


def test_bytes_outside_the_classes_are_named(way: str) -> None:
    """The very sentences of other numbers; void pixels may hold any prediction; nothing is counted by halves."""
    matrix = ConfusionMatrix(3)
    true, predicted = np.zeros((4, 9), np.uint8), np.zeros((4, 9), np.uint8)
    true[1, 2], predicted[1, 2] = 255, 200
    matrix.update(predicted, true)
    assert matrix.counts.sum() == 35
    true[2, 3] = 7
    with pytest.raises(DataError, match=r"from 0 to 7, expected 0\.\.2 or 255"):
        matrix.update(predicted, true)
    true[2, 3], predicted[3, 8] = 2, 3
    with pytest.raises(UsageError, match=r"from 0 to 3, expected 0\.\.2"):
        matrix.update(predicted, true)
    with pytest.raises(DataError, match=r"from 0 to 255, expected 0\.\.2\."):
        ConfusionMatrix(3, ignore_index=None).update(np.zeros_like(true), true)
    assert matrix.counts.sum() == 35


def test_an_image_of_one_colour_does_not_overflow(way: str) -> None:
    """All pixels in one cell of one table: more than 16 bits hold, counted exactly."""
    one = np.full((1000, 1001), 18, np.uint8)
    assert counted(one, one, 19).counts[18, 18] == 1_001_000
