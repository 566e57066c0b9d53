"""Training batches: batch number k of a run is a pure function of (data, recipe, k), whoever computes it.

So resuming is starting at step k, workers are only hands, and the batches of several processes are slices of the batch that
one process would have. Pictures are passed through without end, shuffled anew in each pass, so there is no short last batch
(a batch of one breaks batch norm: asks.md theme C), and a data set smaller than a batch simply comes round more often.
"""

import dataclasses
import functools
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from deeplabzoo.data.cache import DiskCache, MemoryCache
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.data.dataset import Sample, SegmentationDataset, build_dataset
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.data.transforms import augment, load_kernel
from deeplabzoo.data.validation import LabelCounts, count_labels
from deeplabzoo.errors import DataError, DeepLabZooError, ImageError, TrainingError, UsageError
from deeplabzoo.hub.download import cache_folder
from deeplabzoo.log import logger
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.processing.preprocessing import resized_hw
from deeplabzoo.training.distributed import DistributedContext
from deeplabzoo.training.recipe import Recipe


class Batch(NamedTuple):
    """One process's part of a global batch, before normalisation."""

    image_BCHW: torch.Tensor
    """uint8 RGB."""
    labels_BHW: torch.Tensor
    """uint8, or int64 where the numbers need more: what is small travels faster from worker to device."""
    skipped: torch.Tensor
    """Indices of the training pictures that could not be read, whose places others took."""


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return the order in which pass number `epoch` visits `count` pictures."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(count)


