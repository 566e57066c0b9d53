"""Reading ahead changes when pictures are read, and nothing else: order, errors and memory are those of a plain loop."""

import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.errors import ImageError
from deeplabzoo.evaluation.evaluate import BackgroundWorker, prefetch


class Watched(SyntheticShapes):
    """Notes which pictures were asked for; number `broken` cannot be read."""

    def __init__(self, count: int, broken: int | None = None, pause: float = 0.0) -> None:
        super().__init__("val", (16, 16), count)
        self.broken, self.pause, self.asked = broken, pause, []

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        time.sleep(self.pause)
        if index == self.broken:
            raise ImageError(f"'{self.names[index]}' is damaged.")
        return super().__getitem__(index)


def interrupt(_: Sample) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_images_come_in_order_and_once(count: int, readers: int) -> None:
    data = Watched(max(1, count), pause=0.001)
    found = list(prefetch(data, range(count), num_threads=readers))
    assert [sample.name for sample in found] == list(data.names[:count])
    for index, sample in enumerate(found):
        np.testing.assert_array_equal(sample.image, SyntheticShapes.__getitem__(data, index).image)


def test_an_error_comes_at_its_own_image() -> None:
    """The two pictures before the damaged one are still delivered; the sentence is the reader's own."""
    samples = prefetch(Watched(9, broken=2), range(9))
    assert [next(samples).name, next(samples).name] == ["val_00000", "val_00001"]
    with pytest.raises(ImageError, match="val_00002' is damaged"):
        next(samples)


def test_no_more_images_wait_than_were_agreed() -> None:
    """Memory does not grow with the data set: after k pictures were taken, at most k + 2 were begun."""
    data = Watched(20)
    samples = prefetch(data, range(20), prefetch_size=2)
    for taken in range(1, 6):
        next(samples)
        time.sleep(0.02)
        assert len(data.asked) <= taken + 2
    samples.close()


def test_stopping_early_begins_no_further_image() -> None:
    """Ctrl-C is a KeyboardInterrupt in the loop: nothing is read after it, and no thread is left."""
    data = Watched(50, pause=0.01)
    with pytest.raises(KeyboardInterrupt), closing(prefetch(data, range(50))) as samples:
        interrupt(next(samples))
    asked = len(data.asked)
    time.sleep(0.05)
    assert len(data.asked) == asked <= 3
    assert not [one for one in threading.enumerate() if one.name.startswith("deeplabzoo-reader")]


def test_reading_overlaps_with_work() -> None:
    """The next picture is read while this one is worked on, on another thread."""
    data = Watched(3)
    samples = prefetch(data, range(3))
    next(samples)
    deadline = time.monotonic() + 60  # how long a busy machine may take; an idle one needs milliseconds
    while len(data.asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert data.asked == [0, 1, 2]
    samples.close()


def test_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    list(prefetch(Watched(3), range(3)))
    assert torch.get_num_threads() == before


def test_one_behind_calls_in_order_and_is_done_at_the_end() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.002)
        done.append(number)

    with BackgroundWorker(work) as behind:
        for number in range(5):
            behind(number)
            assert len(done) >= number
    assert done == [0, 1, 2, 3, 4]


def test_one_behind_raises_what_the_work_raised() -> None:
    """The last call's error, too, though nothing is called after it."""

    def refuse(number: int) -> None:
        if number == 1:
            raise ValueError("not this one")

    behind = BackgroundWorker(refuse)
    behind(0)
    behind(1)
    with pytest.raises(ValueError, match="not this one"):
        behind(2)
    behind(3)
    with pytest.raises(ValueError, match="not this one"), BackgroundWorker(refuse) as behind:
        behind(1)
