"""Training data: opening a recipe's splits, class weights, and a data loader whose batch k is a function of (data, recipe, k).

So resuming means starting at step k, results do not depend on the number of workers, and the batches of several processes are
slices of the batch that one process would have. The dataset is repeated without end, shuffled again in each epoch, so there is
no short last batch (a batch of one breaks batch norm), and a dataset smaller than a batch occurs in it more than once.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from deeplabzoo.data.validation import LabelCounts, check_splits_differ, count_labels
from deeplabzoo.errors import DataError, DeepLabZooError, ImageError, TrainingError, UsageError
from deeplabzoo.hub.download import cache_folder
from deeplabzoo.log import logger
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.processing.preprocessing import resized_hw
from deeplabzoo.training.distributed import DistributedContext
from deeplabzoo.training.recipe import Recipe


class Batch(NamedTuple):
    """One process's part of a global batch, before normalization."""

    image_BCHW: torch.Tensor
    """uint8 RGB, B x 3 x height x width of the crop."""
    labels_BHW: torch.Tensor
    """uint8, or int64 above 255: small types are faster to send from worker to device."""
    skipped: torch.Tensor
    """Indices of the training images that could not be read and were replaced by others."""


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return the order in which epoch number `epoch` visits `count` images."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(count)


def sample_generator(seed: int, epoch: int, position: int) -> np.random.Generator:
    """Return the random generator of the sample at `position` of an epoch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, position])))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's generator before `step` (dropout); a function of the step, so no generator state is saved."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class BatchDataset(Dataset[Batch | DeepLabZooError]):
    """`dataset[k]` is this process's slice of global batch k; an error raised on purpose is returned, not raised.

    (torch wraps an exception of a worker process into its traceback, which would hide the sentence.)

    Args:
        data: The training split.
        recipe: Batch size, augmentation, stages and seed.
        preprocessing: The model's, whose resize decides at which scale images are cropped.
        rank: This process's rank.
        world_size: Number of processes that share the global batch.

    Raises:
        DataError: The dataset is empty.
        UsageError: The batch cannot be divided evenly by processes and accumulated pieces.
    """

    def __init__(
        self, data: SegmentationDataset, recipe: Recipe, preprocessing: Preprocessing, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if not len(data):
            raise DataError(f"{data.name} {data.split} has no images to train on.")
        pieces = world_size * recipe.accumulate
        if recipe.batch % pieces:
            raise UsageError(
                f"A batch of {recipe.batch} cannot be divided evenly by {world_size} process(es) x {recipe.accumulate} "
                f"piece(s); make it a multiple of {pieces}."
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
        """Read and augment the sample at a position, counted from the start of the run; its image is written to `out_HWC`."""
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
        """Read the image at a place of an epoch, or with `unreadable=skip` the first one after it that can be read."""
        for ahead in range(len(order)):
            index = int(order[(place + ahead) % len(order)])
            try:
                return self._data[index]
            except ImageError:
                if self._recipe.unreadable == "stop":
                    raise
                skipped.append(index)
        raise DataError(f"None of the {len(order)} images of {self._data.name} {self._data.split} can be read.")


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the main one ends its workers


def iterate_batches(dataset: BatchDataset, start: int, stop: int, *, workers: int, pin: bool = False) -> Iterator[Batch]:
    """Yield batches `start` ... `stop - 1`, prefetched by worker processes.

    Args:
        dataset: Batches by step.
        start: First step.
        stop: Step after the last one.
        workers: Number of worker processes, at most one per processor; 0 reads in this process.
        pin: Whether to place batches in pinned memory, for a GPU.

    Raises:
        DeepLabZooError: What a worker met while reading.
        TrainingError: A worker was killed; noticed while its batch is waited for, never in the middle of a train step.
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
            "A process that reads training images was killed, usually because memory ran out; lower workers or cache_gb, or "
            "give the machine more memory (in a container, /dev/shm too), and go on with --resume."
        ) from None


def _is_lost_worker_error(error: Exception) -> bool:
    """Whether torch reports it, or the pipe to a worker broke before; what a worker raised itself contains `Caught`."""
    message = str(error)
    return "exited unexpectedly" in message if isinstance(error, RuntimeError) else "Caught " not in message


def _start_workers(loader: "DataLoader[Batch | DeepLabZooError]") -> Iterator[Batch | DeepLabZooError]:
    """Start the workers, without torch's SIGCHLD handler: it would raise anywhere, in the middle of a train step, too."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    begun = iter(loader)
    signal.signal(signal.SIGCHLD, before)
    return begun


# Class weights of the loss from pixel counts.

ClassWeights = Literal["none", "median_frequency", "enet", "inverse_sqrt"]
CLASS_WEIGHTS: tuple[ClassWeights, ...] = ("none", "median_frequency", "enet", "inverse_sqrt")


def class_weights(
    kind: str, pixels_C: NDArray[np.int64], present_pixels_C: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return one weight per class from the training set's pixel counts; a class that never occurs gets 1.

    Args:
        kind: `none`; `median_frequency`, median(f) / f with f = pixels / present_pixels (Eigen and Fergus, arXiv:1411.4734,
            section 6.3.2); `enet`, 1 / ln(1.02 + share) (ENet, arXiv:1606.02147, section 5.2), between 1.42 and 50.5;
            `inverse_sqrt`, share^-0.5, scaled so that the mean over pixels is 1.
        pixels_C: Pixels of each class.
        present_pixels_C: Labelled pixels of the images that contain the class (None: of all images).

    Raises:
        UsageError: The kind is unknown.
    """
    if kind not in CLASS_WEIGHTS:
        raise UsageError(f"There are no class weights {kind!r}; there are {', '.join(CLASS_WEIGHTS)}, or one number per class.")
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


