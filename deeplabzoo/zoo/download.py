"""One file from a web server: resumed where it was cut, verified before it gets its name, or not there at all.

While the transfer lasts, bytes stand in `<name>.part` and the server's validator (its ETag) in `<name>.part.etag`. A process
that is interrupted leaves both behind, and the next one goes on from there if the server confirms that the file is still the
same. Whenever an error is raised both are removed.
"""

import email.utils
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from deeplabzoo.errors import ChangedFileError, DownloadError
from deeplabzoo.say import say
from deeplabzoo.zoo.checksum import Expected
from deeplabzoo.zoo.redirects import SafeRedirects

PAUSES_S = (0.5, 1.0, 2.0)
"""Waits between attempts; the count starts again whenever an attempt brought the file further than all before it."""
MOST_ATTEMPTS = 100
"""However far each brings it: a server that gives a few bytes a time does not keep anybody for ever."""
LONGEST_WAIT_S = 60.0
"""A server that asks to be left alone for longer (Retry-After) is believed, and not waited for."""
TIMEOUT_S = 20.0
"""Of silence, until an attempt counts as failed."""
LEAST_BYTES_A_SECOND, JUDGED_AFTER_S = 1000, 30.0
CHUNK_BYTES = 1 << 20
_REFUSALS = {401: "needs a login", 403: "refuses access", 404: "has no such file", 410: "has no such file any more"}
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_WORTH_RETRYING = (TimeoutError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError, http.client.HTTPException)


class _PassingError(Exception):
    """A failure after which the same request may succeed; `wait_s` is how long the server wants to be left alone."""

    def __init__(self, words: str, wait_s: float = 0.0) -> None:
        super().__init__(words)
        self.wait_s = wait_s


def download(url: str, target: Path, expected: Expected) -> None:
    """Fetch `url` to `target`, whose folder exists; the caller holds the lock of `target`.

    Raises DownloadError where the server has no such file, cannot be reached, or sends something else than was published,
    and OSError where the disk refuses; in the first case nothing partial is left.
    """
    transfer = _Transfer(url, target, expected)
    try:
        resumed = transfer.part.exists()
        transfer.complete()
        complaint = expected.complaint(transfer.part)
        if complaint and resumed:  # the old beginning may be what is damaged
            transfer.part.unlink()
            transfer.complete()
            complaint = expected.complaint(transfer.part)
        if complaint:
            raise ChangedFileError(f"{url} is not the published file: {complaint}; it was removed.")
        os.replace(transfer.part, target)
    except (DownloadError, OSError):
        transfer.part.unlink(missing_ok=True)
        raise
    finally:
        if not transfer.part.exists():
            transfer.validator.unlink(missing_ok=True)


