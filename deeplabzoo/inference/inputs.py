"""Which photos a command line means, and what the results of each are called."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deeplabzoo.data.image_sources import Source
from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.files import ensure_folder
from deeplabzoo.inference.predictor import IMAGE_FORMATS, KINDS, Kind, output_kind
from deeplabzoo.log import logger

if TYPE_CHECKING:
    pass


# Photos that lie behind a URL that fsspec knows: `s3://`, `gs://`, `https://`, `memory://` and others.


# Photos and the files to make of each, planned and checked before a network is loaded; imports nothing heavy.


OUTPUT_SUFFIXES: dict[Kind, str] = {"overlay": "_overlay.png", "labels": "_labels.png", "json": ".json"}
"""What follows a photo's name in a folder of results."""
_MAX_NAME_BYTES = 255 - len("_overlay.png")
"""Common disks take names of 255 bytes."""


@dataclass(frozen=True)
class Job:
    """One photo and the files to make of it."""

    source: Source
    files: dict[Kind, Path]


def is_output_file(out: str) -> bool:
    """Whether `--out` names one file for one photo; anything else is a folder."""
    path = Path(out)
    return not out.endswith(("/", "\\")) and not path.is_dir() and path.suffix.lower() in (*IMAGE_FORMATS, ".json")


def job_for_file(sources: Sequence[Source], out: Path, kinds: Sequence[Kind]) -> Job:
    """Return the job of `--out FILE`: a picture, or JSON, or a picture with its JSON beside it.

    Raises UsageError for more than one photo, more than one picture, or a suffix that cannot hold what was chosen.
    """
    if len(sources) != 1:
        raise UsageError(f"--out '{out}' is one file, but there are {len(sources)} photos; give a folder.")
    if "overlay" in kinds and "labels" in kinds:
        raise UsageError(f"--overlay and --labels are two pictures and --out '{out}' is one file; give a folder.")
    files: dict[Kind, Path] = {}
    for kind in kinds or [output_kind(out)]:
        beside = kind == "json" and len(kinds) > 1 and out.suffix.lower() != ".json"
        files[kind] = out.with_suffix(".json") if beside else out
        output_kind(files[kind], kind)
    return Job(sources[0], files)


def job_for_folder(source: Source, out: Path, kinds: Sequence[Kind]) -> Job:
    """Return the job of a photo whose results go into a folder: those of `kinds`, or all."""
    stem = out / source.name
    name = os.fsencode(stem.name)
    if len(name) > _MAX_NAME_BYTES:
        begin = name[: _MAX_NAME_BYTES - 17].decode(errors="ignore")
        stem = stem.with_name(f"{begin}-{hashlib.sha256(name).hexdigest()[:16]}")
        logger.info(
            f"results of '{source.display_name}' are called '{stem.name}': its own name would be too long with their endings"
        )
    return Job(source, {kind: stem.with_name(stem.name + OUTPUT_SUFFIXES[kind]) for kind in kinds or KINDS})


def prepare_outputs(jobs: Sequence[Job]) -> None:
    """Make the folders of the results, and raise if a result could not be written or would take the place of a photo."""
    photos = {job.source.path.resolve() for job in jobs if job.source.url is None}
    files = [file for job in jobs for file in job.files.values()]
    for file in files:
        if file.resolve() in photos:
            raise UsageError(f"The result '{file}' would overwrite the photo; name another --out.")
        if os.path.isdir(file):
            raise OutputError(f"The result '{file}' cannot be written: a folder of that name is there.")
    for folder in dict.fromkeys(file.parent for file in files):
        ensure_folder(folder)
