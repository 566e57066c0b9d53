"""Images behind paths, folders, patterns, lists and URLs (`s3://`, `https://` and whatever else fsspec knows)."""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from deeplabzoo.data.image_io import Pixels
from deeplabzoo.errors import DeepLabZooError, ImageError, UsageError
from deeplabzoo.optional_imports import require_module

_URL = re.compile(r"[a-z][a-z0-9+.-]+(://|::)", re.IGNORECASE)

_T = TypeVar("_T")


def is_url(text: str) -> bool:
    """Whether a word of the command line is a URL and no path of this computer.

    >>> is_url("s3://bucket/trip"), is_url("C:/photos/cat.jpg")
    (True, False)
    """
    return _URL.match(text) is not None


def find_urls(url: str, suffixes: tuple[str, ...], *, recursive: bool = False) -> list[tuple[str, Path]]:
    """Return (URL, name of its results) of the photos that a URL stands for: one photo, a folder or a pattern, by name.

    Raises ImageError where nothing is found or the place cannot be reached, UsageError for an unknown protocol,
    DeepLabZooError for one whose library is missing.
    """
    files, root = _file_system(url)
    if PurePosixPath(root).suffix.lower() in suffixes and not re.search(r"[*?\[]", root):
        return [(url, Path(PurePosixPath(root).stem))]  # not asked for: over HTTP that would fetch it
    if re.search(r"[*?\[]", root):
        found = [(path, PurePosixPath(path).name) for path in sorted(_query(lambda: files.glob(root), url))]
    elif _query(lambda: files.isdir(root), url):
        below = sorted(_query(lambda: files.find(root, maxdepth=None if recursive else 1), url))
        found = [(path, str(PurePosixPath(path).relative_to(root.rstrip("/") or "/"))) for path in below]
    else:
        return [(url, Path(PurePosixPath(root).stem))]
    photos = [
        (path, name) for path, name in found if name.lower().endswith(suffixes) and not PurePosixPath(name).name.startswith(".")
    ]
    if not photos:
        raise ImageError(f"'{url}' holds no photos; looked for {', '.join(suffixes)}.")
    return [(files.unstrip_protocol(path), Path(name).with_suffix("")) for path, name in photos]


def read_url(url: str, *, max_pixels: int) -> "Pixels":
    """Return the photo behind a URL as `read_image` does for a file; raises ImageError where it cannot be fetched or read."""
    from deeplabzoo.data.image_io import read_image_bytes

    files, path = _file_system(url)
    data: bytes = _query(lambda: files.cat_file(path), url)
    return read_image_bytes(data, f"'{url}'", max_pixels=max_pixels)


def url_version(url: str) -> str:
    """Return what changes when the photo behind a URL does, as its file system tells; raises ImageError."""
    files, path = _file_system(url)
    return str(_query(lambda: files.ukey(path), url))


def _file_system(url: str) -> tuple[Any, str]:
    fsspec = require_module("fsspec", extra="remote", purpose="reading URLs")
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DeepLabZooError(
            f"'{url}' needs a library that is not installed ({' '.join(str(error).split()).rstrip('.')}); "
            'for s3:// and https:// it comes with `pip install "deeplabzoo[remote]"`.'
        ) from None
    except ValueError as error:
        raise UsageError(f"'{url}' cannot be read: {' '.join(str(error).split()).rstrip('.')}; check how it begins.") from None
    return files, str(path)


def _query(ask: Callable[[], _T], url: str) -> _T:
    try:
        return ask()
    except FileNotFoundError:
        raise ImageError(f"'{url}' does not exist; check the URL.") from None
    except Exception as error:  # each protocol's library has errors of its own: no route, no right, no such bucket
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ImageError(f"'{url}' cannot be reached: {reason}.") from None


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif")
"""What counts as a photo inside a folder. A file that is named itself is tried whatever its suffix."""


@dataclass(frozen=True)
class Source:
    """One photo, and the name of its results: a path without suffix, relative to the folder of results."""

    path: Path
    name: Path
    url: str | None = None
    """Where it is fetched from, if it is no file; `path` then only names it."""

    @property
    def display_name(self) -> str:
        """What the user calls it: the URL or the path."""
        return self.url or str(self.path)


