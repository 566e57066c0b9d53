"""A cache of decoded pictures changes when pictures are decoded, never what they are, and never grows beyond its limit."""

import dataclasses
import logging
import os
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplabzoo.data.cache import DiskCache, MemoryCache
from deeplabzoo.data.dataset import Sample, SegmentationDataset
from deeplabzoo.data.datasets.folder import build_split
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.errors import DataError, UsageError
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.training.dataloader import BatchDataset, iterate_batches, open_splits
from deeplabzoo.training.overrides import apply_overrides
from deeplabzoo.training.recipe import Recipe

BYTES = 20 * 30 * 4
RECIPE = Recipe(name="t", model="-", data="shapes", steps=9, batch=2, augmentation=Augmentation(crop=(16, 24)))


class Counted:
    """Counts how often each picture of a data set was decoded."""

    def __init__(self, data: SegmentationDataset) -> None:
        self._data, self.decoded = data, Counter[int]()

    def __getattr__(self, name: str) -> object:
        return getattr(self._data, name)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        self.decoded[index] += 1
        return self._data[index]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures of 20 x 30 with their masks."""
    rng = np.random.default_rng(0)
    for index in range(6):
        for kind, pixels in (
            ("images", rng.integers(0, 256, (20, 30, 3), np.uint8)),
            ("masks", rng.integers(0, 3, (20, 30), np.uint8)),
        ):
            (tmp_path / "data" / "all" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "data" / "all" / kind / f"p{index}.png")
    return tmp_path


def opened(folder: Path) -> Counted:
    return Counted(build_split(folder / "data", "all", ("a", "b", "c")))


def wrapped(kind: str, data: Counted, folder: Path, limit_bytes: int = 10**6) -> MemoryCache | DiskCache:
    return MemoryCache(data, limit_bytes) if kind == "memory" else DiskCache(data, folder / "cache", limit_bytes)


def assert_same(found: Sample, expected: Sample) -> None:
    np.testing.assert_array_equal(found.image, expected.image)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert (found.name, found.labels.dtype, found.image.dtype) == (expected.name, expected.labels.dtype, np.uint8)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_images_are_decoded_once_and_stay_the_same(kind: str, folder: Path) -> None:
    data = opened(folder)
    cache = wrapped(kind, data, folder)
    for _ in range(3):
        for index in range(6):
            assert_same(cache[index], data._data[index])
    assert data.decoded == Counter(range(6))
    assert (cache.name, cache.split, cache.classes, cache.names) == (data.name, data.split, data.classes, data.names)
    assert (cache.ignore_index, cache.palette, len(cache)) == (data.ignore_index, data.palette, 6)
    np.testing.assert_array_equal(cache.read_labels(2), data.read_labels(2))
    with pytest.raises(IndexError):
        cache[6]


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_labels_of_16_bits_are_kept(kind: str, folder: Path) -> None:
    for index in range(6):
        Image.fromarray(np.full((20, 30), index % 3, np.uint16)).save(folder / "data" / "all" / "masks" / f"p{index}.png")
    data = opened(folder)
    cache = wrapped(kind, data, folder)
    assert data[5].labels.dtype == np.uint16
    for _ in range(2):
        assert_same(cache[5], data._data[5])


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_full_cache_is_logged_once_and_training_goes_on(kind: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three of six pictures fit; the others are decoded each time, rightly."""
    data = opened(folder)
    cache = wrapped(kind, data, folder, 3 * (BYTES + 40))
    with caplog.at_level(logging.INFO, "deeplabzoo"):
        for _ in range(3):
            for index in range(6):
                assert_same(cache[index], data._data[index])
    assert caplog.text.count("cache: full, 3 of 6 images of folder all fit") == 1
    assert sum(data.decoded.values()) == 3 + 3 * 3
    if kind == "disk":
        assert sum(one.stat().st_size for one in (folder / "cache").iterdir()) <= 3 * (BYTES + 40)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_the_same_with_a_cache_and_workers_share_it(workers: int, folder: Path) -> None:
    """Forked workers fill one memory: what the first of them decoded, this process has."""
    data = opened(folder)
    cache = MemoryCache(data, 10**6)
    recipe = dataclasses.replace(RECIPE, augmentation=Augmentation(crop=(16, 24)))
    plain = iterate_batches(BatchDataset(data._data, recipe, Preprocessing()), 0, 9, workers=0)
    kept = iterate_batches(BatchDataset(cache, recipe, Preprocessing()), 0, 9, workers=workers)
    for one, other in zip(plain, kept, strict=True):
        assert torch.equal(one.image_BCHW, other.image_BCHW)
        assert torch.equal(one.labels_BHW, other.labels_BHW)
    data.decoded.clear()
    for index in range(6):
        assert_same(cache[index], data._data[index])
    assert not data.decoded


