"""Photos that lie behind a URL that fsspec knows: `s3://`, `gs://`, `https://`, `memory://` and others."""

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from deeplabzoo.errors import DeepLabZooError, ImageError, UsageError
from deeplabzoo.inference.optional import require

if TYPE_CHECKING:
    from deeplabzoo.data.images import Pixels

_URL = re.compile(r"[a-z][a-z0-9+.-]+(://|::)", re.IGNORECASE)
_Answer = TypeVar("_Answer")


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
        found = [(path, PurePosixPath(path).name) for path in sorted(_asked(lambda: files.glob(root), url))]
    elif _asked(lambda: files.isdir(root), url):
        below = sorted(_asked(lambda: files.find(root, maxdepth=None if recursive else 1), url))
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
    from deeplabzoo.data.images import read_image_bytes

    files, path = _file_system(url)
    data: bytes = _asked(lambda: files.cat_file(path), url)
    return read_image_bytes(data, f"'{url}'", max_pixels=max_pixels)


def url_state(url: str) -> str:
    """Return what changes when the photo behind a URL does, as its file system tells; raises ImageError."""
    files, path = _file_system(url)
    return str(_asked(lambda: files.ukey(path), url))


def _file_system(url: str) -> tuple[Any, str]:
    fsspec = require("fsspec", extra="remote", purpose="reading URLs")
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


def _asked(ask: Callable[[], _Answer], url: str) -> _Answer:
    try:
        return ask()
    except FileNotFoundError:
        raise ImageError(f"'{url}' does not exist; check the URL.") from None
    except Exception as error:  # each protocol's library has errors of its own: no route, no right, no such bucket
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ImageError(f"'{url}' cannot be reached: {reason}.") from None
