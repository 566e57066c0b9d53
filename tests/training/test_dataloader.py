"""The training stream: a pure function of data, recipe and step."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.data.transforms import Augmentation, normalize_images
from deeplabzoo.errors import DataError, UsageError
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.training.dataloader import Batch, BatchDataset, epoch_order, iterate_batches, step_seed
from deeplabzoo.training.recipe import Recipe, Stage

RECIPE = Recipe(
    name="t",
    model="-",
    data="shapes",
    steps=50,
    batch=4,
    augmentation=Augmentation(crop=(24, 32), scale=(0.8, 1.2), colour=0.3),
)


class _Numbered(SyntheticShapes):
    """Each picture is filled with its own number, so that a batch tells which pictures it holds."""

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.full((24, 32, 3), index, np.uint8), np.zeros((24, 32), np.uint8), self.names[index])


def _numbers(count: int, batch: int, steps: int, *, rank: int = 0, world_size: int = 1) -> list[int]:
    recipe = dataclasses.replace(RECIPE, batch=batch, augmentation=Augmentation(crop=(24, 32), scale=(1, 1)))
    stream = BatchDataset(_Numbered("train", (24, 32), count), recipe, Preprocessing(), rank=rank, world_size=world_size)
    found = [stream[step] for step in range(steps)]
    return [int(image[0, 0, 0]) for one in found if isinstance(one, Batch) for image in one.image_BCHW]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_every_image_comes_once_a_pass(count: int, batch: int, steps: int) -> None:
    """Whatever the sizes, every picture was seen n // count times or once more: no tail is dropped or padded."""
    numbers = _numbers(count, batch, steps)
    assert len(numbers) == batch * steps
    seen = Counter(numbers)
    assert all(seen[number] - batch * steps // count in (0, 1) for number in range(count))


@given(st.integers(1, 30), st.integers(1, 4), st.sampled_from([1, 2, 3]))
@settings(max_examples=20, deadline=None)
def test_ranks_shard_the_batch_of_one_process(count: int, share: int, world_size: int) -> None:
    """Slices of all ranks, side by side, are the batch that one process would have."""
    whole = _numbers(count, share * world_size, 3)
    parts = [_numbers(count, share * world_size, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [part[step * share + i] for step in range(3) for part in parts for i in range(share)]
    assert together == whole


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_workers_or_start(workers: int) -> None:
    """Starting at step 3 with any number of workers gives the batches of a run that began at 0."""
    stream = BatchDataset(SyntheticShapes("train", (40, 48), 10), RECIPE, Preprocessing())
    for step, batch in zip(range(3, 7), iterate_batches(stream, 3, 7, workers=workers), strict=True):
        expected = BatchDataset(SyntheticShapes("train", (40, 48), 10), RECIPE, Preprocessing())[step]
        assert isinstance(expected, Batch)
        assert torch.equal(batch.image_BCHW, expected.image_BCHW)
        assert torch.equal(batch.labels_BHW, expected.labels_BHW)
        assert (batch.image_BCHW.dtype, batch.labels_BHW.dtype) == (torch.uint8, torch.uint8)
        assert batch.image_BCHW.shape == (4, 3, 24, 32)


def test_the_seed_decides_order_and_augmentation() -> None:
    """Another seed is another run; another pass is another order."""
    data = SyntheticShapes("train", (40, 48), 10)
    one, other = (
        BatchDataset(data, RECIPE, Preprocessing())[0],
        BatchDataset(data, dataclasses.replace(RECIPE, seed=1), Preprocessing())[0],
    )
    assert isinstance(one, Batch)
    assert isinstance(other, Batch)
    assert not torch.equal(one.image_BCHW, other.image_BCHW)
    assert epoch_order(0, 0, 100).tolist() != epoch_order(0, 1, 100).tolist()
    assert sorted(epoch_order(0, 1, 100)) == list(range(100))
    assert len({step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(2)}) == 120


def test_a_stage_changes_the_crop() -> None:
    """The second half of this run trains on larger crops."""
    staged = dataclasses.replace(RECIPE, steps=4, stages=(Stage(share=1), Stage(share=1, crop=(40, 48))))
    stream = BatchDataset(SyntheticShapes("train", (40, 48), 10), staged, Preprocessing())
    assert [batch.labels_BHW.shape[1:] for batch in iterate_batches(stream, 0, 4, workers=0)] == 2 * [(24, 32)] + 2 * [(40, 48)]


def test_scale_is_relative_to_what_the_model_sees() -> None:
    """A photo that evaluation halves is halved before the random scale: training and evaluation see objects of one size."""
    recipe = dataclasses.replace(RECIPE, augmentation=Augmentation(crop=(80, 96), scale=(1, 1), flip=0))
    stream = BatchDataset(SyntheticShapes("train", (80, 96), 4), recipe, Preprocessing(size=(48, 48), resize="longest"))
    batch = stream[0]
    assert isinstance(batch, Batch)
    assert (batch.labels_BHW[:, 40:] == 255).all()
    assert (batch.labels_BHW[:, :40, :48] != 255).float().mean() > 0.5
    assert tuple(batch.image_BCHW[0, :, -1, -1].tolist()) == (124, 116, 104)  # ImageNet's mean: normalises to about 0


class _Broken(SyntheticShapes):
    def __getitem__(self, index: int) -> Sample:
        raise DataError(f"'{self.names[index]}' is unreadable.")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_sentence(workers: int) -> None:
    """Also from a worker process: no traceback inside the message."""
    with pytest.raises(DataError) as caught:
        next(iterate_batches(BatchDataset(_Broken("train"), RECIPE, Preprocessing()), 0, 3, workers=workers))
    assert str(caught.value).endswith("is unreadable.")
    assert "\n" not in str(caught.value)


def test_uneven_shards_are_refused() -> None:
    """A batch of 4 for 3 processes would train on something else than was asked for."""
    with pytest.raises(UsageError, match="multiple of 3"):
        BatchDataset(SyntheticShapes("train"), RECIPE, Preprocessing(), world_size=3)


@pytest.mark.parametrize("compiled", [True, False])
def test_normalisation_is_that_of_inference(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training sees for a pixel what `prepare` makes of it, channel order included; torch and the look-up agree."""
    from deeplabzoo.processing.preprocessing import prepare

    if not compiled:
        monkeypatch.setattr("deeplabzoo.numba_jit.numba_available", lambda: False)

    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for order in ("RGB", "BGR"):
        preprocessing = Preprocessing(channel_order=order)  # type: ignore[arg-type]
        ours = normalize_images(torch.from_numpy(image).permute(2, 0, 1)[None], preprocessing)
        torch.testing.assert_close(ours, prepare(image, preprocessing).tensor_1CHW, rtol=0, atol=0)
        assert ours.is_contiguous(memory_format=torch.channels_last)
