"""Download a file over HTTP: resumable, verified before it is renamed, never left half-written under its name.

Received bytes are kept in `<name>.part` and the server's ETag in `<name>.part.etag`. An interrupted process leaves both, and
the next one resumes if the server confirms that the file is unchanged (If-Range). When an error is raised both are removed.
"""

import email.utils
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from deeplabzoo.errors import ChangedFileError, DownloadError
from deeplabzoo.hub.manifest import WeightRow
from deeplabzoo.log import logger


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows HTTP redirects, but never from https to another scheme; a HEAD request stays a HEAD request."""

    def http_error_302(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any) -> Any:
        """Follow the redirect; the connection is closed if it is refused."""
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except BaseException:
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Return the redirected request; raises DownloadError for a redirect that leaves https, or HTTP altogether."""
        safe = "https" if req.full_url.startswith("https:") else "http"
        if not newurl.startswith(("https:", f"{safe}:")):
            raise DownloadError(f"{req.full_url} redirects to {newurl}, which is not {safe}; the download was refused.")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and req.get_method() == "HEAD":
            following.method = "HEAD"
        return following


@dataclass(frozen=True)
class ExpectedFile:
    """Published size and hash of a file; None for what the publisher does not state."""

    bytes: int | None = None
    sha256: str | None = None
    sha256_prefix: str | None = None
    git_sha1: str | None = None
    """SHA-1 of git's blob object, which the Hub states for files outside its large-file storage."""

    @classmethod
    def from_row(cls, row: WeightRow) -> Self:
        """Return the published size and hash of a manifest row."""
        return cls(row.bytes, row.sha256, row.sha256_prefix)

    def mismatch_reason(self, path: Path, hash_of: Callable[[Path], str] | None = None) -> str:
        """Return why `path` is not the published file, as a phrase; empty if it is.

        `hash_of` returns the SHA-256 of a file, e.g. from a cache; by default the file is read.
        """
        size = path.stat().st_size
        if self.bytes is not None and size != self.bytes:
            return f"it has {size} bytes, {self.bytes} are published"
        published = self.sha256 or self.sha256_prefix
        if published:
            found = (hash_of or sha256_of)(path)
            if not found.startswith(published):
                return f"its sha256 is {found[: max(12, len(self.sha256_prefix or ''))]}…, published is {published[:12]}…"
        if self.git_sha1 is not None and (found := git_sha1_of(path)) != self.git_sha1:
            return f"its git hash is {found[:12]}…, published is {self.git_sha1[:12]}…"
        return ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1_of(path: Path) -> str:
    """Return the SHA-1 that git names a file's content by, as 40 hexadecimal digits."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


RETRY_DELAYS_S = (0.5, 1.0, 2.0)
"""Delays between attempts; the count restarts whenever an attempt got further than all before it."""
MAX_ATTEMPTS = 100
"""Attempts in all, so that a server that sends a few bytes per attempt cannot keep a download alive for ever."""
MAX_RETRY_AFTER_S = 60.0
"""A longer Retry-After ends the download with an error instead of a wait."""
TIMEOUT_S = 20.0
"""Seconds without data until an attempt counts as failed."""
MIN_BYTES_PER_SECOND, SPEED_WINDOW_S = 1000, 30.0
CHUNK_BYTES = 1 << 20
_HTTP_REASONS = {401: "needs a login", 403: "refuses access", 404: "has no such file", 410: "has no such file any more"}
_TRANSIENT_STATUS_CODES = {408, 425, 429, 500, 502, 503, 504}
_TRANSIENT_ERRORS = (TimeoutError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError, http.client.HTTPException)


class _TransientError(Exception):
    """A failure after which the same request may succeed; `wait_s` is the Retry-After of the server in seconds."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def download(url: str, target: Path, expected: ExpectedFile) -> None:
    """Download `url` to `target`, whose folder exists; the caller holds the lock of `target`.

    Raises:
        DownloadError: The server has no such file, cannot be reached, or sends something else than the published file; nothing
            partial is left.
        OSError: The disk refuses.
    """
    transfer = _Transfer(url, target, expected)
    try:
        resumed = transfer.part.exists()
        transfer.complete()
        mismatch = expected.mismatch_reason(transfer.part)
        if mismatch and resumed:  # the part of the earlier process may be damaged
            transfer.part.unlink()
            transfer.complete()
            mismatch = expected.mismatch_reason(transfer.part)
        if mismatch:
            raise ChangedFileError(f"{url} is not the published file: {mismatch}; it was removed.")
        os.replace(transfer.part, target)
    except (DownloadError, OSError):
        transfer.part.unlink(missing_ok=True)
        raise
    finally:
        if not transfer.part.exists():
            transfer.validator.unlink(missing_ok=True)


