"""The data of a run: its splits, opened and looked at before the first step."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from deeplabzoo.data.base import SegmentationData, open_data
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.data.decoded_cache import DiskCache, MemoryCache
from deeplabzoo.data.scan import LabelCounts, scan_labels
from deeplabzoo.data.shapes import Shapes
from deeplabzoo.errors import DataError, UsageError
from deeplabzoo.say import say
from deeplabzoo.train.class_weights import class_weights
from deeplabzoo.train.distributed import Processes
from deeplabzoo.train.recipe import Recipe
from deeplabzoo.zoo.hub import cache_folder

_SHAPES = (64, 80)
_SHAPES_COUNT = {"train": 512, "val": 64}


@dataclass(frozen=True, eq=False)
class Splits:
    """What is trained on, what is measured while training, and what is measured once at the end."""

    train: SegmentationData
    val: SegmentationData
    test: SegmentationData | None
    root: Path | None

    @property
    def sha256(self) -> str:
        """Hash of the training pictures' names in order: which run a state belongs to."""
        return hashlib.sha256("\n".join([self.train.name, *self.train.names]).encode()).hexdigest()


def open_splits(recipe: Recipe, root: Path | None) -> Splits:
    """Open the recipe's splits; a test split that is not there is said and left out. Raises UsageError and DataError."""
    if recipe.data == "shapes":
        size = _SHAPES
        drawn = (Shapes(split, size, _SHAPES_COUNT[split]) for split in ("train", "val"))
        train, val = _kept(recipe, *drawn)
        return Splits(train, val, None, None)
    if root is None:
        raise UsageError(f"Recipe '{recipe.name}' needs --data, the folder that holds '{recipe.data}'.")
    names = recipe.classes or (CLASS_LISTS[recipe.data].classes if recipe.data in CLASS_LISTS else None)
    first, second = (open_data(recipe.data, root, split, classes=names) for split in (recipe.train_split, recipe.val_split))
    test = None
    if recipe.test_split:
        try:
            test = open_data(recipe.data, root, recipe.test_split, classes=names)
        except DataError as error:
            say(f"test: left out ({error})")
    both = set(first.names) & set(second.names)
    if both and recipe.train_split != recipe.val_split:
        raise DataError(f"{len(both)} pictures are in both '{first.split}' and '{second.split}', such as '{min(both)}'.")
    train, val = _kept(recipe, first, second)
    return Splits(train, val, test, root)


def _kept(recipe: Recipe, *splits: SegmentationData) -> list[SegmentationData]:
    """Wrap splits into the recipe's cache of decoded pictures, sharing its bytes out by their numbers of pictures."""
    if recipe.cache == "none":
        return list(splits)
    pictures = sum(map(len, splits))
    limits = [max(1, int(recipe.cache_gb * 1e9 * len(data) / max(1, pictures))) for data in splits]
    if recipe.cache == "memory":
        return [MemoryCache(data, limit) for data, limit in zip(splits, limits, strict=True)]
    folder = cache_folder() / "decoded"
    places = (folder / f"{data.name}_{data.split}" for data in splits)
    return [DiskCache(data, place, limit) for data, place, limit in zip(splits, places, limits, strict=True)]


def class_weights_of(recipe: Recipe, data: Splits, processes: Processes) -> list[float] | None:
    """Look at every label, say how classes are spread, and return the recipe's class weights (None: all equal).

    One process looks; the others get what it found. Raises DataError for labels outside the classes, ImageError for a mask that
    cannot be read (where the recipe does not skip it), UsageError for weights that do not fit the classes.
    """
    num_classes = len(data.train.classes)
    if not isinstance(recipe.class_weights, str) and len(recipe.class_weights) != num_classes:
        raise UsageError(f"class_weights has {len(recipe.class_weights)} numbers, but there are {num_classes} classes.")
    found = torch.zeros(num_classes, dtype=torch.float64)
    if processes.first:
        counts = _looked_at(data, skip=recipe.unreadable == "skip")
        if isinstance(recipe.class_weights, str):
            found += torch.from_numpy(class_weights(recipe.class_weights, counts.pixels, counts.present_pixels))
        else:
            found += torch.tensor(recipe.class_weights, dtype=torch.float64)
    values: list[float] = processes.total(found).tolist()
    return None if recipe.class_weights == "none" else values


def _looked_at(data: Splits, *, skip: bool) -> LabelCounts:
    counts = scan_labels(
        data.train, skipped=(lambda error: say(f"data: left out (unreadable=skip): {error}")) if skip else None
    )
    scan_labels(data.val)
    say(f"data: {len(data.train)} pictures to train on, {len(data.val)} to measure on\n{counts.table()}")
    return counts
