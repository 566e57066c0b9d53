"""Photos and the files to make of each, planned and checked before a network is loaded; imports nothing heavy."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.inference.formats import KINDS, PICTURE_FORMATS, Kind, kind_for
from deeplabzoo.inference.sources import Source
from deeplabzoo.output import ensure_folder
from deeplabzoo.say import say

SUFFIX_IN_FOLDER: dict[Kind, str] = {"overlay": "_overlay.png", "labels": "_labels.png", "json": ".json"}
"""What follows a photo's name in a folder of results."""
_LONGEST_NAME_BYTES = 255 - len("_overlay.png")
"""Common disks take names of 255 bytes."""


@dataclass(frozen=True)
class Job:
    """One photo and the files to make of it."""

    source: Source
    files: dict[Kind, Path]


def is_one_file(out: str) -> bool:
    """Whether `--out` names one file for one photo; anything else is a folder."""
    path = Path(out)
    return not out.endswith(("/", "\\")) and not path.is_dir() and path.suffix.lower() in (*PICTURE_FORMATS, ".json")


def job_into_file(sources: Sequence[Source], out: Path, kinds: Sequence[Kind]) -> Job:
    """Return the job of `--out FILE`: a picture, or JSON, or a picture with its JSON beside it.

    Raises UsageError for more than one photo, more than one picture, or a suffix that cannot hold what was chosen.
    """
    if len(sources) != 1:
        raise UsageError(f"--out '{out}' is one file, but there are {len(sources)} photos; give a folder.")
    if "overlay" in kinds and "labels" in kinds:
        raise UsageError(f"--overlay and --labels are two pictures and --out '{out}' is one file; give a folder.")
    files: dict[Kind, Path] = {}
    for kind in kinds or [kind_for(out)]:
        beside = kind == "json" and len(kinds) > 1 and out.suffix.lower() != ".json"
        files[kind] = out.with_suffix(".json") if beside else out
        kind_for(files[kind], kind)
    return Job(sources[0], files)


def job_into_folder(source: Source, out: Path, kinds: Sequence[Kind]) -> Job:
    """Return the job of a photo whose results go into a folder: those of `kinds`, or all."""
    stem = out / source.name
    name = os.fsencode(stem.name)
    if len(name) > _LONGEST_NAME_BYTES:
        begin = name[: _LONGEST_NAME_BYTES - 17].decode(errors="ignore")
        stem = stem.with_name(f"{begin}-{hashlib.sha256(name).hexdigest()[:16]}")
        say(f"results of '{source.where}' are called '{stem.name}': its own name would be too long with their endings")
    return Job(source, {kind: stem.with_name(stem.name + SUFFIX_IN_FOLDER[kind]) for kind in kinds or KINDS})


def check_files(jobs: Sequence[Job]) -> None:
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
