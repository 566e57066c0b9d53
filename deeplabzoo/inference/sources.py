"""Which photos a command line means, and what the results of each are called."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deeplabzoo.errors import ImageError, UsageError
from deeplabzoo.inference.remote import find_urls, is_url

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif")
"""What counts as a photo inside a folder. A file that is named itself is tried whatever its suffix."""


@dataclass(frozen=True)
class Source:
    """One photo, and the name of its results: a path without suffix, relative to the folder of results."""

    path: Path
    name: Path
    url: str | None = None
    """Where it is fetched from, if it is no file; `path` then only names it."""

    @property
    def where(self) -> str:
        """What the user calls it: the URL or the path."""
        return self.url or str(self.path)


def find_photos(images: Iterable[str], *, recursive: bool = False, out: Path | None = None) -> list[Source]:
    """Return the photos that files, folders, patterns and URLs stand for, each once, in the order given (folders by name).

    A pattern (`*`, `?`, `[a-z]`, `**`) is resolved here when the shell has not done so. Of a folder the photos directly in it
    are taken, with `recursive` those below it too, and then results keep the folders. A text file `.txt` lists photos, one a
    line. URLs are what fsspec knows (`s3://bucket/folder`). `out`, where results will go, is never
    searched. Raises ImageError where nothing is found, UsageError where results would overwrite photos.
    """
    found: list[Source] = []
    for image in _with_lists(images):
        path = Path(image)
        if "\0" in image:
            raise ImageError(f"'{image}' holds a zero byte, which no file name has; check the list that it comes from.")
        if is_url(image):
            urls = find_urls(image, PHOTO_SUFFIXES, recursive=recursive)
            found += [Source(Path(re.sub(":+/*", "/", url)), name, url) for url, name in urls]
        elif os.path.isdir(path):
            found += _in_folder(path, recursive, out)
        elif not os.path.lexists(path) and glob.has_magic(image):
            matches = [match for match in sorted(map(Path, glob.glob(image, recursive=True))) if _is_file_or_broken_link(match)]
            if not matches:
                raise ImageError(f"No file matches the pattern '{image}'; check it, and the folder it starts from.")
            found += [Source(match, Path(match.stem)) for match in matches]
        else:
            found.append(Source(path, Path(path.stem)))
    unique = {source.url or os.path.realpath(source.path): source for source in reversed(found)}
    return _distinct([source for source in found if unique[source.url or os.path.realpath(source.path)] is source])


def _with_lists(images: Iterable[str]) -> Iterator[str]:
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


def _in_folder(folder: Path, recursive: bool, out: Path | None) -> list[Source]:
    if out is not None and out.exists() and out.samefile(folder):
        raise UsageError(
            f"--out is the folder of the photos, '{folder}'; name another, or results would be read as photos later."
        )
    skipped = out.resolve() if out is not None else None
    paths = sorted(
        path
        for path in folder.glob("**/*" if recursive else "*")
        if path.suffix.lower() in PHOTO_SUFFIXES
        and _is_file_or_broken_link(path)
        and not path.name.startswith(".")
        and not (skipped is not None and skipped in path.resolve().parents)
    )
    if not paths:
        below = "" if recursive else " (folders below it are searched with --recursive)"
        raise ImageError(f"The folder '{folder}' has no photos{below}; looked for {', '.join(PHOTO_SUFFIXES)}.")
    return [Source(path, path.relative_to(folder).with_suffix("")) for path in paths]


def _is_file_or_broken_link(path: Path) -> bool:
    """Whether a path counts as a photo: a link that leads nowhere does, so that it is named among what could not be read."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _distinct(sources: Sequence[Source]) -> list[Source]:
    """Give photos of equal names different ones: with their folders, `a/cat` and `b/cat`, or `cat_jpg` and `cat_png`.

    Names that differ only in case count as equal, as they do on many disks.
    """
    clashing = [one for one, clash in zip(sources, _clashes(sources), strict=True) if clash]
    if not clashing:
        return list(sources)
    common = os.path.commonpath([one.path.resolve().parent for one in clashing])
    by_folder = [
        replace(one, name=one.path.resolve().relative_to(common).with_suffix("")) if one in clashing else one for one in sources
    ]
    distinct = [_with_suffix_in_name(one) if clash else one for one, clash in zip(by_folder, _clashes(by_folder), strict=True)]
    for one, clash in zip(distinct, _clashes(distinct), strict=True):
        if clash:
            raise UsageError(f"Results of several photos would be called '{one.name}'; give them different --out folders.")
    return distinct


def _with_suffix_in_name(source: Source) -> Source:
    return replace(source, name=source.name.with_name(f"{source.name.name}_{source.path.suffix.lstrip('.').lower()}"))


def _clashes(sources: Sequence[Source]) -> list[bool]:
    keys = [str(source.name).casefold() for source in sources]
    counts = Counter(keys)
    return [counts[key] > 1 for key in keys]
