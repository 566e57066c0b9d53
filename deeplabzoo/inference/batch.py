"""Photos to files, one after another or in several processes that each keep a warm network."""

import dataclasses
import hashlib
import json
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deeplabzoo
from deeplabzoo.checkpoints.native import tensors_sha256
from deeplabzoo.data.image_io import MAX_PIXELS, Pixels, read_header, read_image
from deeplabzoo.data.image_sources import Source, read_url, url_version
from deeplabzoo.errors import DeepLabZooError, ImageError
from deeplabzoo.inference.inputs import Job
from deeplabzoo.inference.large_predict import LargeResult, is_streamed, predict_to_files
from deeplabzoo.inference.predictor import STAMP_KEY, Kind, Predictor, Result, stamp_for_kind
from deeplabzoo.inference.visualization import areas_summary

MAX_PREFETCH_PIXELS = 32_000_000
"""Area up to which a photo may wait in memory beside another one."""

_DecodedImage = Pixels | None | ImageError


@dataclass(frozen=True)
class OutputOptions:
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


def label_image_file(predictor: Predictor, job: Job, output_options: OutputOptions, stamp: str | None) -> Outcome:
    """Label one photo and write its files with its stamp; a photo that cannot be read is an outcome, not an error."""
    return _predict_one(predictor, job, output_options, stamp, _read(predictor, job.source))()


def label_image_files(
    predictor: Predictor, work: Sequence[tuple[Job, str | None]], output_options: OutputOptions, *, workers: int = 1
) -> Iterator[Outcome]:
    """Yield the outcome of every (job, stamp) as it is there; with several workers each has its share of the threads.

    Raises what writing raises, and DeepLabZooError where a worker was killed: what was finished then stays, nothing half-made
    does, and the same call does the rest.
    """
    if workers == 1 or len(work) < 2:
        yield from _label_in_process(predictor, work, output_options)
        return
    workers = min(workers, len(work))
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a forked process would share the threads and the GPU of this one
        initializer=_init_worker,
        initargs=(pickle.dumps(predictor), output_options, max(1, torch.get_num_threads() // workers)),
    )
    try:
        for future in as_completed([pool.submit(_label_in_worker, job, stamp) for job, stamp in work]):
            yield future.result()
    except BrokenProcessPool:
        raise DeepLabZooError(
            "A worker process was killed, perhaps for want of memory; what it finished is kept, and the same command does the "
            "rest (fewer --workers need less memory)."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _label_in_process(
    predictor: Predictor, work: Sequence[tuple[Job, str | None]], output_options: OutputOptions
) -> Iterator[Outcome]:
    """Yield the outcomes in order; the next photo is read and the last one's files are written while the network is busy.

    Decoding and compressing leave the Python lock, so a thread for each suffices. Beside a large photo nothing else is held.
    """
    reader, writer = (ThreadPoolExecutor(1, f"deeplabzoo-{role}") for role in ("reader", "writer"))
    coming: Future[_DecodedImage] | None = None
    written: Future[Outcome] | None = None
    try:
        for index, (job, stamp) in enumerate(work):
            photo = coming.result() if coming else _read(predictor, job.source)
            small = isinstance(photo, np.ndarray) and photo.shape[0] * photo.shape[1] <= MAX_PREFETCH_PIXELS
            ahead = small and index + 1 < len(work)
            coming = reader.submit(_read, predictor, work[index + 1][0].source) if ahead else None
            finish = _predict_one(predictor, job, output_options, stamp, photo)
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


def _read(predictor: Predictor, source: Source) -> _DecodedImage:
    """Return the pixels of a photo; None if it goes from file to file, the error if it cannot be read."""
    try:
        if source.url is not None:
            return read_url(source.url, max_pixels=predictor.max_pixels or MAX_PIXELS)
        if is_streamed(predictor, source.path):
            return None
        return read_image(source.path, max_pixels=predictor.max_pixels or MAX_PIXELS)
    except ImageError as error:
        return error


def _predict_one(
    predictor: Predictor, job: Job, output_options: OutputOptions, stamp: str | None, photo: _DecodedImage
) -> Callable[[], Outcome]:
    """Run the network on what was read, and return what writes the files and tells the outcome."""
    facts = {"image": job.source.display_name, **output_options.facts}
    drawing: dict[str, Any] = {"alpha": output_options.alpha, "legend": output_options.legend, "facts": facts, "stamp": stamp}
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
        return Outcome(job, f"{job.source.path.name}: {areas_summary(result.found())} -> {files}")

    return write


_worker_state: tuple[Predictor, OutputOptions]
"""In a worker process: its network and the manner, set once by `_init_worker`."""


def _init_worker(packed: bytes, output_options: OutputOptions, threads: int) -> None:
    global _worker_state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's matter; workers end with their photo
    torch.set_num_threads(threads)
    _worker_state = pickle.loads(packed), output_options


def _label_in_worker(job: Job, stamp: str | None) -> Outcome:
    predictor, output_options = _worker_state
    return label_image_file(predictor, job, output_options, stamp)


# Which results were made before: each file says itself what it was made of, so no list of them can be wrong or lost.
#
# A result appears whole or not at all, and carries a stamp: a hash of the photo's state, the weights' numbers and every setting
# that a label depends on. It stands in the text of a PNG and in the JSON. Files of another stamp, or of none, are made again.


def settings_hash(predictor: Predictor) -> str:
    """Return a hash of all that labels depend on but the photo: the weights' numbers, preprocessing, tiles, engine, version.

    The device is not part of it: a run may go on on another machine.
    """
    net, tiling = predictor.net, predictor.tiling
    facts = {
        "version": deeplabzoo.__version__,
        "tensors": tensors_sha256(net),
        "config": net.config.to_dict(),
        "classes": [net.classes, net.palette],
        "preprocessing": net.preprocessing.to_dict(),
        "tiling": dataclasses.asdict(tiling) if dataclasses.is_dataclass(tiling) else tiling,
        "computed": predictor.computed,
    }
    return _hash(facts)


def compute_stamp(source: Source, settings: str) -> str | None:
    """Return the stamp of a photo's results; None for a photo that cannot be asked when it last changed."""
    try:
        if source.url is not None:
            return _hash([source.url, url_version(source.url), settings])
        status = source.path.stat()
    except (OSError, ImageError):
        return None
    return _hash([source.path.name, status.st_size, status.st_mtime_ns, settings])


def is_up_to_date(job: Job, stamp: str | None, *, alpha: float, legend: bool) -> bool:
    """Whether every file of a job is there and was made of this photo, with these weights and settings."""
    return stamp is not None and all(
        _read_stamp(path, kind) == stamp_for_kind(stamp, kind, alpha, legend) for kind, path in job.files.items()
    )


def _read_stamp(path: Path, kind: Kind) -> str | None:
    try:
        if kind == "json":
            found = json.loads(path.read_bytes())
            return str(found.get(STAMP_KEY)) if isinstance(found, dict) else None
    except (OSError, ValueError, RecursionError):
        return None
    header = read_header(path)
    return None if header is None else header.texts.get(STAMP_KEY)


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
