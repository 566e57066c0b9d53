"""What a result can be written as, and which file names can hold it; imports nothing heavy."""

from pathlib import Path
from typing import Literal

from deeplabzoo.errors import OutputError, UsageError

Kind = Literal["overlay", "labels", "json"]
KINDS: tuple[Kind, ...] = ("overlay", "labels", "json")

PICTURE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Suffix of a picture file -> Pillow's name of the format."""

LOSSLESS_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
"""Where label numbers survive: the other formats blur them, and a label between two others is a third class."""

_MOST_SIDE = {"JPEG": 65500, "WEBP": 16383}
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
"""What counts as a video to read."""


def is_video(path: str | Path) -> bool:
    """Whether a file's name is that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def video_format(path: Path) -> tuple[str, str]:
    """Return container and encoder for a video file to write; raises UsageError for a suffix that has none."""
    if path.suffix.lower() not in VIDEO_FORMATS:
        raise UsageError(f"'{path}' cannot hold a video; use a file name that ends in {', '.join(VIDEO_FORMATS)}.")
    return VIDEO_FORMATS[path.suffix.lower()]


def require_room(path: Path, size: tuple[int, int]) -> None:
    """Raise OutputError where a picture of this width and height is larger than the format of `path` can hold."""
    name = PICTURE_FORMATS[path.suffix.lower()]
    most = _MOST_SIDE.get(name)
    if most is not None and max(size) > most:
        raise OutputError(f"'{path}' cannot hold {size[0]} x {size[1]} pixels: {name} ends at {most} a side; use .png or .tif.")


def kind_for(path: Path, kind: Kind | None = None) -> Kind:
    """Return what to write into `path`: `kind` if its suffix allows it, else what the suffix means; raises UsageError."""
    suffix = path.suffix.lower()
    if kind is None:
        kind = "json" if suffix == ".json" else "overlay"
    if kind not in KINDS:
        raise UsageError(f"Unknown kind {kind!r}; expected 'overlay', 'labels' or 'json'.")
    allowed = {"overlay": tuple(PICTURE_FORMATS), "labels": LOSSLESS_SUFFIXES, "json": (".json",)}[kind]
    if suffix not in allowed:
        why = " (lossy formats change class numbers)" if kind == "labels" and suffix in PICTURE_FORMATS else ""
        raise UsageError(f"'{path}' cannot hold {kind}{why}; use a file name that ends in {', '.join(allowed)}.")
    return kind
