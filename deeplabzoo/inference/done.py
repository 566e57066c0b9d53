"""Which results were made before: each file says itself what it was made of, so no list of them can be wrong or lost.

A result appears whole or not at all, and carries a stamp: a hash of the photo's state, the weights' numbers and every setting
that a label depends on. It stands in the text of a PNG and in the JSON. Files of another stamp, or of none, are made again.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import deeplabzoo
from deeplabzoo.data.images import read_header
from deeplabzoo.errors import ImageError
from deeplabzoo.inference.formats import Kind
from deeplabzoo.inference.jobs import Job
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.remote import url_state
from deeplabzoo.inference.report import tensors_sha256
from deeplabzoo.inference.sources import Source
from deeplabzoo.inference.stamp import STAMP_KEY, drawn


def settings_of(predictor: Predictor) -> str:
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


def stamp_of(source: Source, settings: str) -> str | None:
    """Return the stamp of a photo's results; None for a photo that cannot be asked when it last changed."""
    try:
        if source.url is not None:
            return _hash([source.url, url_state(source.url), settings])
        status = source.path.stat()
    except (OSError, ImageError):
        return None
    return _hash([source.path.name, status.st_size, status.st_mtime_ns, settings])


def is_done(job: Job, stamp: str | None, *, alpha: float, legend: bool) -> bool:
    """Whether every file of a job is there and was made of this photo, with these weights and settings."""
    return stamp is not None and all(
        _stamp_in(path, kind) == drawn(stamp, kind, alpha, legend) for kind, path in job.files.items()
    )


def _stamp_in(path: Path, kind: Kind) -> str | None:
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
