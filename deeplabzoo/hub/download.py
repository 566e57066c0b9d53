"""Get a verified local file for a manifest row or a Hub address: bundled, from the Hugging Face Hub, or from a web server.

Files of web servers are cached under `$DEEPLABZOO_CACHE`, else `$XDG_CACHE_HOME/deeplabzoo`, else `~/.cache/deeplabzoo`; those
of the Hub in the Hub's own cache. With `DEEPLABZOO_OFFLINE=1` or `HF_HUB_OFFLINE=1` no network is used.
"""

import contextlib
import hashlib
import inspect
import json
import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from deeplabzoo.errors import ChangedFileError, DownloadError, OutputError
from deeplabzoo.files import write_atomically
from deeplabzoo.hub.http_download import ExpectedFile, download, sha256_of
from deeplabzoo.hub.manifest import BundledSource, HubSource, UrlSource, WeightRow, weights_folder
from deeplabzoo.log import logger
from deeplabzoo.offline import offline_switch

# Hash cache: a file is hashed once per process, and files of our cache folder once at all. A cached hash is valid while path,
# size, inode, device, mtime and ctime are unchanged (a program that alters bytes cannot reset the ctime). Files that changed
# in the last seconds are always hashed, since file systems have coarse clocks. Records on disk are used only for files of the
# cache folder, and only if this user owns them.

_MIN_FILE_AGE_NS = 2_000_000_000
_FOLDER = "hashes"
"""Folder of the records, below the cache folder."""
_FileState = tuple[int, ...]

_hash_cache: dict[tuple[str, _FileState], str] = {}


