"""A difference between two models comes with the luck of the pictures (benchmarks/paired_bootstrap.py; honest numbers)."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.paired_bootstrap import bootstrap, mean_iou
from deeplabzoo.evaluation.metrics import ConfusionMatrix


def _counts(rng: np.random.Generator, right: float, pictures: int = 60) -> np.ndarray:
    found = []
    for _ in range(pictures):
        true = rng.integers(0, 4, 400)
        predicted = np.where(rng.random(400) < right, true, rng.integers(0, 4, 400))
        matrix = ConfusionMatrix(4)
        matrix.update(predicted.reshape(20, 20), true.reshape(20, 20))
        found.append(matrix.counts.copy())
    return np.stack(found)


def test_mean_iou_is_that_of_the_metrics() -> None:
    """An absent class is left out here too."""
    matrix = ConfusionMatrix(5)
    rng = np.random.default_rng(0)
    matrix.update(rng.integers(0, 4, (30, 30)), rng.integers(0, 4, (30, 30)))
    assert mean_iou(matrix.counts[None])[0] == pytest.approx(matrix.scores().miou)


def test_a_model_against_itself_differs_by_nothing() -> None:
    """Pictures are drawn in pairs: the same model on the same pictures has a difference of exactly 0 in every sample."""
    counts = _counts(np.random.default_rng(1), 0.7)
    found = bootstrap(counts, counts, samples=300, seed=0)
    assert found["difference_points"] == {"value": 0.0, "standard_deviation": 0.0, "low_95": 0.0, "high_95": 0.0}
    assert found["first_miou_percent"]["standard_deviation"] > 0


def test_a_clearly_better_model_is_found_and_a_tie_is_not() -> None:
    """The interval excludes 0 for a real difference, and holds it for two draws of the same quality."""
    rng = np.random.default_rng(2)
    weak, same, strong = _counts(rng, 0.7), _counts(rng, 0.7), _counts(rng, 0.8)
    better = bootstrap(strong, weak, samples=2000, seed=0)
    assert better["difference_points"]["low_95"] > 0
    assert better["share_of_samples_in_which_first_is_better"] == 1
    tie = bootstrap(same, weak, samples=2000, seed=0)["difference_points"]
    assert tie["low_95"] < 0 < tie["high_95"]


def test_the_spread_is_that_of_sampling_by_hand() -> None:
    """Counting how often each picture is drawn gives the deviation of drawing them one by one, to a tenth."""
    rng = np.random.default_rng(3)
    right = rng.binomial(400, 0.7, 200)
    counts = np.stack([np.array([[hit, 0], [0, 400 - hit]]) + np.array([[0, 400 - hit], [hit, 0]]) for hit in right])
    found = bootstrap(counts, counts, samples=4000, seed=0)["first_miou_percent"]["standard_deviation"]
    pairs = np.array([[mean_iou(counts[rng.integers(0, 200, 200)].sum(0, keepdims=True))[0]] for _ in range(4000)])
    assert found == pytest.approx(100 * pairs.std(), rel=0.1)