def sample_generator(seed: int, epoch: int, position: int) -> np.random.Generator:
    """Return the random numbers of the sample at `position` of pass `epoch`."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, position])))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return what torch's generator is seeded with before update number `step` (dropout): nothing to save, nothing to drift."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class BatchDataset(Dataset[Batch | DeepLabZooError]):
    """`stream[k]` is this process's slice of global batch k; an error raised on purpose is returned, not raised.

    (A worker process can hand over an exception only wrapped in its traceback.) Raises DataError for an empty data set and
    UsageError for a batch that cannot be shared out evenly.
    """

    def __init__(
        self, data: SegmentationDataset, recipe: Recipe, preprocessing: Preprocessing, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if not len(data):
            raise DataError(f"{data.name} {data.split} has no pictures to train on.")
        pieces = world_size * recipe.accumulate
        if recipe.batch % pieces:
            raise UsageError(
                f"A batch of {recipe.batch} cannot be shared evenly by {world_size} process(es) x {recipe.accumulate} piece(s); "
                f"make it a multiple of {pieces}."
            )
        self._data, self._recipe, self._preprocessing = data, recipe, preprocessing
        share = recipe.batch // world_size
        self._places = range(rank * share, (rank + 1) * share)
        mean = preprocessing.mean if preprocessing.channel_order == "RGB" else preprocessing.mean[::-1]
        red, green, blue = (min(255, max(0, round(value * 255))) for value in mean)
        self._fill = (red, green, blue)
        load_kernel()  # compiled once, before workers are forked

    def __getitem__(self, step: int) -> Batch | DeepLabZooError:
        positions = [step * self._recipe.batch + place for place in self._places]
        image_BHWC = np.empty((len(positions), *self._recipe.augmentation_at(step).crop, 3), np.uint8)
        skipped: list[int] = []
        try:
            labels = [self._sample(step, *one, skipped) for one in zip(positions, image_BHWC, strict=True)]
        except DeepLabZooError as error:
            return error
        labels_BHW = np.stack(labels)
        if labels_BHW.dtype != np.uint8:
            labels_BHW = labels_BHW.astype(np.int64)
        image_BCHW = torch.from_numpy(image_BHWC).permute(0, 3, 1, 2)
        return Batch(image_BCHW, torch.from_numpy(labels_BHW), torch.tensor(skipped, dtype=torch.int64))

    def _sample(self, step: int, position: int, out_HWC: Pixels, skipped: list[int]) -> Labels:
        """Read and augment the sample at a position of the endless run through the data; its image is written to `out_HWC`."""
        seed, count = self._recipe.seed, len(self._data)
        epoch, place = divmod(position, count)
        sample = self._next_readable(epoch_order(seed, epoch, count), place, skipped)
        augmentation = self._recipe.augmentation_at(step)
        height, width = sample.labels.shape
        seen_hw = resized_hw((height, width), self._preprocessing)
        factor = seen_hw[0] / height if height >= width else seen_hw[1] / width
        low, high = augmentation.scale
        augmentation = dataclasses.replace(augmentation, scale=(low * factor, high * factor))
        generator = sample_generator(seed, epoch, place)
        ignore_index = self._data.ignore_index
        _, labels_HW = augment(
            sample, augmentation, generator, mean_fill=self._fill, ignore_index=ignore_index, out_HWC=out_HWC
        )
        return labels_HW

    def _next_readable(self, order: npt.NDArray[np.int64], place: int, skipped: list[int]) -> Sample:
        """Read the picture at a place of a pass, or the first one after it that can be read, where the recipe says skip."""
        for ahead in range(len(order)):
            index = int(order[(place + ahead) % len(order)])
            try:
                return self._data[index]
            except ImageError:
                if self._recipe.unreadable == "stop":
                    raise
                skipped.append(index)
        raise DataError(f"None of the {len(order)} pictures of {self._data.name} {self._data.split} can be read.")


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the run's own ends its workers


def iterate_batches(dataset: BatchDataset, start: int, stop: int, *, workers: int, pin: bool = False) -> Iterator[Batch]:
    """Yield batches `start` ... `stop - 1`, read ahead by at most `workers` processes (0: none); raises what the stream met.

    A worker that was killed is noticed when its batch is waited for, within 5 s, and never in the middle of an update: a
    TrainingError says so.
    """
    steps = range(start, stop)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, processors, len(steps))
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        worker_init_fn=_init_worker,
        pin_memory=pin,
    )
    try:
        for batch in _start_workers(loader):
            if isinstance(batch, DeepLabZooError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
        if not workers or not _is_lost_worker_error(error):
            raise
        raise TrainingError(
            "A process that reads training pictures was killed, usually because memory ran out; lower workers or cache_gb, or "
            "give the machine more memory (in a container, /dev/shm too), and go on with --resume."
        ) from None


def _is_lost_worker_error(error: Exception) -> bool:
    """Whether torch says so, or the pipe to a worker broke before torch looked; what a worker raised itself says `Caught`."""
    told = str(error)
    return "exited unexpectedly" in told if isinstance(error, RuntimeError) else "Caught " not in told


def _start_workers(loader: "DataLoader[Batch | DeepLabZooError]") -> Iterator[Batch | DeepLabZooError]:
    """Start the workers, without torch's handler of SIGCHLD: it would raise wherever the run is, in half an update too."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    begun = iter(loader)
    signal.signal(signal.SIGCHLD, before)
    return begun


# Class weights from pixel counts: what rare classes are worth in the loss.


ClassWeights = Literal["none", "median_frequency", "enet", "inverse_sqrt"]
CLASS_WEIGHTS: tuple[ClassWeights, ...] = ("none", "median_frequency", "enet", "inverse_sqrt")