class _Transfer:
    """Completes one `.part` file in as many attempts as needed."""

    def __init__(self, url: str, target: Path, expected: ExpectedFile) -> None:
        self.url = url
        self.expected = expected
        self.part = target.with_name(f"{target.name}.part")
        self.validator = target.with_name(f"{target.name}.part.etag")
        self.opener = urllib.request.build_opener(SafeRedirects)

    def complete(self) -> None:
        """Request the rest of the file until it is complete; attempts go on as long as it grows."""
        furthest, failures, attempts = self._bytes_on_disk(), 0, 0
        while self.expected.bytes is None or self._bytes_on_disk() != self.expected.bytes:
            try:
                self._attempt()
                return
            except _TransientError as failure:
                offset, attempts = self._bytes_on_disk(), attempts + 1
                failures = 0 if offset > furthest else failures + 1
                furthest = max(furthest, offset)
                if failures > len(RETRY_DELAYS_S) or attempts >= MAX_ATTEMPTS or failure.wait_s > MAX_RETRY_AFTER_S:
                    raise DownloadError(f"{self.url} could not be downloaded: {failure}; try again later.") from None
                logger.info(f"downloading {self.part.stem}: {failure}; retrying")
                time.sleep(max(failure.wait_s, RETRY_DELAYS_S[max(0, failures - 1)]))

    def _bytes_on_disk(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self) -> None:
        offset = self._bytes_on_disk()
        validator = self.validator.read_text(encoding="latin-1") if offset and self.validator.exists() else ""
        # no compression: published size and hash are those of the file itself
        headers = {"User-Agent": "deeplabzoo", "Accept-Encoding": "identity"}
        if validator:
            headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
        with self._request(headers, offset) as response:
            self._receive(response, offset if validator and _is_resumed(response, offset) else 0)

    def _request(self, headers: dict[str, str], offset: int) -> http.client.HTTPResponse:
        try:
            response: http.client.HTTPResponse = self.opener.open(
                urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT_S
            )
            return response
        except urllib.error.HTTPError as error:
            error.close()
            raise self._http_error(error.code, error.headers.get("Retry-After", "")) from None
        except (OSError, http.client.HTTPException) as error:
            cause = underlying_error(error)
            if offset or isinstance(cause, _TRANSIENT_ERRORS):
                raise _TransientError(f"the connection broke off ({error_text(cause)})") from None
            raise DownloadError(
                f"{self.url} cannot be reached ({error_text(cause)}); check the network connection, or pass a local file "
                "(pretrained='FILE', --weights FILE)."
            ) from None
        except ValueError as error:  # an invalid address, ours or that of a redirect
            raise DownloadError(
                f"{self.url} cannot be downloaded: it leads to no valid address ({error_text(error)})."
            ) from None

    def _http_error(self, status: int, retry_after: str) -> Exception:
        if status == 416:  # the part is longer than the file, or of another version: restart
            self.part.unlink(missing_ok=True)
            return _TransientError("the server refused the remaining range")
        if status in _TRANSIENT_STATUS_CODES:
            wait_s = _retry_after_seconds(retry_after)
            retry_text = f" with Retry-After {wait_s:.0f} s" if wait_s else ""
            return _TransientError(f"the server returned HTTP {status}{retry_text}", wait_s)
        reason = "redirects in a circle or out of the web" if 300 <= status < 400 else _HTTP_REASONS.get(status, "refuses")
        return DownloadError(f"{self.url} cannot be downloaded: the server {reason} (HTTP {status}).")

    def _receive(self, response: http.client.HTTPResponse, start: int) -> None:
        """Write the body of the response to the part, from byte `start` on."""
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isascii() and length.isdigit() else None
        if total is not None and self.expected.bytes is not None and total != self.expected.bytes:
            raise ChangedFileError(
                f"{self.url} is not the published file: it has {total} bytes, {self.expected.bytes} are published."
            )
        if total is None and not response.chunked and self.expected == ExpectedFile():
            raise DownloadError(
                f"{self.url} cannot be downloaded: its length is unknown, so a truncated file could not be noticed."
            )
        if not start:
            self.part.unlink(missing_ok=True)  # even a kill at this point never leaves an old part beside a new ETag
        validator = response.headers.get("ETag", "")
        resumable = bool(validator) and not validator.startswith("W/")
        self.validator.write_text(validator if resumable else "", encoding="latin-1")
        limit = self.expected.bytes
        with self.part.open("r+b" if start else "wb") as file, _progress(self.part.stem, start, total) as bar:
            file.seek(start)
            file.truncate()
            speed = _SpeedMonitor()
            while chunk := _read(response):
                file.write(chunk)
                if speed.is_too_slow(len(chunk)):
                    raise DownloadError(f"{self.url} could not be downloaded: the transfer is too slow; try again later.")
                bar.update(len(chunk))
                if limit is not None and file.tell() > limit:
                    raise ChangedFileError(f"{self.url} is not the published file: it is longer than {limit} bytes.")
            offset = file.tell()
        if total is not None and offset < total:
            raise _TransientError(f"the connection broke off after {offset} of {total} bytes")


def _is_resumed(response: http.client.HTTPResponse, offset: int) -> bool:
    """Whether the response continues exactly after the received bytes; a full response (200) starts at byte 0."""
    if response.status != 206:
        return False
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != offset:
        raise _TransientError("the server sent another range than requested")
    return True


class _SpeedMonitor:
    """Detects transfers below MIN_BYTES_PER_SECOND."""

    def __init__(self) -> None:
        self._since, self._bytes = time.monotonic(), 0

    def is_too_slow(self, new_bytes: int) -> bool:
        """Count received bytes; true at the end of a window of `SPEED_WINDOW_S` with too few of them."""
        self._bytes += new_bytes
        seconds = time.monotonic() - self._since
        if seconds < SPEED_WINDOW_S:
            return False
        few = self._bytes < MIN_BYTES_PER_SECOND * seconds
        self._since, self._bytes = time.monotonic(), 0
        return few


def _retry_after_seconds(retry_after: str) -> float:
    """Return the delay of a Retry-After header (seconds or a date) in seconds; 0 if there is none."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK_BYTES)
    except (http.client.HTTPException, OSError) as error:
        raise _TransientError(f"the connection broke off ({error_text(error)})") from None


def underlying_error(error: BaseException) -> object:
    """Return the underlying error of a URLError."""
    return error.reason if isinstance(error, urllib.error.URLError) else error


def error_text(error: object) -> str:
    """Return a network error in a few words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _progress(name: str, start: int, total: int | None) -> Any:
    from tqdm import tqdm  # imported here to keep `import deeplabzoo` light

    # disable=None: shown in a terminal, silent in logs
    return tqdm(desc=name, initial=start, total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=None, leave=False)
