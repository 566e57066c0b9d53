"""Whether released files are still there and still the same: asked of their servers, or fetched, verified and built.

Hosts vanish and files are replaced; a maintainer with a network runs this weekly.
"""

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from deeplabzoo.errors import ChangedFileError, DownloadError, WeightsError
from deeplabzoo.zoo.checksum import Expected
from deeplabzoo.zoo.download import TIMEOUT_S, cause_of, words_of
from deeplabzoo.zoo.hub import fetch, hub_file_facts, offline_switch
from deeplabzoo.zoo.manifest import BundledSource, HubSource, UrlSource, WeightRow
from deeplabzoo.zoo.redirects import SafeRedirects

AT_ONCE = 8
"""Servers asked at the same time."""
_NO_QUESTIONS = {403, 405, 501}
"""Statuses by which servers refuse HEAD alone; a GET of one byte is tried then."""

Status = Literal["ok", "changed", "unreachable"]


@dataclass(frozen=True)
class Answer:
    """What became of one released file."""

    row: WeightRow
    status: Status
    detail: str

    def __str__(self) -> str:
        return f"{self.status:<11} {self.row.full_name}: {self.detail}"


@dataclass(frozen=True)
class _Facts:
    """What a server says about a file; None where it says nothing."""

    bytes: int | None
    sha256: str | None
    remark: str = ""


def check(rows: Sequence[WeightRow]) -> Iterator[Answer]:
    """Ask the server of every row about its file, several at a time, and yield the answers in the rows' order.

    Raises DownloadError where the environment forbids the network.
    """
    _require_network()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(_asked, rows)


def check_by_download(rows: Sequence[WeightRow]) -> Iterator[Answer]:
    """Fetch, verify and build the network of every row, one after the other.

    What is in the cache is verified and not fetched again, so that a run that was stopped goes on where it was. Raises
    DownloadError where the environment forbids the network.
    """
    _require_network()
    for row in rows:
        asked = _asked(row)
        yield asked if asked.status != "ok" else _built(row)


def _require_network() -> None:
    if switch := offline_switch():
        raise DownloadError(f"{switch} forbids asking any server; unset it to check the released files.")


def _asked(row: WeightRow) -> Answer:
    try:
        match row.source:
            case BundledSource():
                fetch(row)
                return Answer(row, "ok", f"{_size(row.bytes)} on this disk, verified")
            case HubSource(repo=repo, revision=revision, file=file):
                facts = _facts_from_hub(repo, revision, file)
            case UrlSource(url=url):
                facts = _facts_from_server(url)
    except ChangedFileError as error:
        return Answer(row, "changed", str(error))
    except DownloadError as error:
        return Answer(row, "unreachable", str(error))
    return _compared(row, facts)


def _compared(row: WeightRow, facts: _Facts) -> Answer:
    expected = Expected.of(row)
    published = expected.sha256 or expected.sha256_prefix
    if facts.bytes is not None and expected.bytes is not None and facts.bytes != expected.bytes:
        return Answer(row, "changed", f"{row.source} has {facts.bytes} bytes, {expected.bytes} are published")
    if facts.sha256 is not None and published and not facts.sha256.startswith(published):
        return Answer(row, "changed", f"{row.source} has sha256 {facts.sha256[:12]}…, published is {published[:12]}…")
    same = [
        *(["size"] if facts.bytes is not None and expected.bytes is not None else []),
        *(["sha256"] if facts.sha256 is not None and published else []),
    ]
    proof = f"{' and '.join(same)} as published" if same else "is there; nothing to compare it with was said"
    return Answer(row, "ok", ", ".join(filter(None, (_size(facts.bytes), proof, facts.remark))))


def _facts_from_hub(repo: str, revision: str, file: str) -> _Facts:
    commit, size, etag = hub_file_facts(repo, file, revision)
    if re.fullmatch(r"[0-9a-f]{40}", revision) and commit not in (None, revision):
        raise ChangedFileError(f"the Hub answers with commit {commit} of {repo}, asked for was {revision}")
    return _Facts(size, _as_sha256(etag))


def _facts_from_server(url: str) -> _Facts:
    try:
        with _ask(url, "HEAD") as answer:
            return _facts_of(answer, url)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code not in _NO_QUESTIONS:
            raise _refusal(url, error.code) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: redirected to what is no address
        raise _no_answer(url, error) from None
    try:
        with _ask(url, "GET", {"Range": "bytes=0-0"}) as answer:
            return _facts_of(answer, url)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refusal(url, error.code) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: redirected to what is no address
        raise _no_answer(url, error) from None


def _ask(url: str, method: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    headers = {"User-Agent": "deeplabzoo", "Accept-Encoding": "identity", **(headers or {})}
    opener = urllib.request.build_opener(SafeRedirects)
    answer: http.client.HTTPResponse = opener.open(
        urllib.request.Request(url, headers=headers, method=method), timeout=TIMEOUT_S
    )
    return answer


def _facts_of(answer: http.client.HTTPResponse, url: str) -> _Facts:
    span = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    length = span[1] if span else answer.headers.get("Content-Length", "")
    moved = "" if answer.url == url else f"moved to {answer.url}"
    return _Facts(int(length) if length.isascii() and length.isdigit() else None, _as_sha256(answer.headers.get("ETag")), moved)


def _as_sha256(etag: str | None) -> str | None:
    """Return an ETag that can only be a SHA-256; other servers put anything there."""
    bare = (etag or "").removeprefix("W/").strip('"')
    return bare if re.fullmatch(r"[0-9a-f]{64}", bare) else None


def _refusal(url: str, status: int) -> DownloadError:
    return DownloadError(f"{url} is not given out: the server answers HTTP {status}")


def _no_answer(url: str, error: Exception) -> DownloadError:
    return DownloadError(f"{url} cannot be reached ({words_of(cause_of(error))})")


def _built(row: WeightRow) -> Answer:
    from deeplabzoo.zoo.checksum import sha256_of  # torch comes with what follows
    from deeplabzoo.zoo.fitting import fit
    from deeplabzoo.zoo.weights_file import read_released
    from deeplabzoo.zoo.wishes import Wishes

    try:
        path = fetch(row)
        net, _ = fit(read_released(row), None, Wishes())
    except (ChangedFileError, WeightsError) as error:
        return Answer(row, "changed", str(error))
    except DownloadError as error:
        return Answer(row, "unreachable", str(error))
    parameters = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    sha256 = "sha256 as published" if row.sha256 else f"sha256 {sha256_of(path)} (not in the row)"
    return Answer(row, "ok", f"{_size(path.stat().st_size)}, {sha256}, network of {parameters:.2f} M parameters built")


def _size(count: int | None) -> str:
    return f"{count / 1e6:.1f} MB" if count else ""