def test_threads_do_not_tread_on_one_another(folder: Path) -> None:
    data = opened(folder)
    cache = MemoryCache(data, 10**6)
    wrong: list[int] = []

    def look(seed: int) -> None:
        indices = np.random.default_rng(seed).integers(0, 6, 200).tolist()
        wrong.extend(one for one in indices if not np.array_equal(cache[one].image, data._data[one].image))

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_a_disk_cache_serves_the_next_run_and_notices_changes(folder: Path) -> None:
    """Keyed by path, size and time of change: a replaced picture is decoded anew, the others are not."""
    list(map(wrapped("disk", opened(folder), folder).__getitem__, range(6)))
    file = folder / "data" / "all" / "images" / "p1.png"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(file)
    os.utime(file, ns=(1, 1))
    data = opened(folder)
    cache = wrapped("disk", data, folder)
    assert not cache[1].image.any()
    list(map(cache.__getitem__, range(6)))
    assert data.decoded == Counter([1])


def test_a_damaged_entry_is_decoded_again(folder: Path) -> None:
    """Cut short, empty or of another program: never a wrong picture, never an error."""
    cache = wrapped("disk", opened(folder), folder)
    for content in (b"", b"short", b"x" * 5000, None):
        sample = cache[0]
        entry = next(one for one in (folder / "cache").iterdir() if one.suffix == ".pixels")
        entry.write_bytes(entry.read_bytes()[:-1] if content is None else content)
        assert_same(cache[0], sample)


def test_errors_pass_through_and_are_not_kept(folder: Path) -> None:
    Image.fromarray(np.full((20, 30), 9, np.uint8)).save(folder / "data" / "all" / "masks" / "p3.png")
    for kind in ("memory", "disk"):
        cache = wrapped(kind, opened(folder), folder)
        for _ in range(2):
            with pytest.raises(DataError, match=r"p3\.png' has label value 9"):
                cache[3]


def test_a_copy_in_a_spawned_process_logs_that_it_stores_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = MemoryCache(SyntheticShapes("val", (32, 32), 3), 10**6)
    copy = MemoryCache.__new__(MemoryCache)
    with caplog.at_level(logging.INFO, "deeplabzoo"):
        copy.__setstate__(cache.__getstate__())
    assert "was not forked" in caplog.text
    assert_same(copy[2], cache[2])


def test_a_recipe_asks_for_a_cache_without_becoming_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--set cache=memory` changes how a run goes, not what it learns; drawn shapes have no files to key a disk cache by."""
    cached = apply_overrides(RECIPE, ["cache=memory", "cache_gb=0.01"])
    assert cached.digest() == RECIPE.digest()
    data = open_splits(cached, None)
    assert isinstance(data.train, MemoryCache)
    assert isinstance(data.val, MemoryCache)
    assert data.train.limit_bytes + data.val.limit_bytes <= 10**7
    assert data.sha256 == open_splits(RECIPE, None).sha256
    monkeypatch.setenv("DEEPLABZOO_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="cache=memory"):
        open_splits(apply_overrides(RECIPE, ["cache=disk"]), None)
    with pytest.raises(UsageError, match="cache_gb must be above 0"):
        apply_overrides(RECIPE, ["cache_gb=0"])
    with pytest.raises(UsageError, match="none, memory, disk"):
        apply_overrides(RECIPE, ["cache=ram"])
