"""What a result can be written as, and which file names can hold it; imports nothing heavy."""

from pathlib import Path
from typing import Literal

from deeplabzoo.errors import UsageError

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
