"""Output formats, and the files that are planned for each image before a model is loaded (imports no torch)."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL.PngImagePlugin import PngInfo

from deeplabzoo.data.image_sources import Source
from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.files import ensure_folder
from deeplabzoo.log import logger

Kind = Literal["overlay", "labels", "json"]
KINDS: tuple[Kind, ...] = ("overlay", "labels", "json")

IMAGE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Suffix of an image file -> Pillow's name of the format."""
LOSSLESS_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
"""Formats that keep class numbers; lossy ones blur them, and a number between two others is a third class."""
_MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}
"""Longest side that a format holds, in pixels: the limits of libjpeg and of WebP itself."""

VIDEO_FORMATS = {
    ".mp4": ("mp4", "libx264"),
    ".m4v": ("mp4", "libx264"),
    ".mov": ("mov", "libx264"),
    ".mkv": ("matroska", "libx264"),
    ".webm": ("webm", "libvpx-vp9"),
}
"""Suffix of a video that can be written -> FFmpeg's names of the container and the encoder."""
VIDEO_SUFFIXES = (*VIDEO_FORMATS, ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv", ".3gp")
"""Suffixes of files that are read as videos."""

STAMP_KEY = "made_of"
"""Keyword of the text in a PNG, and key in the JSON, under which a result's stamp stands (`deeplabzoo.inference.batch`)."""

OUTPUT_SUFFIXES: dict[Kind, str] = {"overlay": "_overlay.png", "labels": "_labels.png", "json": ".json"}
"""Appended to an image's name in a folder of results."""
_MAX_NAME_BYTES = 255 - len("_overlay.png")
"""Common file systems take names of 255 bytes."""


def is_video(path: str | Path) -> bool:
    """Whether a file's name is that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def video_format(path: Path) -> tuple[str, str]:
    """Return container and encoder for a video file to write; raises UsageError for a suffix that has none."""
    if path.suffix.lower() not in VIDEO_FORMATS:
        raise UsageError(f"'{path}' cannot hold a video; use a file name that ends in {', '.join(VIDEO_FORMATS)}.")
    return VIDEO_FORMATS[path.suffix.lower()]


def require_size_fits_format(path: Path, size: tuple[int, int]) -> None:
    """Raise OutputError where an image of this width and height is larger than the format of `path` can hold."""
    name = IMAGE_FORMATS[path.suffix.lower()]
    most = _MAX_SIDE.get(name)
    if most is not None and max(size) > most:
        raise OutputError(
            f"'{path}' cannot hold {size[0]} x {size[1]} pixels: {name} is limited to {most} a side; use .png or .tif."
        )


def output_kind(path: Path, kind: Kind | None = None) -> Kind:
    """Return what to write into `path`: `kind` if the suffix allows it, by default what the suffix means; raises UsageError."""
    suffix = path.suffix.lower()
    if kind is None:
        kind = "json" if suffix == ".json" else "overlay"
    if kind not in KINDS:
        raise UsageError(f"Unknown kind {kind!r}; expected 'overlay', 'labels' or 'json'.")
    allowed = {"overlay": tuple(IMAGE_FORMATS), "labels": LOSSLESS_SUFFIXES, "json": (".json",)}[kind]
    if suffix not in allowed:
        why = " (lossy formats change class numbers)" if kind == "labels" and suffix in IMAGE_FORMATS else ""
        raise UsageError(f"'{path}' cannot hold {kind}{why}; use a file name that ends in {', '.join(allowed)}.")
    return kind


def stamp_for_kind(stamp: str, kind: Kind, alpha: float, legend: bool) -> str:
    """Return the stamp as a file of this kind carries it: an overlay also depends on how it is drawn."""
    return f"{stamp} alpha {alpha:g}{' legend' if legend else ''}" if kind == "overlay" else stamp


def png_stamp_metadata(stamp: str) -> PngInfo:
    """Return the text chunk that Pillow writes into a PNG for a stamp."""
    info = PngInfo()
    info.add_text(STAMP_KEY, stamp)
    return info


@dataclass(frozen=True)
class Job:
    """One image and the files to write for it."""

    source: Source
    files: dict[Kind, Path]


def is_output_file(out: str) -> bool:
    """Whether `--out` names one file for one image; anything else is a folder."""
    path = Path(out)
    return not out.endswith(("/", "\\")) and not path.is_dir() and path.suffix.lower() in (*IMAGE_FORMATS, ".json")


def job_for_file(sources: Sequence[Source], out: Path, kinds: Sequence[Kind]) -> Job:
    """Return the job of `--out FILE`: an overlay or label image, JSON, or an image with its JSON beside it.

    Raises:
        UsageError: There is more than one input image or output image, or the suffix cannot hold the chosen kind.
    """
    if len(sources) != 1:
        raise UsageError(f"--out '{out}' is one file, but there are {len(sources)} images; give a folder.")
    if "overlay" in kinds and "labels" in kinds:
        raise UsageError(f"--overlay and --labels are two images and --out '{out}' is one file; give a folder.")
    files: dict[Kind, Path] = {}
    for kind in kinds or [output_kind(out)]:
        beside = kind == "json" and len(kinds) > 1 and out.suffix.lower() != ".json"
        files[kind] = out.with_suffix(".json") if beside else out
        output_kind(files[kind], kind)
    return Job(sources[0], files)


def job_for_folder(source: Source, out: Path, kinds: Sequence[Kind]) -> Job:
    """Return the job of an image whose results go into a folder: those of `kinds`, or all kinds where it is empty."""
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
    """Create the folders of the results.

    Raises:
        UsageError: A result would overwrite one of the images.
        OutputError: A result cannot be written.
    """
    images = {os.path.realpath(job.source.path) for job in jobs if job.source.url is None}
    files = [file for job in jobs for file in job.files.values()]
    for file in files:
        if os.path.realpath(file) in images:
            raise UsageError(f"The result '{file}' would overwrite the image; choose another --out.")
        if os.path.isdir(file):
            raise OutputError(f"The result '{file}' cannot be written: a folder of that name is there.")
    for folder in dict.fromkeys(file.parent for file in files):
        ensure_folder(folder)
