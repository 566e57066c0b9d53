"""Photos to files, one after another or in several processes that each keep a warm network."""

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deeplabzoo.data.images import MAX_PIXELS, Pixels, read_image
from deeplabzoo.errors import DeepLabZooError, ImageError
from deeplabzoo.inference.jobs import Job
from deeplabzoo.inference.large_predict import LargeResult, goes_from_file_to_file, predict_to_files
from deeplabzoo.inference.overlay import in_words
from deeplabzoo.inference.predictor import Predictor, Result
from deeplabzoo.inference.remote import read_url
from deeplabzoo.inference.sources import Source

SMALL_PIXELS = 32_000_000
"""Area up to which a photo may wait in memory beside another one."""

_Photo = Pixels | None | ImageError


@dataclass(frozen=True)
class Manner:
    """What holds for every photo of a run."""

    alpha: float
    legend: bool
    facts: Mapping[str, Any]
    """What the JSON says beside the areas: model, weights, device."""


@dataclass(frozen=True)
class Outcome:
    """What became of one photo."""

    job: Job
    line: str
    """What was found and where it was written, or why nothing was."""
    failed: bool = False


def label_one(predictor: Predictor, job: Job, manner: Manner, stamp: str | None) -> Outcome:
    """Label one photo and write its files with its stamp; a photo that cannot be read is an outcome, not an error."""
    return _labelled(predictor, job, manner, stamp, _read(predictor, job.source))()


def label_all(
    predictor: Predictor, work: Sequence[tuple[Job, str | None]], manner: Manner, *, workers: int = 1
) -> Iterator[Outcome]:
    """Yield the outcome of every (job, stamp) as it is there; with several workers each has its share of the threads.

    Raises what writing raises, and DeepLabZooError where a worker was killed: what was finished then stays, nothing half-made
    does, and the same call does the rest.
    """
    if workers == 1 or len(work) < 2:
        yield from _one_process(predictor, work, manner)
        return
    workers = min(workers, len(work))
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a forked process would share the threads and the GPU of this one
        initializer=_warm_up,
        initargs=(pickle.dumps(predictor), manner, max(1, torch.get_num_threads() // workers)),
    )
    try:
        for future in as_completed([pool.submit(_label_warm, job, stamp) for job, stamp in work]):
            yield future.result()
    except BrokenProcessPool:
        raise DeepLabZooError(
            "A worker process was killed, perhaps for want of memory; what it finished is kept, and the same command does the "
            "rest (fewer --workers need less memory)."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _one_process(predictor: Predictor, work: Sequence[tuple[Job, str | None]], manner: Manner) -> Iterator[Outcome]:
    """Yield the outcomes in order; the next photo is read and the last one's files are written while the network is busy.

    Decoding and compressing leave the Python lock, so a thread for each suffices. Beside a large photo nothing else is held.
    """
    reader, writer = (ThreadPoolExecutor(1, f"deeplabzoo-{role}") for role in ("reader", "writer"))
    coming: Future[_Photo] | None = None
    written: Future[Outcome] | None = None
    try:
        for index, (job, stamp) in enumerate(work):
            photo = coming.result() if coming else _read(predictor, job.source)
            small = isinstance(photo, np.ndarray) and photo.shape[0] * photo.shape[1] <= SMALL_PIXELS
            ahead = small and index + 1 < len(work)
            coming = reader.submit(_read, predictor, work[index + 1][0].source) if ahead else None
            finish = _labelled(predictor, job, manner, stamp, photo)
            if written:
                yield written.result()
            written = writer.submit(finish)
            if not small:
                yield written.result()
                written = None
        if written:
            yield written.result()
    finally:
        for thread in (reader, writer):
            thread.shutdown(wait=True, cancel_futures=True)


def _read(predictor: Predictor, source: Source) -> _Photo:
    """Return the pixels of a photo; None if it goes from file to file, the error if it cannot be read."""
    try:
        if source.url is not None:
            return read_url(source.url, max_pixels=predictor.max_pixels or MAX_PIXELS)
        if goes_from_file_to_file(predictor, source.path):
            return None
        return read_image(source.path, max_pixels=predictor.max_pixels or MAX_PIXELS)
    except ImageError as error:
        return error


def _labelled(predictor: Predictor, job: Job, manner: Manner, stamp: str | None, photo: _Photo) -> Callable[[], Outcome]:
    """Run the network on what was read, and return what writes the files and tells the outcome."""
    facts = {"image": job.source.where, **manner.facts}
    drawing: dict[str, Any] = {"alpha": manner.alpha, "legend": manner.legend, "facts": facts, "stamp": stamp}
    result: Result | LargeResult
    try:
        if isinstance(photo, ImageError):
            raise photo
        result = predictor(photo) if photo is not None else predict_to_files(predictor, job.source.path, job.files, **drawing)
    except ImageError as error:
        failed = Outcome(job, str(error), failed=True)
        return lambda: failed

    def write() -> Outcome:
        if isinstance(result, Result):
            for kind, file in job.files.items():
                result.save(file, kind, **drawing)
        files = ", ".join(str(file) for file in job.files.values())
        return Outcome(job, f"{job.source.path.name}: {in_words(result.found())} -> {files}")

    return write


_warm: tuple[Predictor, Manner]
"""In a worker process: its network and the manner, set once by `_warm_up`."""


def _warm_up(packed: bytes, manner: Manner, threads: int) -> None:
    global _warm
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's matter; workers end with their photo
    torch.set_num_threads(threads)
    _warm = pickle.loads(packed), manner


def _label_warm(job: Job, stamp: str | None) -> Outcome:
    predictor, manner = _warm
    return label_one(predictor, job, manner, stamp)
