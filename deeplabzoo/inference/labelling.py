"""Photos to files, one after another or in several processes that each keep a warm network."""

import multiprocessing
import pickle
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from deeplabzoo.data.images import MAX_PIXELS
from deeplabzoo.errors import DeepLabZooError, ImageError
from deeplabzoo.inference.jobs import Job
from deeplabzoo.inference.large_predict import LargeResult, goes_from_file_to_file, predict_to_files
from deeplabzoo.inference.overlay import in_words
from deeplabzoo.inference.predictor import Predictor, Result
from deeplabzoo.inference.remote import read_url


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
    source = job.source
    facts = {"image": source.where, **manner.facts}
    drawing: dict[str, Any] = {"alpha": manner.alpha, "legend": manner.legend, "facts": facts, "stamp": stamp}
    result: Result | LargeResult
    try:
        if source.url is None and goes_from_file_to_file(predictor, source.path):
            result = predict_to_files(predictor, source.path, job.files, **drawing)
        else:
            url_pixels = predictor.max_pixels or MAX_PIXELS
            photo = source.path if source.url is None else read_url(source.url, max_pixels=url_pixels)
            result = whole = predictor(photo)
            for kind, file in job.files.items():
                whole.save(file, kind, **drawing)
    except ImageError as error:
        return Outcome(job, str(error), failed=True)
    files = ", ".join(str(file) for file in job.files.values())
    return Outcome(job, f"{source.path.name}: {in_words(result.found())} -> {files}")


def label_all(
    predictor: Predictor, work: Sequence[tuple[Job, str | None]], manner: Manner, *, workers: int = 1
) -> Iterator[Outcome]:
    """Yield the outcome of every (job, stamp) as it is there; with several workers each has its share of the threads.

    Raises what writing raises, and DeepLabZooError where a worker was killed: what was finished then stays, nothing half-made
    does, and the same call does the rest.
    """
    if workers == 1 or len(work) < 2:
        for job, stamp in work:
            yield label_one(predictor, job, manner, stamp)
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