# The splits of a run, opened and checked before the first step.

_FINGERPRINT_FILES = 2048
"""At most so many images, evenly spaced, are looked at for the fingerprint of the data."""
_FINGERPRINT_BYTES = 16384
"""Read at the start of each file, and as many at its end."""
_SHAPES = (64, 80)
_SHAPES_COUNT = {"train": 512, "val": 64}


@dataclass(frozen=True, eq=False)
class Splits:
    """The datasets of a run: `train`; `val`, evaluated during training; `test`, evaluated once at the end."""

    train: SegmentationDataset
    val: SegmentationDataset
    test: SegmentationDataset | None
    root: Path | None

    @property
    def sha256(self) -> str:
        """SHA-256 of the training images' names, in order."""
        return hashlib.sha256("\n".join([self.train.name, *self.train.names]).encode()).hexdigest()

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Fingerprint of the data that a resumed run must find again: names, classes, and contents of the files."""
        digest = hashlib.sha256()
        for data in (self.train, self.val):
            _update_with_files(digest, data)
        return {
            "data_sha256": self.sha256,
            "data_contents_sha256": digest.hexdigest(),
            "classes": list(self.train.classes),
        }


def _update_with_files(digest: "hashlib._Hash", data: SegmentationDataset) -> None:
    """Add size, start and end of a split's files, up to _FINGERPRINT_FILES images; quick even for a large dataset."""
    source: Any = data
    while not hasattr(source, "files") and (inner := getattr(source, "data", None) or getattr(source, "_data", None)):
        source = inner  # a cache or a subset of another dataset
    files: Mapping[str, tuple[Path, Path]] = getattr(source, "files", {})
    digest.update(repr(sorted(getattr(source, "label_map", {}).items())).encode())
    count = min(len(data.names), _FINGERPRINT_FILES)
    for place in range(count):
        name = data.names[place * len(data.names) // count]
        for path in files.get(name, ()):
            digest.update(f"{name} ".encode(errors="surrogateescape"))
            with contextlib.suppress(OSError), path.open("rb") as file:  # an unreadable file is reported when it is its turn
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{size} ".encode() + file.read(_FINGERPRINT_BYTES))
                file.seek(max(0, size - _FINGERPRINT_BYTES))
                digest.update(file.read(_FINGERPRINT_BYTES))


def open_splits(recipe: Recipe, root: Path | None) -> Splits:
    """Open the recipe's splits; a missing test split is skipped with a log line.

    Args:
        recipe: Names the dataset and its splits.
        root: Folder of the dataset; None for `shapes`.

    Raises:
        UsageError: The folder is not given, or the dataset has a single class.
        DataError: A split is missing or incomplete, or an image is in two splits.
    """
    if recipe.data == "shapes":
        size = _SHAPES
        generated = (SyntheticShapes(split, size, _SHAPES_COUNT[split]) for split in ("train", "val"))
        train, val = _with_cache(recipe, *generated)
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
            logger.info(f"no test split; skipping the final test evaluation ({error})")
    if len(first.classes) == 1:
        raise UsageError(
            f"{first.name} has one class, '{first.classes[0]}', so there is nothing to tell it apart from; name the background "
            "as the first class, too."
        )
    if recipe.train_split != recipe.val_split:
        check_splits_differ(first, second)
    train, val = _with_cache(recipe, first, second)
    return Splits(train, val, test, root)


def _with_cache(recipe: Recipe, *splits: SegmentationDataset) -> list[SegmentationDataset]:
    """Wrap splits into the recipe's cache of decoded images, dividing its bytes by their numbers of images."""
    if recipe.cache == "none":
        return list(splits)
    images = sum(map(len, splits))
    limits = [max(1, int(recipe.cache_gb * 1e9 * len(data) / max(1, images))) for data in splits]
    if recipe.cache == "memory":
        return [MemoryCache(data, limit) for data, limit in zip(splits, limits, strict=True)]
    folder = cache_folder() / "decoded"
    places = (folder / f"{data.name}_{data.split}" for data in splits)
    return [DiskCache(data, place, limit) for data, place, limit in zip(splits, places, limits, strict=True)]


def class_weights_from_data(recipe: Recipe, data: Splits, distributed: DistributedContext) -> list[float] | None:
    """Check every mask, log the class distribution, and return the recipe's class weights (None: all equal).

    Rank 0 reads the masks; the others get its weights.

    Raises:
        DataError: A mask has labels outside the classes.
        ImageError: A mask cannot be read, and the recipe does not skip it.
        UsageError: The recipe has another number of weights than there are classes.
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
        data.train, skipped=(lambda error: logger.warning(f"data: skipped (unreadable=skip): {error}")) if skip else None
    )
    count_labels(data.val)
    logger.info(f"data: {len(data.train)} training images, {len(data.val)} validation images\n{counts.table()}")
    return counts
