"""Generated pictures: always the same ones, all classes in them, and quick to make."""

import time

import numpy as np
import pytest

from deeplabzoo.data.shapes import Shapes
from deeplabzoo.errors import DataError, UsageError


def test_a_picture_is_a_function_of_seed_split_and_index() -> None:
    """Workers and resumed runs see the same pictures; train, val and another seed see others."""
    first, again = Shapes("train")[7], Shapes("train", count=8)[7]
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert first.name == again.name
    for other in (Shapes("val")[7], Shapes("train", seed=1)[7], Shapes("train")[8]):
        assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_every_class_occurs_and_no_other_label(classes) -> None:
    data = Shapes("train", size=(48, 64), count=40, classes=classes)
    assert len(data) == len(data.names) == 40
    assert len(data.classes) == len(data.palette) == classes
    seen = set()
    for index in range(len(data)):
        sample = data[index]
        assert sample.image.shape == (48, 64, 3)
        assert sample.image.dtype == sample.labels.dtype == np.uint8
        seen |= set(np.unique(sample.labels).tolist())
    assert seen == {*range(classes), 255}


def test_iteration_ends() -> None:
    """Plain `for sample in data` stops at the last picture."""
    assert [sample.name for sample in Shapes("val", count=3)] == ["val_00000", "val_00001", "val_00002"]


def test_colour_tells_the_classes_apart() -> None:
    """A tiny network can learn them in a CI minute: the mean colours of the classes lie far apart."""
    data = Shapes("train", count=60)
    pixels = np.concatenate([data[i].image.reshape(-1, 3) for i in range(60)])
    labels = np.concatenate([data[i].labels.ravel() for i in range(60)])
    means = [pixels[labels == label].mean(0) for label in range(4)]
    gaps = [np.abs(means[a] - means[b]).max() for a in range(4) for b in range(a)]
    assert min(gaps) > 30


def test_a_picture_takes_at_most_two_milliseconds() -> None:
    """Generated data never becomes what a training step waits for (best of many: the machine may be busy)."""
    data = Shapes("train")
    seconds = []
    for index in range(60):
        start = time.perf_counter()
        data[index]
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2e-3


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(DataError, match="train and val"):
        Shapes("test")
    with pytest.raises(UsageError, match="classes"):
        Shapes("train", classes=9)
    with pytest.raises(UsageError, match="sides"):
        Shapes("train", size=(8, 8))