def class_weights(
    kind: str, pixels_C: NDArray[np.int64], present_pixels_C: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return one weight a class from the training set's pixel counts; a class that never occurs gets 1.

    `pixels_C` counts the pixels of each class; `present_pixels_C` the valid pixels of the images that hold the class
    (None: of all images). Raises UsageError for an unknown kind.

    - `median_frequency`: median(f) / f with f = pixels / present_pixels (Eigen and Fergus, arXiv:1411.4734, section 6.3.2);
    - `enet`: 1 / ln(1.02 + share) (ENet, arXiv:1606.02147, section 5.2), between 1.42 and 50.5;
    - `inverse_sqrt`: share^-0.5, scaled so that the mean over pixels is 1.
    """
    if kind not in CLASS_WEIGHTS:
        raise UsageError(f"There are no class weights {kind!r}; there are {', '.join(CLASS_WEIGHTS)}, or numbers of your own.")
    weights = np.ones(len(pixels_C))
    seen = pixels_C > 0
    if kind == "none" or not seen.any():
        return weights
    share = pixels_C[seen] / pixels_C.sum()
    if kind == "enet":
        weights[seen] = 1 / np.log(1.02 + share)
    elif kind == "inverse_sqrt":
        weights[seen] = share**-0.5 / np.sum(share**0.5)
    else:
        images = np.full(len(pixels_C), pixels_C.sum()) if present_pixels_C is None else present_pixels_C
        frequency = pixels_C[seen] / images[seen]
        weights[seen] = np.median(frequency) / frequency
    return weights


# The data of a run: its splits, opened and looked at before the first step.


_SHAPES = (64, 80)
_SHAPES_COUNT = {"train": 512, "val": 64}


@dataclass(frozen=True, eq=False)
class Splits:
    """What is trained on, what is measured while training, and what is measured once at the end."""

    train: SegmentationDataset
    val: SegmentationDataset
    test: SegmentationDataset | None
    root: Path | None

    @property
    def sha256(self) -> str:
        """Hash of the training pictures' names in order: which run a state belongs to."""
        return hashlib.sha256("\n".join([self.train.name, *self.train.names]).encode()).hexdigest()


def open_splits(recipe: Recipe, root: Path | None) -> Splits:
    """Open the recipe's splits; a test split that is not there is said and left out. Raises UsageError and DataError."""
    if recipe.data == "shapes":
        size = _SHAPES
        drawn = (SyntheticShapes(split, size, _SHAPES_COUNT[split]) for split in ("train", "val"))
        train, val = _with_cache(recipe, *drawn)
        return Splits(train, val, None, None)
    if root is None:
        raise UsageError(f"Recipe '{recipe.name}' needs --data, the folder that holds '{recipe.data}'.")
    names = recipe.classes or (CLASS_LISTS[recipe.data].classes if recipe.data in CLASS_LISTS else None)
    first, second = (build_dataset(recipe.data, root, split, classes=names) for split in (recipe.train_split, recipe.val_split))
    test = None
    if recipe.test_split:
        try:
            test = build_dataset(recipe.data, root, recipe.test_split, classes=names)
        except DataError as error:
            logger.info(f"test: left out ({error})")
    both = set(first.names) & set(second.names)
    if both and recipe.train_split != recipe.val_split:
        raise DataError(f"{len(both)} pictures are in both '{first.split}' and '{second.split}', such as '{min(both)}'.")
    train, val = _with_cache(recipe, first, second)
    return Splits(train, val, test, root)


def _with_cache(recipe: Recipe, *splits: SegmentationDataset) -> list[SegmentationDataset]:
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


def class_weights_from_data(recipe: Recipe, data: Splits, distributed: DistributedContext) -> list[float] | None:
    """Look at every label, say how classes are spread, and return the recipe's class weights (None: all equal).

    One process looks; the others get what it found. Raises DataError for labels outside the classes, ImageError for a mask that
    cannot be read (where the recipe does not skip it), UsageError for weights that do not fit the classes.
    """
    num_classes = len(data.train.classes)
    if not isinstance(recipe.class_weights, str) and len(recipe.class_weights) != num_classes:
        raise UsageError(f"class_weights has {len(recipe.class_weights)} numbers, but there are {num_classes} classes.")
    found = torch.zeros(num_classes, dtype=torch.float64)
    if distributed.is_main_process:
        counts = _count_labels(data, skip=recipe.unreadable == "skip")
        if isinstance(recipe.class_weights, str):
            found += torch.from_numpy(class_weights(recipe.class_weights, counts.pixels, counts.present_pixels))
        else:
            found += torch.tensor(recipe.class_weights, dtype=torch.float64)
    values: list[float] = distributed.all_reduce_sum(found).tolist()
    return None if recipe.class_weights == "none" else values


def _count_labels(data: Splits, *, skip: bool) -> LabelCounts:
    counts = count_labels(
        data.train, skipped=(lambda error: logger.info(f"data: left out (unreadable=skip): {error}")) if skip else None
    )
    count_labels(data.val)
    logger.info(f"data: {len(data.train)} pictures to train on, {len(data.val)} to measure on\n{counts.table()}")
    return counts