def read_or_compute_sha256(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits; `cache` is the download cache, which need not exist."""
    path = Path(os.path.realpath(path))
    metadata = _file_state(path)
    if time.time_ns() - max(metadata[-2:]) < _MIN_FILE_AGE_NS:
        return sha256_of(path)
    key = (str(path), metadata)
    if key in _hash_cache:
        return _hash_cache[key]
    cache = Path(os.path.realpath(cache))
    record = cache / _FOLDER / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    is_in_cache = path.is_relative_to(cache)
    sha256 = _read_cached_hash(record, metadata) if is_in_cache else ""
    if not sha256:
        sha256 = sha256_of(path)
        if _file_state(path) != metadata:
            return sha256  # it changed while it was read: the hash belongs to neither state for certain
        if is_in_cache:
            _write(record, metadata, sha256)
    _hash_cache[key] = sha256
    return sha256


def _file_state(path: Path) -> _FileState:
    status = path.stat()
    return (status.st_size, status.st_ino, status.st_dev, status.st_mtime_ns, status.st_ctime_ns)


def _read_cached_hash(record: Path, metadata: _FileState) -> str:
    """Return the recorded hash for this file state; empty if there is none or the record belongs to another user."""
    try:
        if not hasattr(os, "getuid") or record.lstat().st_uid != os.getuid():
            return ""
        found = json.loads(record.read_bytes())
        sha256 = str(found["sha256"])
        return sha256 if tuple(found["facts"]) == metadata and len(sha256) == 64 else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _write(record: Path, metadata: _FileState, sha256: str) -> None:
    text = json.dumps({"facts": metadata, "sha256": sha256})
    with contextlib.suppress(OSError, OutputError):  # a read-only cache works; its files are hashed each time
        record.parent.mkdir(exist_ok=True)
        write_atomically(record, lambda file: file.write(text.encode()))


MAX_SETTINGS_BYTES = 1 << 20
"""Of a JSON file on the Hub; the largest `config.json` and weight index known have some 200 kB."""
_LOCK_LOG_AFTER_S = 3.0
"""Waiting for another process is logged after this time."""


def fetch(row: WeightRow) -> Path:
    """Return the local path of a row's file, downloaded once, with size and hash verified.

    Raises:
        DownloadError: The file is not available or not the published one; nothing partial is left.
    """
    expected = ExpectedFile.from_row(row)
    match row.source:
        case BundledSource(file=file):
            return _bundled(row, weights_folder() / file, expected)
        case HubSource(repo=repo, revision=revision, file=file):
            return fetch_from_hub(repo, file, revision, expected)
        case UrlSource(url=url):
            return _from_url(row, url, expected)


def fetch_from_hub(repo: str, file: str, revision: str | None = None, expected: ExpectedFile | None = None) -> Path:
    """Return the path of a file of a Hub repository at a revision (None: `main`), verified where `expected` says how.

    Where nothing is published, the Hub's own hash counts, which is the name of the blob: the SHA-256 of a large file, the git
    hash of a small one. Raises DownloadError in one sentence, where the Hub's own errors take a page.
    """
    path = _hub_file(repo, file, revision, _size_limit(file, expected))
    if expected is None or expected == ExpectedFile():
        expected = _named_by_hash(path.resolve())
    try:
        mismatch = expected.mismatch_reason(path, cached_sha256)
        if mismatch:
            for name in {path.resolve(), path}:  # the blob and the link to it, so that a wrong file is not found again
                name.unlink(missing_ok=True)
    except FileNotFoundError:  # by another process, for the same reason
        raise DownloadError(f"{_hub_path(repo, file, revision)} was removed while it was verified; try again.") from None
    except OSError as error:
        raise DownloadError(f"{_hub_path(repo, file, revision)} cannot be read: {_cache_error_reason(error)}.") from None
    if mismatch:
        raise ChangedFileError(f"{_hub_path(repo, file, revision)} is not the published file: {mismatch}; it was removed.")
    return path


def _named_by_hash(blob: Path) -> ExpectedFile:
    """Return what the Hub states about a file: its cache names a blob by the ETag, which is a hash of the content."""
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        return ExpectedFile(sha256=blob.name)
    return ExpectedFile(git_sha1=blob.name) if re.fullmatch("[0-9a-f]{40}", blob.name) else ExpectedFile()


def _size_limit(file: str, expected: ExpectedFile | None) -> int | None:
    """Return the bytes after which a transfer from the Hub is broken off; None where nothing is known about the file.

    Beyond the published size there is a margin, so that a slightly longer file is reported by its size.
    """
    if expected is not None and expected.bytes is not None:
        return expected.bytes + MAX_SETTINGS_BYTES
    return MAX_SETTINGS_BYTES if file.endswith(".json") else None


def cache_folder() -> Path:
    """Return the folder of downloaded files; it need not exist."""
    if own := os.environ.get("DEEPLABZOO_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "deeplabzoo"


def cached_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, from the hash cache if the file has not changed."""
    return read_or_compute_sha256(path, cache_folder())


def _bundled(row: WeightRow, path: Path, expected: ExpectedFile) -> Path:
    if not path.is_file():
        raise DownloadError(f"{row.full_name} is bundled with deeplabzoo, but {path} is missing; reinstall deeplabzoo.")
    if mismatch := expected.mismatch_reason(path, cached_sha256):
        raise ChangedFileError(f"{path} is not the file of {row.full_name}: {mismatch}; reinstall deeplabzoo.")
    return path


def _from_url(row: WeightRow, url: str, expected: ExpectedFile) -> Path:
    from filelock import FileLock, Timeout  # imported here, as huggingface_hub below, to keep `import deeplabzoo` light

    cache = cache_folder()
    target = cache / row.full_name / (Path(unquote(urlsplit(url).path)).name or "weights")
    try:
        if _is_verified(target, expected):
            return target
        if switch := offline_switch():
            raise DownloadError(f"{row.full_name} is not in the cache ({target}) and {switch} forbids the download.")
        (cache / "locks").mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / "locks" / f"{row.full_name}.lock")
        try:
            lock.acquire(timeout=_LOCK_LOG_AFTER_S)
        except Timeout:
            logger.info(f"{row.full_name}: another process is downloading it; waiting")
            lock.acquire()
        try:
            if not _is_verified(target, expected):  # else another process has downloaded it
                _download_into(target, url, expected)
        finally:
            lock.release()
    except OSError as error:
        reason = error.strerror or error
        raise DownloadError(f"The cache {cache} cannot be used: {reason}; set DEEPLABZOO_CACHE to another folder.") from error
    return target


def _is_verified(target: Path, expected: ExpectedFile) -> bool:
    try:
        mismatch = expected.mismatch_reason(target, cached_sha256)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if mismatch:
        logger.warning(f"{target} in the cache is damaged ({mismatch}); downloading it again")
        return False
    return True


def _download_into(target: Path, url: str, expected: ExpectedFile) -> None:
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    size = f" ({expected.bytes / 1e6:.1f} MB)" if expected.bytes else ""
    logger.info(f"downloading {url}{size} to {target.parent}")
    try:
        download(url, target, expected)
    finally:
        with contextlib.suppress(OSError):
            target.parent.rmdir()  # succeeds only if the folder is empty


