"""Training batches: batch number k of a run is a pure function of (data, recipe, k), whoever computes it.

So resuming is starting at step k, workers are only hands, and the batches of several processes are slices of the batch that
one process would have. Pictures are passed through without end, shuffled anew in each pass, so there is no short last batch
(a batch of one breaks batch norm: asks.md theme C), and a data set smaller than a batch simply comes round more often.
"""

import dataclasses
import functools
import os
import signal
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from deeplabzoo.data.base import Sample, SegmentationData
from deeplabzoo.data.images import Labels, Pixels
from deeplabzoo.data.resize import kernel
from deeplabzoo.data.transforms import augment
from deeplabzoo.errors import DataError, DeepLabZooError, ImageError, TrainingError, UsageError
from deeplabzoo.inference.preprocess import resized_hw
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.train.recipe import Recipe


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


class Stream(Dataset[Batch | DeepLabZooError]):
    """`stream[k]` is this process's slice of global batch k; an error raised on purpose is returned, not raised.

    (A worker process can hand over an exception only wrapped in its traceback.) Raises DataError for an empty data set and
    UsageError for a batch that cannot be shared out evenly.
    """

    def __init__(
        self, data: SegmentationData, recipe: Recipe, preprocessing: Preprocessing, *, rank: int = 0, processes: int = 1
    ) -> None:
        if not len(data):
            raise DataError(f"{data.name} {data.split} has no pictures to train on.")
        pieces = processes * recipe.accumulate
        if recipe.batch % pieces:
            raise UsageError(
                f"A batch of {recipe.batch} cannot be shared evenly by {processes} process(es) x {recipe.accumulate} piece(s); "
                f"make it a multiple of {pieces}."
            )
        self._data, self._recipe, self._preprocessing = data, recipe, preprocessing
        share = recipe.batch // processes
        self._places = range(rank * share, (rank + 1) * share)
        mean = preprocessing.mean if preprocessing.channel_order == "RGB" else preprocessing.mean[::-1]
        red, green, blue = (min(255, max(0, round(value * 255))) for value in mean)
        self._fill = (red, green, blue)
        kernel()  # compiled once, before workers are forked

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
        sample = self._readable(epoch_order(seed, epoch, count), place, skipped)
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

    def _readable(self, order: npt.NDArray[np.int64], place: int, skipped: list[int]) -> Sample:
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


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the run's own ends its workers


def batches(stream: Stream, start: int, stop: int, *, workers: int, pin: bool = False) -> Iterator[Batch]:
    """Yield batches `start` ... `stop - 1`, read ahead by at most `workers` processes (0: none); raises what the stream met.

    A worker that was killed is noticed when its batch is waited for, within 5 s, and never in the middle of an update: a
    TrainingError says so.
    """
    steps = range(start, stop)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, processors, len(steps))
    loader = DataLoader(
        stream,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        worker_init_fn=_begin_worker,
        pin_memory=pin,
    )
    try:
        for batch in _begun(loader):
            if isinstance(batch, DeepLabZooError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
        if not workers or not _tells_of_a_lost_worker(error):
            raise
        raise TrainingError(
            "A process that reads training pictures was killed, usually because memory ran out; lower workers or cache_gb, or "
            "give the machine more memory (in a container, /dev/shm too), and go on with --resume."
        ) from None


def _tells_of_a_lost_worker(error: Exception) -> bool:
    """Whether torch says so, or the pipe to a worker broke before torch looked; what a worker raised itself says `Caught`."""
    told = str(error)
    return "exited unexpectedly" in told if isinstance(error, RuntimeError) else "Caught " not in told


def _begun(loader: "DataLoader[Batch | DeepLabZooError]") -> Iterator[Batch | DeepLabZooError]:
    """Start the workers, without torch's handler of SIGCHLD: it would raise wherever the run is, in half an update too."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    begun = iter(loader)
    signal.signal(signal.SIGCHLD, before)
    return begun
