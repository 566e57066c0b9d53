"""Images behind paths, folders, patterns, lists and URLs (`s3://`, `https://` and all other protocols of fsspec)."""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from deeplabzoo.data.image_io import Pixels, read_image_bytes
from deeplabzoo.errors import DeepLabZooError, ImageError, UsageError
from deeplabzoo.optional_imports import require_module

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif")
"""What counts as an image inside a folder. A file that is named itself is read whatever its suffix."""

MAX_REMOTE_BYTES = 2**29
"""Bytes of one remote image that are read at most; larger files are to be downloaded first."""

_URL = re.compile(r"[a-z][a-z0-9+.-]+(://|::)", re.IGNORECASE)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Source:
    """One image, and the name of its results."""

    path: Path
    """Its file; for a URL only a name."""
    name: Path
    """Path of the results without suffix, relative to the folder of results."""
    url: str | None = None
    """Where it is fetched from, if it is no file."""

    @property
    def display_name(self) -> str:
        """The URL or the path, as the user gave it."""
        return self.url or str(self.path)


def find_images(images: Iterable[str], *, recursive: bool = False, out: Path | None = None) -> list[Source]:
    """Return the images that files, folders, patterns, lists and URLs stand for, each once.

    The order is that of `images`; a folder's images are sorted by name.

    Args:
        images: Files; folders; patterns (`*`, `?`, `[a-z]`, `**`) that the shell has not expanded; `.txt` files that list
            images, one a line; URLs that fsspec knows (`s3://bucket/folder`).
        recursive: Search the folders below a folder too; results then keep the folders.
        out: Folder of results, which is never searched.

    Raises:
        ImageError: A folder, pattern, list or URL holds no image.
        UsageError: `out` is the folder of the images.
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
    unique: dict[str, Source] = {}
    for source in found:
        unique.setdefault(source.url or os.path.realpath(source.path), source)
    return _with_unique_names(list(unique.values()))


def is_url(text: str) -> bool:
    """Whether an argument is a URL and not a path on this computer; an existing file is a path, whatever its name.

    >>> is_url("s3://bucket/trip"), is_url("C:/photos/cat.jpg")
    (True, False)
    """
    return _URL.match(text) is not None and not os.path.lexists(text)


def find_urls(url: str, suffixes: tuple[str, ...], *, recursive: bool = False) -> list[tuple[str, Path]]:
    """Return (URL, name of its results) of the images that a URL stands for: one image, a folder or a pattern.

    Raises:
        ImageError: Nothing is found, or the server cannot be reached.
        UsageError: The protocol is unknown or the URL incomplete.
        DeepLabZooError: The protocol's library is not installed.
    """
    files, root = _file_system(url)
    if PurePosixPath(root).suffix.lower() in suffixes and not re.search(r"[*?\[]", root):
        return [(url, Path(PurePosixPath(root).stem))]  # without asking the server: over HTTP that would fetch the image
    if re.search(r"[*?\[]", root):
        found = [(path, PurePosixPath(path).name) for path in sorted(_remote_call(lambda: files.glob(root), url))]
    elif _remote_call(lambda: files.isdir(root), url):
        below = sorted(_remote_call(lambda: files.find(root, maxdepth=None if recursive else 1), url))
        found = [(path, str(PurePosixPath(path).relative_to(root.rstrip("/") or "/"))) for path in below]
    else:
        return [(url, Path(PurePosixPath(root).stem))]
    images = [
        (path, name) for path, name in found if name.lower().endswith(suffixes) and not PurePosixPath(name).name.startswith(".")
    ]
    if not images:
        raise ImageError(f"'{url}' holds no images; looked for {', '.join(suffixes)}.")
    return [(files.unstrip_protocol(path), Path(name).with_suffix("")) for path, name in images]


def read_url(url: str, *, max_pixels: int) -> Pixels:
    """Return the image behind a URL as `read_image` does for a file, H x W x 3 RGB uint8.

    Raises:
        ImageError: It cannot be fetched or read, has more than MAX_REMOTE_BYTES or more than `max_pixels` pixels.
    """
    files, path = _file_system(url)
    data = _remote_call(lambda: _read_limited(files, path), url)
    if len(data) > MAX_REMOTE_BYTES:
        raise ImageError(f"'{url}' has more than {MAX_REMOTE_BYTES // 2**20} MiB; download it and give the file.")
    return read_image_bytes(data, f"'{url}'", max_pixels=max_pixels)


def _read_limited(files: Any, path: str) -> bytes:
    """Return at most one byte more than MAX_REMOTE_BYTES, in blocks, so that no answer of a server fills the memory."""
    blocks, left = [], MAX_REMOTE_BYTES + 1
    # a block size of 0 makes HTTP stream the answer instead of asking for ranges, which servers may refuse
    with files.open(path, "rb", **({"block_size": 0} if "http" in str(files.protocol) else {})) as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            blocks.append(block)
            left -= len(block)
    return b"".join(blocks)


def url_version(url: str) -> str:
    """Return a string that changes when the image behind a URL does, as its file system reports; raises ImageError."""
    files, path = _file_system(url)
    return str(_remote_call(lambda: files.ukey(path), url))


def _file_system(url: str) -> tuple[Any, str]:
    fsspec = require_module("fsspec", extra="remote", purpose="reading URLs")
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DeepLabZooError(
            f"'{url}' needs a library that is not installed ({' '.join(str(error).split()).rstrip('.')}); "
            'for s3:// and https:// it comes with `pip install "deeplabzoo[remote]"`.'
        ) from None
    except FileNotFoundError:
        raise ImageError(f"'{url}' does not exist; check the URL.") from None
    except Exception as error:  # an incomplete URL makes each file system fail in its own way: TypeError, KeyError, ...
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UsageError(f"'{url}' cannot be read: {reason}; check how it begins.") from None
    return files, str(path)


def _remote_call(ask: Callable[[], _T], url: str) -> _T:
    try:
        return ask()
    except FileNotFoundError:
        raise ImageError(f"'{url}' does not exist; check the URL.") from None
    except Exception as error:  # each protocol's library has errors of its own: no route, no permission, no such bucket
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ImageError(f"'{url}' cannot be reached: {reason}.") from None


def _expand_lists(images: Iterable[str]) -> Iterator[str]:
    """Yield the arguments, and in the place of a text file the images that it lists, one a line."""
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
                "expected one image a line."
            ) from None
        if not any(lines):
            raise ImageError(f"The list '{image}' is empty; expected one image a line.")
        yield from filter(None, lines)


def _images_in_folder(folder: Path, recursive: bool, out: Path | None) -> list[Source]:
    if out is not None and out.exists() and out.samefile(folder):
        raise UsageError(
            f"--out is the folder of the images, '{folder}'; choose another, or results would be read as images later."
        )
    skipped = os.path.join(os.path.realpath(out), "") if out is not None else None
    # os.path.realpath, not Path.resolve: the latter raises RuntimeError for a link that leads to itself
    paths = sorted(
        path
        for path in folder.glob("**/*" if recursive else "*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and _is_file_or_broken_link(path)
        and not path.name.startswith(".")
        and not (skipped is not None and os.path.realpath(path).startswith(skipped))
    )
    if not paths:
        below = "" if recursive else " (folders below it are searched with --recursive)"
        raise ImageError(f"The folder '{folder}' has no images{below}; looked for {', '.join(IMAGE_SUFFIXES)}.")
    return [Source(path, path.relative_to(folder).with_suffix("")) for path in paths]


def _is_file_or_broken_link(path: Path) -> bool:
    """Whether a path counts as an image: a broken link does, so that it is named among what could not be read."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _with_unique_names(sources: Sequence[Source]) -> list[Source]:
    """Give images of equal names others: with their folders (`a/cat`, `b/cat`), their suffixes (`cat_jpg`), or a number.

    Names that differ only in case count as equal, as they do on many file systems.
    """
    named = list(sources)
    clashes = _name_collisions(named)
    if not any(clashes):
        return named
    folders = {index: os.path.realpath(named[index].path.parent) for index, clash in enumerate(clashes) if clash}
    common = _common_folder(list(folders.values()))
    for index, folder in folders.items():
        below = Path(os.path.relpath(folder, common)) if common else Path()
        named[index] = replace(named[index], name=below / named[index].path.with_suffix("").name)
    for index, clash in enumerate(_name_collisions(named)):
        if clash:
            one = named[index]
            suffix = one.path.suffix.lstrip(".").lower()
            named[index] = replace(one, name=one.name.with_name(f"{one.name.name}_{suffix}"))
    taken, first = {_name_key(one) for one in named}, set[str]()
    numbers = Counter[str]()
    for index, one in enumerate(named):
        key = _name_key(one)
        while (
            key in first and _name_key(named[index]) in taken
        ):  # the first of equal names keeps it, the others get _2, _3, ...
            numbers[key] += 1
            named[index] = replace(one, name=one.name.with_name(f"{one.name.name}_{numbers[key] + 1}"))
        first.add(key)
        taken.add(_name_key(named[index]))
    return named


def _common_folder(folders: list[str]) -> str:
    try:
        return os.path.commonpath(folders)
    except ValueError:  # on different drives of Windows
        return ""


def _name_key(source: Source) -> str:
    return str(source.name).casefold()


def _name_collisions(sources: Sequence[Source]) -> list[bool]:
    counts = Counter(map(_name_key, sources))
    return [counts[_name_key(source)] > 1 for source in sources]