def hub_file_metadata(repo: str, file: str, revision: str) -> tuple[str | None, int | None, str | None]:
    """Query the Hub about a file without downloading it.

    Returns:
        Commit, size in bytes and ETag (the SHA-256 of large files, the git hash of others).

    Raises:
        DownloadError: The Hub cannot be reached or has no such file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        metadata = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
    except Exception as error:  # see _reason
        raise DownloadError(
            f"{_hub_path(repo, file, revision)} cannot be queried: {_hub_error_reason(error, repo, revision)}."
        ) from None
    return metadata.commit_hash, metadata.size, metadata.etag


class HubFileNotFoundError(DownloadError):
    """The repository has no such file at this revision."""


def _hub_file(repo: str, file: str, revision: str | None, limit: int | None) -> Path:
    """Return the path of a file in the Hub's cache, downloaded by the Hub's own client if it is not there."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        if not offline_switch() and not isinstance(try_to_load_from_cache(repo, file, revision=revision), str):
            url = hf_hub_url(repo, file, revision=revision)
            metadata = None
            with contextlib.suppress(Exception):  # the download below fails in the same way, with a better error
                metadata = get_hf_file_metadata(url)
            if metadata is not None:
                _check_announcement(url, metadata.location, metadata.etag)
        options: dict[str, Any] = {}
        if limit is not None and "tqdm_class" in inspect.signature(hf_hub_download).parameters:
            options["tqdm_class"] = _limited_progress(limit)  # the client compares sizes only once all bytes have come
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=bool(offline_switch()), **options))
    except DownloadError as error:
        raise DownloadError(f"{_hub_path(repo, file, revision)} cannot be downloaded: {error}") from None
    except Exception as error:  # see _hub_error_reason
        absent = isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError)
        kind = HubFileNotFoundError if absent else DownloadError
        reason = _hub_error_reason(error, repo, revision)
        raise kind(f"{_hub_path(repo, file, revision)} cannot be downloaded: {reason}.") from None


def _check_announcement(url: str, location: str, etag: str | None) -> None:
    """Raise DownloadError for what the Hub's client would follow or store without looking.

    It follows redirects from https to http, and it uses the ETag as a file name.
    """
    if url.startswith("https:") and not location.startswith("https:"):
        raise DownloadError(f"the server redirects from https to {location.partition(':')[0]}, which is refused.")
    if etag is not None and not re.fullmatch(r"[\w.=+-]+", etag):
        raise DownloadError("the server's ETag is no hash.")


def _limited_progress(limit: int) -> Any:
    """Return a progress bar class that ends a transfer of more than `limit` bytes with DownloadError."""
    from tqdm import tqdm

    class LimitedProgress(tqdm):  # type: ignore[type-arg,unused-ignore]
        received = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.received += int(n or 0)
            if self.received > limit:
                raise DownloadError(f"the server sends more than {limit} bytes.")
            return super().update(n)  # type: ignore[no-untyped-call,no-any-return,unused-ignore]

    return LimitedProgress


def _hub_error_reason(error: Exception, repo: str, revision: str | None) -> str:
    """Return why the Hub client failed, as a phrase.

    The client passes on the exceptions of its HTTP library, which differs between versions; hence the catch-all at the end.
    """
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return f"the repository is gated: accept its terms on https://huggingface.co/{repo} and log in with `hf auth login`"
        case errors.RepositoryNotFoundError():
            return "there is no such repository, or it is private (then log in with `hf auth login`)"
        case errors.RevisionNotFoundError():
            return f"the repository has no revision '{revision}'"
        case errors.LocalEntryNotFoundError():
            if switch := offline_switch():
                return f"it is not in the Hub's cache and {switch} forbids the download"
            return f"the Hub cannot be reached ({_first_line(error.__cause__ or error)}) and the file is not in its cache"
        case errors.EntryNotFoundError():
            return "the repository has no such file at this revision"
        case errors.HFValidationError():
            return _first_line(error)
        case OSError(errno=int()):
            return f"the Hub's cache cannot be used ({_cache_error_reason(error)})"
    return f"{type(error).__name__}, {_first_line(error)}"


def _cache_error_reason(error: OSError) -> str:
    return f"{error.strerror or error}; set HF_HOME to a writable folder"


def _hub_path(repo: str, file: str, revision: str | None) -> str:
    return f"hf-hub:{repo}{f'@{revision}' if revision else ''}/{file}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
