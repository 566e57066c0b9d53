"""Generated pictures: always the same ones, all classes in them, and quick to make."""

import sys

import numpy as np
import pytest

from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.errors import DataError, UsageError


def test_an_image_is_a_function_of_seed_split_and_index() -> None:
    """Workers and resumed runs see the same pictures; train, val and another seed see others."""
    first, again = SyntheticShapes("train")[7], SyntheticShapes("train", count=8)[7]
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert first.name == again.name
    for other in (SyntheticShapes("val")[7], SyntheticShapes("train", seed=1)[7], SyntheticShapes("train")[8]):
        assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_every_class_occurs_and_no_other_label(classes) -> None:
    data = SyntheticShapes("train", size=(48, 64), count=40, classes=classes)
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
    assert [sample.name for sample in SyntheticShapes("val", count=3)] == ["val_00000", "val_00001", "val_00002"]


def test_colour_tells_the_classes_apart() -> None:
    """A tiny network can learn them in a CI minute: the mean colours of the classes lie far apart."""
    data = SyntheticShapes("train", count=60)
    pixels = np.concatenate([data[i].image.reshape(-1, 3) for i in range(60)])
    labels = np.concatenate([data[i].labels.ravel() for i in range(60)])
    means = [pixels[labels == label].mean(0) for label in range(4)]
    gaps = [np.abs(means[a] - means[b]).max() for a in range(4) for b in range(a)]
    assert min(gaps) > 30


def calls_for(data: SyntheticShapes, index: int) -> int:
    """Return how many functions, of Python and of C, one image takes."""
    calls = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        data[index]
    finally:
        sys.setprofile(before)
    return calls


def test_an_image_takes_a_few_operations_on_whole_arrays() -> None:
    """Generated data never becomes what a training step waits for: no loop over pixels, no image but the one asked for."""
    assert max(calls_for(SyntheticShapes("train"), index) for index in range(60)) < 200
    large = SyntheticShapes("train", size=(512, 512), count=100_000)
    assert calls_for(large, 99_999) < 200


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(DataError, match="train and val"):
        SyntheticShapes("test")
    with pytest.raises(UsageError, match="classes"):
        SyntheticShapes("train", classes=9)
    with pytest.raises(UsageError, match="sides"):
        SyntheticShapes("train", size=(8, 8))
