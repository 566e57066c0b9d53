"""Many images to files, in one process or several that each keep a loaded model, and stamps that mark finished results.

A result appears whole or not at all and carries a stamp: a hash of the image's path and content, the weights and every setting
that labels depend on. It stands in the text of a PNG and in the JSON. Files with another stamp, or none, are computed again.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
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
from deeplabzoo.files import remove_orphaned_files
from deeplabzoo.inference.inputs import STAMP_KEY, Job, Kind, stamp_for_kind
from deeplabzoo.inference.large_predict import LargeResult, is_streamed, predict_to_files
from deeplabzoo.inference.predictor import Predictor, Result
from deeplabzoo.inference.visualization import areas_summary

MAX_PREFETCH_PIXELS = 32_000_000
"""Size up to which an image may wait in memory beside another one."""


@dataclass(frozen=True)
class OutputOptions:
    """What holds for every image of a run."""

    alpha: float
    """Weight of the class colours in overlays, 0...1."""
    legend: bool
    """Whether overlays have a legend."""
    facts: Mapping[str, Any]
    """Entries of the JSON beside the areas: model, weights, device."""
    settings: str | None = None
    """`settings_hash` of the predictor, from which stamps are computed; None writes no stamps."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one image."""

    job: Job
    line: str
    """What was found and where it was written, or the error."""
    failed: bool = False


@dataclass(frozen=True)
class _LoadedImage:
    """An image that was read, with its stamp."""

    image: Pixels | Path | ImageError | None
    """Pixels; the path of a file with other than 1 or 3 channels; the error; None if it goes from file to file."""
    stamp: str | None


def label_image_file(predictor: Predictor, job: Job, options: OutputOptions) -> Outcome:
    """Label one image and write its files with its stamp; an image that cannot be read is an outcome, not an error."""
    return _predict_one(predictor, job, options, _load(predictor, job.source, options))()


