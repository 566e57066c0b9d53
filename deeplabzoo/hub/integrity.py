"""Check that released files are still available and unchanged: by their servers' headers, or by download, hash and build."""

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from deeplabzoo.errors import ChangedFileError, DownloadError, WeightsError
from deeplabzoo.hub.download import fetch, hub_file_metadata
from deeplabzoo.hub.http_download import TIMEOUT_S, ExpectedFile, SafeRedirects, error_text, underlying_error
from deeplabzoo.hub.manifest import BundledSource, HubSource, UrlSource, WeightRow
from deeplabzoo.offline import offline_switch

MAX_PARALLEL_REQUESTS = 8
"""HTTP requests at the same time."""
_HEAD_UNSUPPORTED = {403, 405, 501}
"""HTTP statuses of servers that refuse HEAD; a GET of one byte is tried instead."""

Status = Literal["ok", "changed", "unreachable"]


@dataclass(frozen=True)
class CheckResult:
    """Result of checking one released file."""

    row: WeightRow
    status: Status
    detail: str

    def __str__(self) -> str:
        return f"{self.status:<11} {self.row.full_name}: {self.detail}"


@dataclass(frozen=True)
class _RemoteFile:
    """What a server states about a file; None for what it does not state."""

    bytes: int | None
    sha256: str | None
    note: str = ""


def check_remote(rows: Sequence[WeightRow]) -> Iterator[CheckResult]:
    """Query the server of each row, several at a time, and yield results in the order of the rows.

    Raises:
        DownloadError: DEEPLABZOO_OFFLINE or HF_HUB_OFFLINE is set.
    """
    _require_online()
    with ThreadPoolExecutor(MAX_PARALLEL_REQUESTS) as pool:
        yield from pool.map(_query, rows)


def check_by_download(rows: Sequence[WeightRow]) -> Iterator[CheckResult]:
    """Fetch, verify and build the network of every row, one after the other.

    What is in the cache is verified and not fetched again, so that a run that was stopped goes on where it was. Raises
    DownloadError where the environment forbids the network.
    """
    _require_online()
    for row in rows:
        result = _query(row)
        yield result if result.status != "ok" else _download_and_build(row)


def _require_online() -> None:
    if switch := offline_switch():
        raise DownloadError(f"{switch} forbids asking any server; unset it to check the released files.")


def _query(row: WeightRow) -> CheckResult:
    try:
        match row.source:
            case BundledSource():
                fetch(row)
                return CheckResult(row, "ok", f"{_size(row.bytes)} on this disk, verified")
            case HubSource(repo=repo, revision=revision, file=file):
                remote = _query_hub(repo, revision, file)
            case UrlSource(url=url):
                remote = _query_server(url)
    except ChangedFileError as error:
        return CheckResult(row, "changed", str(error))
    except DownloadError as error:
        return CheckResult(row, "unreachable", str(error))
    return _compare_with_row(row, remote)


def _compare_with_row(row: WeightRow, remote: _RemoteFile) -> CheckResult:
    expected = ExpectedFile.from_row(row)
    published = expected.sha256 or expected.sha256_prefix
    if remote.bytes is not None and expected.bytes is not None and remote.bytes != expected.bytes:
        return CheckResult(row, "changed", f"{row.source} has {remote.bytes} bytes, {expected.bytes} are published")
    if remote.sha256 is not None and published and not remote.sha256.startswith(published):
        return CheckResult(row, "changed", f"{row.source} has sha256 {remote.sha256[:12]}…, published is {published[:12]}…")
    same = [
        *(["size"] if remote.bytes is not None and expected.bytes is not None else []),
        *(["sha256"] if remote.sha256 is not None and published else []),
    ]
    matches = f"{' and '.join(same)} as published" if same else "available; the server states no size or hash to compare"
    return CheckResult(row, "ok", ", ".join(filter(None, (_size(remote.bytes), matches, remote.note))))


def _query_hub(repo: str, revision: str, file: str) -> _RemoteFile:
    commit, size, etag = hub_file_metadata(repo, file, revision)
    if re.fullmatch(r"[0-9a-f]{40}", revision) and commit not in (None, revision):
        raise ChangedFileError(f"the Hub answers with commit {commit} of {repo}, asked for was {revision}")
    return _RemoteFile(size, _as_sha256(etag))


def _query_server(url: str) -> _RemoteFile:
    try:
        with _request(url, "HEAD") as response:
            return _parse_headers(response, url)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code not in _HEAD_UNSUPPORTED:
            raise _http_error(url, error.code) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: redirected to an invalid address
        raise _unreachable_error(url, error) from None
    try:
        with _request(url, "GET", {"Range": "bytes=0-0"}) as response:
            return _parse_headers(response, url)
    except urllib.error.HTTPError as error:
        error.close()
        raise _http_error(url, error.code) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: redirected to an invalid address
        raise _unreachable_error(url, error) from None


def _request(url: str, method: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    headers = {"User-Agent": "deeplabzoo", "Accept-Encoding": "identity", **(headers or {})}
    opener = urllib.request.build_opener(SafeRedirects)
    response: http.client.HTTPResponse = opener.open(
        urllib.request.Request(url, headers=headers, method=method), timeout=TIMEOUT_S
    )
    return response


def _parse_headers(response: http.client.HTTPResponse, url: str) -> _RemoteFile:
    span = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
    length = span[1] if span else response.headers.get("Content-Length", "")
    moved = "" if response.url == url else f"moved to {response.url}"
    return _RemoteFile(
        int(length) if length.isascii() and length.isdigit() else None, _as_sha256(response.headers.get("ETag")), moved
    )


def _as_sha256(etag: str | None) -> str | None:
    """Return the ETag if it is a SHA-256 (64 hexadecimal digits), else None."""
    value = (etag or "").removeprefix("W/").strip('"')
    return value if re.fullmatch(r"[0-9a-f]{64}", value) else None


def _http_error(url: str, status: int) -> DownloadError:
    return DownloadError(f"{url} is not available: the server returned HTTP {status}")


def _unreachable_error(url: str, error: Exception) -> DownloadError:
    return DownloadError(f"{url} cannot be reached ({error_text(underlying_error(error))})")


def _download_and_build(row: WeightRow) -> CheckResult:
    from deeplabzoo.checkpoints.build import ModelOverrides, build_from_checkpoint
    from deeplabzoo.hub.factory import read_released
    from deeplabzoo.hub.http_download import sha256_of  # torch comes with what follows

    try:
        path = fetch(row)
        net, _ = build_from_checkpoint(read_released(row), None, ModelOverrides())
    except (ChangedFileError, WeightsError) as error:
        return CheckResult(row, "changed", str(error))
    except DownloadError as error:
        return CheckResult(row, "unreachable", str(error))
    parameters = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    sha256 = "sha256 as published" if row.sha256 else f"sha256 {sha256_of(path)} (not in the row)"
    return CheckResult(row, "ok", f"{_size(path.stat().st_size)}, {sha256}, model of {parameters:.2f} M parameters built")


def _size(count: int | None) -> str:
    return f"{count / 1e6:.1f} MB" if count else ""