def find_images(images: Iterable[str], *, recursive: bool = False, out: Path | None = None) -> list[Source]:
    """Return the photos that files, folders, patterns and URLs stand for, each once, in the order given (folders by name).

    A pattern (`*`, `?`, `[a-z]`, `**`) is resolved here when the shell has not done so. Of a folder the photos directly in it
    are taken, with `recursive` those below it too, and then results keep the folders. A text file `.txt` lists photos, one a
    line. URLs are what fsspec knows (`s3://bucket/folder`). `out`, where results will go, is never
    searched. Raises ImageError where nothing is found, UsageError where results would overwrite photos.
    """
    found: list[Source] = []
    for image in _expand_lists(images):
        path = Path(image)
        if "\0" in image:
            raise ImageError(f"'{image}' holds a zero byte, which no file name has; check the list that it comes from.")
        if is_url(image):
            urls = find_urls(image, IMAGE_SUFFIXES, recursive=recursive)
            found += [Source(Path(re.sub(":+/*", "/", url)), name, url) for url, name in urls]
        elif os.path.isdir(path):
            found += _images_in_folder(path, recursive, out)
        elif not os.path.lexists(path) and glob.has_magic(image):
            matches = [match for match in sorted(map(Path, glob.glob(image, recursive=True))) if _is_file_or_broken_link(match)]
            if not matches:
                raise ImageError(f"No file matches the pattern '{image}'; check it, and the folder it starts from.")
            found += [Source(match, Path(match.stem)) for match in matches]
        else:
            found.append(Source(path, Path(path.stem)))
    unique = {source.url or os.path.realpath(source.path): source for source in reversed(found)}
    return _with_unique_names([source for source in found if unique[source.url or os.path.realpath(source.path)] is source])


def _expand_lists(images: Iterable[str]) -> Iterator[str]:
    """Yield the words, and in the place of a text file the photos that it lists, one a line."""
    for image in images:
        path = Path(image)
        if is_url(image) or path.suffix.lower() != ".txt" or not os.path.isfile(path):
            yield image
            continue
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise ImageError(
                f"The list '{image}' cannot be read as UTF-8 text ({getattr(error, 'reason', None) or error}); "
                "expected one photo a line."
            ) from None
        if not any(lines):
            raise ImageError(f"The list '{image}' is empty; expected one photo a line.")
        yield from filter(None, lines)


def _images_in_folder(folder: Path, recursive: bool, out: Path | None) -> list[Source]:
    if out is not None and out.exists() and out.samefile(folder):
        raise UsageError(
            f"--out is the folder of the photos, '{folder}'; name another, or results would be read as photos later."
        )
    skipped = out.resolve() if out is not None else None
    paths = sorted(
        path
        for path in folder.glob("**/*" if recursive else "*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and _is_file_or_broken_link(path)
        and not path.name.startswith(".")
        and not (skipped is not None and skipped in path.resolve().parents)
    )
    if not paths:
        below = "" if recursive else " (folders below it are searched with --recursive)"
        raise ImageError(f"The folder '{folder}' has no photos{below}; looked for {', '.join(IMAGE_SUFFIXES)}.")
    return [Source(path, path.relative_to(folder).with_suffix("")) for path in paths]


def _is_file_or_broken_link(path: Path) -> bool:
    """Whether a path counts as a photo: a link that leads nowhere does, so that it is named among what could not be read."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _with_unique_names(sources: Sequence[Source]) -> list[Source]:
    """Give photos of equal names different ones: with their folders, `a/cat` and `b/cat`, or `cat_jpg` and `cat_png`.

    Names that differ only in case count as equal, as they do on many disks.
    """
    clashing = [one for one, clash in zip(sources, _name_collisions(sources), strict=True) if clash]
    if not clashing:
        return list(sources)
    common = os.path.commonpath([one.path.resolve().parent for one in clashing])
    by_folder = [
        replace(one, name=one.path.resolve().relative_to(common).with_suffix("")) if one in clashing else one for one in sources
    ]
    distinct = [
        _with_suffix_in_name(one) if clash else one for one, clash in zip(by_folder, _name_collisions(by_folder), strict=True)
    ]
    for one, clash in zip(distinct, _name_collisions(distinct), strict=True):
        if clash:
            raise UsageError(f"Results of several photos would be called '{one.name}'; give them different --out folders.")
    return distinct


def _with_suffix_in_name(source: Source) -> Source:
    return replace(source, name=source.name.with_name(f"{source.name.name}_{source.path.suffix.lstrip('.').lower()}"))


def _name_collisions(sources: Sequence[Source]) -> list[bool]:
    keys = [str(source.name).casefold() for source in sources]
    counts = Counter(keys)
    return [counts[key] > 1 for key in keys]