def label_image_files(
    predictor: Predictor, jobs: Sequence[Job], options: OutputOptions, *, workers: int = 1
) -> Iterator[Outcome]:
    """Label images and write their files, in this process or several, which share its threads.

    Args:
        predictor: The model; it is pickled to worker processes.
        jobs: Images and the files to write for them.
        options: What holds for all of them.
        workers: Number of processes.

    Yields:
        The outcome of each image as soon as its files are written.

    Raises:
        DeepLabZooError: A worker process was killed. Finished files remain, and the same call computes the rest.
        OutputError: A file cannot be written.
    """
    if workers == 1 or len(jobs) < 2:
        yield from _label_in_process(predictor, jobs, options)
        return
    workers = min(workers, len(jobs))
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a forked process would share the threads and the GPU of this one
        initializer=_init_worker,
        initargs=(pickle.dumps(predictor), options, max(1, torch.get_num_threads() // workers)),
    )
    try:
        for future in as_completed([pool.submit(_label_in_worker, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool:
        raise DeepLabZooError(
            "A worker process was killed, perhaps because memory ran out; what it finished is kept, and the same command "
            "computes the rest (fewer --workers need less memory)."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _label_in_process(predictor: Predictor, jobs: Sequence[Job], options: OutputOptions) -> Iterator[Outcome]:
    """Yield the outcomes in order; the next image is read, and the last one's files are written, while the model runs.

    Decoding and compressing release Python's lock, so one thread for each suffices. Beside a large image nothing else is held.
    """
    reader, writer = (ThreadPoolExecutor(1, f"deeplabzoo-{role}") for role in ("reader", "writer"))
    coming: Future[_LoadedImage] | None = None
    written: Future[Outcome] | None = None
    try:
        for index, job in enumerate(jobs):
            loaded = coming.result() if coming else _load(predictor, job.source, options)
            image = loaded.image
            small = isinstance(image, np.ndarray) and image.shape[0] * image.shape[1] <= MAX_PREFETCH_PIXELS
            prefetch = small and index + 1 < len(jobs)
            coming = reader.submit(_load, predictor, jobs[index + 1].source, options) if prefetch else None
            finish = _predict_one(predictor, job, options, loaded)
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


def _load(predictor: Predictor, source: Source, options: OutputOptions) -> _LoadedImage:
    # the stamp first: of an image that changes meanwhile it is the old one, so the result is computed again next time
    stamp = compute_stamp(source, options.settings) if options.settings is not None else None
    limit = predictor.max_pixels or MAX_PIXELS
    try:
        if source.url is not None:
            return _LoadedImage(read_url(source.url, max_pixels=limit), stamp)
        if predictor.net.config.in_chans not in (1, 3) or source.path.suffix.lower() == ".npy":
            return _LoadedImage(source.path, stamp)
        if is_streamed(predictor, source.path):
            return _LoadedImage(None, stamp)
        return _LoadedImage(read_image(source.path, max_pixels=limit), stamp)
    except ImageError as error:
        return _LoadedImage(error, stamp)


def _predict_one(predictor: Predictor, job: Job, options: OutputOptions, loaded: _LoadedImage) -> Callable[[], Outcome]:
    """Run the model on what was read, and return the function that writes the files and returns the outcome."""
    facts = {"image": job.source.display_name, **options.facts}
    drawing: dict[str, Any] = {"alpha": options.alpha, "legend": options.legend, "facts": facts, "stamp": loaded.stamp}
    result: Result | LargeResult
    image = loaded.image
    try:
        if isinstance(image, ImageError):
            raise image
        result = predictor(image) if image is not None else predict_to_files(predictor, job.source.path, job.files, **drawing)
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
"""In a worker process: its predictor and options, set once by `_init_worker`."""


def _init_worker(packed: bytes, options: OutputOptions, threads: int) -> None:
    global _worker_state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C; workers finish their image
    torch.set_num_threads(threads)
    _worker_state = pickle.loads(packed), options


def _label_in_worker(job: Job) -> Outcome:
    predictor, options = _worker_state
    return label_image_file(predictor, job, options)


def settings_hash(predictor: Predictor) -> str:
    """Return a hash of all that labels depend on but the image: weights, preprocessing, tiles, backend, version.

    The device is not part of it, so a run may be continued on another machine.
    """
    net, tiling = predictor.net, predictor.tiling
    facts = {
        "version": deeplabzoo.__version__,
        "tensors": tensors_sha256(net),
        "config": net.config.to_dict(),
        "classes": [net.classes, net.palette],
        "preprocessing": net.preprocessing.to_dict(),
        "tiling": dataclasses.asdict(tiling) if dataclasses.is_dataclass(tiling) else tiling,
        "computed": predictor.backend,
    }
    return _hash(facts)


def compute_stamp(source: Source, settings: str) -> str | None:
    """Return the stamp of an image's results: a hash of its path, its content (of a URL: its version) and the settings.

    Returns:
        None for an image that cannot be read; its results never count as finished.
    """
    try:
        if source.url is not None:
            return _hash([source.url, url_version(source.url), settings])
        if not os.path.isfile(source.path):  # a pipe would never end
            return None
        with source.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, ImageError):
        return None
    return _hash([os.path.abspath(source.path), content, settings])


def is_up_to_date(job: Job, settings: str, *, alpha: float, legend: bool) -> bool:
    """Whether every file of a job is there and was computed from this image with these weights and settings.

    The image is read only where all files are there and carry one and the same stamp.
    """
    found = {kind: _read_stamp(path, kind) for kind, path in job.files.items()}
    bare = {None if stamp is None else stamp.split(" ")[0] for stamp in found.values()}
    if len(bare) != 1 or None in bare:
        return False
    stamp = compute_stamp(job.source, settings)
    return stamp is not None and all(one == stamp_for_kind(stamp, kind, alpha, legend) for kind, one in found.items())


def remove_partial_outputs(jobs: Sequence[Job]) -> None:
    """Remove what killed processes left half-written beside the files of these jobs."""
    names: dict[Path, set[str]] = {}
    for job in jobs:
        for file in job.files.values():
            names.setdefault(file.parent, set()).add(file.name)
    for folder, files in names.items():
        remove_orphaned_files(folder, files)


def _read_stamp(path: Path, kind: Kind) -> str | None:
    if not path.is_file():
        return None
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
