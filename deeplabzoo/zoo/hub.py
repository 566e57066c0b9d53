"""The file of a manifest row, on this disk and verified: bundled, from the Hugging Face Hub, or from a web server.

Files of web servers are cached under `$DEEPLABZOO_CACHE`, else `$XDG_CACHE_HOME/deeplabzoo`, else `~/.cache/deeplabzoo`; those
of the Hub in the Hub's own cache. With `DEEPLABZOO_OFFLINE=1` or `HF_HUB_OFFLINE=1` nothing is asked of any network.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from deeplabzoo.errors import ChangedFileError, DownloadError
from deeplabzoo.say import say
from deeplabzoo.zoo.checksum import Expected
from deeplabzoo.zoo.download import download
from deeplabzoo.zoo.known_hashes import known_sha256
from deeplabzoo.zoo.manifest import BundledSource, HubSource, UrlSource, WeightRow, weights_folder

OFFLINE_SWITCHES = ("DEEPLABZOO_OFFLINE", "HF_HUB_OFFLINE")
_PATIENCE_S = 3.0
"""Waiting for another process is said after this."""


def fetch(row: WeightRow) -> Path:
    """Return the path of a row's file after checking its size and hash, downloading it once if it is not here yet.

    Raises DownloadError, in one sentence, and leaves nothing partial, whatever goes wrong.
    """
    expected = Expected.of(row)
    match row.source:
        case BundledSource(file=file):
            return _bundled(row, weights_folder() / file, expected)
        case HubSource(repo=repo, revision=revision, file=file):
            return fetch_from_hub(repo, file, revision, expected)
        case UrlSource(url=url):
            return _from_url(row, url, expected)


def fetch_from_hub(repo: str, file: str, revision: str | None = None, expected: Expected | None = None) -> Path:
    """Return the path of a file of a Hub repository at a revision (None: `main`), verified where `expected` says how.

    Where nothing is published, the Hub's own hash of a large file counts, which is the name of its blob. Raises DownloadError
    in one sentence, where the Hub's own errors take a page.
    """
    path = _hub_file(repo, file, revision)
    if expected is None or expected == Expected():
        expected = _named_by_hash(path.resolve())
    try:
        complaint = expected.complaint(path, sha256_at_hand)
        if complaint:
            for name in {path.resolve(), path}:  # the blob and the link to it: what is wrong must not be found again
                name.unlink(missing_ok=True)
    except FileNotFoundError:  # by another process, for the same reason
        raise DownloadError(f"{_place(repo, file, revision)} was removed while it was checked; try again.") from None
    except OSError as error:
        raise DownloadError(f"{_place(repo, file, revision)} cannot be read: {_unusable(error)}.") from None
    if complaint:
        raise ChangedFileError(f"{_place(repo, file, revision)} is not the published file: {complaint}; it was removed.")
    return path


def _named_by_hash(blob: Path) -> Expected:
    return Expected(sha256=blob.name) if re.fullmatch("[0-9a-f]{64}", blob.name) else Expected()


def cache_folder() -> Path:
    """Return where downloaded files are kept; it need not exist yet."""
    if own := os.environ.get("DEEPLABZOO_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "deeplabzoo"


def sha256_at_hand(path: Path) -> str:
    """Return the SHA-256 of a file, remembered where it was computed before and the file did not change since."""
    return known_sha256(path, cache_folder())


def offline_switch() -> str:
    """Return the environment variable that forbids the network, or an empty string."""
    return next((name for name in OFFLINE_SWITCHES if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")), "")


@contextlib.contextmanager
def hub_obeys_switch() -> Iterator[None]:
    """Hold the Hub client to `DEEPLABZOO_OFFLINE` while other code (timm, for an encoder's weights) uses it.

    The client reads its own switch once, when it is imported.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or bool(offline_switch())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _bundled(row: WeightRow, path: Path, expected: Expected) -> Path:
    if not path.is_file():
        raise DownloadError(f"{row.full_name} should ship with deeplabzoo, but {path} is missing; install deeplabzoo again.")
    if complaint := expected.complaint(path, sha256_at_hand):
        raise ChangedFileError(f"{path} is not the file of {row.full_name}: {complaint}; install deeplabzoo again.")
    return path


def _from_url(row: WeightRow, url: str, expected: Expected) -> Path:
    from filelock import FileLock, Timeout  # here, as huggingface_hub below: listing names must stay instant

    cache = cache_folder()
    target = cache / row.full_name / (Path(unquote(urlsplit(url).path)).name or "weights")
    try:
        if _usable(target, expected):
            return target
        if switch := offline_switch():
            raise DownloadError(f"{row.full_name} is not in the cache ({target}) and {switch} forbids downloading it.")
        (cache / "locks").mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / "locks" / f"{row.full_name}.lock")
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            say(f"{row.full_name}: another process is downloading it; waiting for that one")
            lock.acquire()
        try:
            if not _usable(target, expected):  # else another process was faster
                _download_into(target, url, expected)
        finally:
            lock.release()
    except OSError as error:
        reason = error.strerror or error
        raise DownloadError(f"The cache {cache} cannot be used: {reason}; set DEEPLABZOO_CACHE to another folder.") from error
    return target


def _usable(target: Path, expected: Expected) -> bool:
    try:
        complaint = expected.complaint(target, sha256_at_hand)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if complaint:
        say(f"{target} in the cache is damaged: {complaint}")
        return False
    return True


def _download_into(target: Path, url: str, expected: Expected) -> None:
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    size = f" ({expected.bytes / 1e6:.1f} MB)" if expected.bytes else ""
    say(f"downloading {url}{size} to {target.parent}")
    try:
        download(url, target, expected)
    finally:
        with contextlib.suppress(OSError):
            target.parent.rmdir()  # succeeds only where nothing was kept


def hub_file_facts(repo: str, file: str, revision: str) -> tuple[str | None, int | None, str | None]:
    """Ask the Hub about a file without fetching it: commit, size in bytes and ETag (the sha256 of large files).

    Raises DownloadError in one sentence.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        facts = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
    except Exception as error:  # see _reason
        raise DownloadError(
            f"{_place(repo, file, revision)} cannot be asked about: {_reason(error, repo, revision)}."
        ) from None
    return facts.commit_hash, facts.size, facts.etag


class NoSuchFileError(DownloadError):
    """The repository exists at this revision and does not hold the file."""


def _hub_file(repo: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=bool(offline_switch())))
    except Exception as error:  # see _reason
        absent = isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError)
        kind = NoSuchFileError if absent else DownloadError
        reason = _reason(error, repo, revision)
        raise kind(f"{_place(repo, file, revision)} cannot be downloaded: {reason}.") from None


def _reason(error: Exception, repo: str, revision: str | None) -> str:
    """Return why the Hub's client failed, as a phrase.

    It passes on what its HTTP library raises, and that library has changed three times; so anything may come here.
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
                return f"it is not in the Hub's cache and {switch} forbids downloading it"
            return f"the Hub cannot be reached ({_first_line(error.__cause__ or error)}) and the file is not in its cache"
        case errors.EntryNotFoundError():
            return "the repository has no such file at this revision"
        case errors.HFValidationError():
            return _first_line(error)
        case OSError(errno=int()):
            return f"the Hub's cache cannot be used ({_unusable(error)})"
    return f"{type(error).__name__}, {_first_line(error)}"


def _unusable(error: OSError) -> str:
    return f"{error.strerror or error}; set HF_HOME to a folder that can be written"


def _place(repo: str, file: str, revision: str | None) -> str:
    return f"hf-hub:{repo}{f'@{revision}' if revision else ''}/{file}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