class _Transfer:
    """The attempts to complete one `.part` file."""

    def __init__(self, url: str, target: Path, expected: Expected) -> None:
        self.url = url
        self.expected = expected
        self.part = target.with_name(f"{target.name}.part")
        self.validator = target.with_name(f"{target.name}.part.etag")
        self.opener = urllib.request.build_opener(SafeRedirects)

    def complete(self) -> None:
        """Ask until the whole file is there, patiently as long as it grows."""
        furthest, failures, attempts = self._held(), 0, 0
        while self.expected.bytes is None or self._held() != self.expected.bytes:
            try:
                self._attempt()
                return
            except _PassingError as failure:
                held, attempts = self._held(), attempts + 1
                failures = 0 if held > furthest else failures + 1
                furthest = max(furthest, held)
                if failures > len(PAUSES_S) or attempts >= MOST_ATTEMPTS or failure.wait_s > LONGEST_WAIT_S:
                    raise DownloadError(f"{self.url} could not be downloaded: {failure}; try again later.") from None
                say(f"downloading {self.part.stem}: {failure}; trying again")
                time.sleep(max(failure.wait_s, PAUSES_S[max(0, failures - 1)]))

    def _held(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self) -> None:
        held = self._held()
        validator = self.validator.read_text(encoding="latin-1") if held and self.validator.exists() else ""
        # no compression: the size and hash published are those of the file itself
        headers = {"User-Agent": "deeplabzoo", "Accept-Encoding": "identity"}
        if validator:
            headers |= {"Range": f"bytes={held}-", "If-Range": validator}
        with self._ask(headers, held) as answer:
            self._receive(answer, held if validator and _continues(answer, held) else 0)

    def _ask(self, headers: dict[str, str], held: int) -> http.client.HTTPResponse:
        try:
            answer: http.client.HTTPResponse = self.opener.open(
                urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT_S
            )
            return answer
        except urllib.error.HTTPError as error:
            error.close()
            raise self._refusal(error.code, error.headers.get("Retry-After", "")) from None
        except (OSError, http.client.HTTPException) as error:
            cause = cause_of(error)
            if held or isinstance(cause, _WORTH_RETRYING):
                raise _PassingError(f"the connection broke off ({words_of(cause)})") from None
            raise DownloadError(
                f"{self.url} cannot be reached ({words_of(cause)}); check the network connection, or name a file that is here "
                "(pretrained='FILE', --weights FILE)."
            ) from None
        except ValueError as error:  # an address, ours or one that a redirect names, that is none
            raise DownloadError(f"{self.url} cannot be downloaded: it leads to no valid address ({words_of(error)}).") from None

    def _refusal(self, status: int, retry_after: str) -> Exception:
        if status == 416:  # what is held is longer than the file, or of another version: begin anew
            self.part.unlink(missing_ok=True)
            return _PassingError("the server refused the range that was left")
        if status in _PASSING:
            wait_s = _seconds(retry_after)
            asks = f" and asks to be left alone for {wait_s:.0f} s" if wait_s else ""
            return _PassingError(f"the server answers {status}{asks}", wait_s)
        reason = "redirects in a circle or out of the web" if 300 <= status < 400 else _REFUSALS.get(status, "refuses")
        return DownloadError(f"{self.url} cannot be downloaded: the server {reason} (HTTP {status}).")

    def _receive(self, answer: http.client.HTTPResponse, start: int) -> None:
        """Append the answer's bytes to the part, from `start` on."""
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isascii() and length.isdigit() else None
        if total is not None and self.expected.bytes is not None and total != self.expected.bytes:
            raise ChangedFileError(
                f"{self.url} is not the published file: it has {total} bytes, {self.expected.bytes} are published."
            )
        if total is None and not answer.chunked and self.expected == Expected():
            raise DownloadError(f"{self.url} cannot be downloaded: nobody says how long the file is, so half of it might pass.")
        if not start:
            self.part.unlink(missing_ok=True)  # never, even if killed here, an old beginning beside a new validator
        validator = answer.headers.get("ETag", "")
        resumable = bool(validator) and not validator.startswith("W/")
        self.validator.write_text(validator if resumable else "", encoding="latin-1")
        limit = self.expected.bytes
        with self.part.open("r+b" if start else "wb") as file, _progress(self.part.stem, start, total) as bar:
            file.seek(start)
            file.truncate()
            pace = _Pace()
            while chunk := _read(answer):
                file.write(chunk)
                if pace.too_slow(len(chunk)):
                    raise DownloadError(f"{self.url} could not be downloaded: it comes too slowly to end; try again later.")
                bar.update(len(chunk))
                if limit is not None and file.tell() > limit:
                    raise ChangedFileError(f"{self.url} is not the published file: it goes on after {limit} bytes.")
            held = file.tell()
        if total is not None and held < total:
            raise _PassingError(f"the connection broke off after {held} of {total} bytes")


def _continues(answer: http.client.HTTPResponse, held: int) -> bool:
    """Whether the answer begins exactly after the bytes that are held; a full file (200) is accepted from its beginning."""
    if answer.status != 206:
        return False
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != held:
        raise _PassingError("the server answered with another range than was asked for")
    return True


class _Pace:
    """How fast bytes come in: a trickle keeps a connection alive for years."""

    def __init__(self) -> None:
        self._since, self._bytes = time.monotonic(), 0

    def too_slow(self, new_bytes: int) -> bool:
        """Count bytes; at the end of each stretch of `JUDGED_AFTER_S` say whether they were too few."""
        self._bytes += new_bytes
        seconds = time.monotonic() - self._since
        if seconds < JUDGED_AFTER_S:
            return False
        few = self._bytes < LEAST_BYTES_A_SECOND * seconds
        self._since, self._bytes = time.monotonic(), 0
        return few


def _seconds(retry_after: str) -> float:
    """Return the wait that a Retry-After header names, in seconds or as a date; 0 where it names none."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read1(CHUNK_BYTES)
    except (http.client.HTTPException, OSError) as error:
        raise _PassingError(f"the connection broke off ({words_of(error)})") from None


def cause_of(error: BaseException) -> object:
    """Return what lies under an error of urllib."""
    return error.reason if isinstance(error, urllib.error.URLError) else error


def words_of(error: object) -> str:
    """Return an error of the network in a few words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _progress(name: str, start: int, total: int | None) -> Any:
    from tqdm import tqdm  # here, since listing names must stay instant

    # disable=None: drawn at a terminal, silent in logs
    return tqdm(desc=name, initial=start, total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=None, leave=False)
