"""A file from a web server is the published one or is not there: resumed, verified, locked, and never half of it.

asks.md theme H paid for these: hosts that vanished, caches that held half a file, clusters without a network.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.local_server import LocalServer, local_server
from helpers.rows import row

from deeplabzoo.errors import DownloadError
from deeplabzoo.hub import http_download
from deeplabzoo.hub.download import cache_folder, fetch
from deeplabzoo.hub.manifest import UrlSource, WeightRow

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = "/weights/net.tflite"


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with local_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_download, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))


def url_row(url: str, **changes: Any) -> WeightRow:
    return row(source=UrlSource("url", url), **{"bytes": len(CONTENT), "sha256": SHA256, **changes})


def files_left() -> list[str]:
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file() and path.suffix != ".lock")


def fails(row: WeightRow, reason: str) -> None:
    """Fetching ends in one sentence that holds `reason`, and nothing stays in the cache."""
    with pytest.raises(DownloadError, match=reason) as caught:
        fetch(row)
    assert "\n" not in str(caught.value)
    assert files_left() == []


def interrupted_fetch(row: WeightRow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C while the download waits before its second attempt."""

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(http_download.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(row)


def test_a_file_is_downloaded_once_and_then_read_from_the_cache(server: LocalServer) -> None:
    row = url_row(server.serve(FILE, CONTENT))
    path = fetch(row)
    assert path.read_bytes() == CONTENT
    assert path.name == "net.tflite"
    assert fetch(row) == path
    assert len(server.requests) == 1
    assert files_left() == ["net.tflite"]


def test_the_cache_serves_without_a_network(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster node without a network uses what was fetched before (Deci-AI/super-gradients#1880)."""
    row = url_row(server.serve(FILE, CONTENT))
    path = fetch(row)
    monkeypatch.setenv("DEEPLABZOO_OFFLINE", "1")
    assert fetch(row) == path
    assert len(server.requests) == 1


@pytest.mark.parametrize("switch", ["DEEPLABZOO_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_means_no_request_at_all(server: LocalServer, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    row = url_row(server.serve(FILE, CONTENT))
    monkeypatch.setenv(switch, "1")
    fails(row, f"not in the cache .* and {switch} forbids")
    assert server.requests == []


def test_a_cut_connection_is_resumed_where_it_broke(server: LocalServer) -> None:
    """The second request asks for the rest alone, on condition that the file is still the same."""
    row = url_row(server.serve(FILE, CONTENT, faults=["cut:300000", "cut:200000"]))
    assert fetch(row).read_bytes() == CONTENT
    ranges = [request.headers.get("Range") for request in server.asked("GET")]
    assert ranges == [None, "bytes=300000-", "bytes=500000-"]
    assert server.requests[1].headers["If-Range"] == server.files[FILE].validator


def test_an_interrupted_process_leaves_what_the_next_one_resumes(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C half-way through a large file costs only the other half."""
    row = url_row(server.serve(FILE, CONTENT, faults=["cut:300000"]))
    interrupted_fetch(row, monkeypatch)
    assert files_left() == ["net.tflite.part", "net.tflite.part.etag"]
    assert fetch(row).read_bytes() == CONTENT
    assert server.requests[-1].headers["Range"] == "bytes=300000-"
    assert files_left() == ["net.tflite"]


def test_a_file_that_changed_meanwhile_is_fetched_again(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions are never spliced: If-Range makes the server send the whole new file."""
    other = bytes(len(CONTENT))
    row = url_row(server.serve(FILE, other, faults=["cut:300000"]))
    interrupted_fetch(row, monkeypatch)
    server.serve(FILE, CONTENT)
    assert fetch(row).read_bytes() == CONTENT


def test_a_damaged_beginning_is_not_resumed_for_ever(server: LocalServer) -> None:
    """Power loss may leave a part of the right length with wrong bytes in it: then the file is fetched whole, once."""
    row = url_row(server.serve(FILE, CONTENT))
    folder = cache_folder() / row.full_name
    folder.mkdir(parents=True)
    (folder / "net.tflite.part").write_bytes(bytes(1000))
    (folder / "net.tflite.part.etag").write_text(server.files[FILE].validator)
    assert fetch(row).read_bytes() == CONTENT
    assert [request.headers.get("Range") for request in server.requests] == ["bytes=1000-", None]


@pytest.mark.parametrize("how", [{"ranges": False}, {"etag": ""}, {"etag": 'W/"weak"'}])
def test_servers_that_cannot_resume_are_asked_for_the_whole_file(server: LocalServer, how: dict[str, Any]) -> None:
    row = url_row(server.serve(FILE, CONTENT, faults=["cut:300000"], **how))
    assert fetch(row).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_busy_server_is_retried(server: LocalServer) -> None:
    row = url_row(server.serve(FILE, CONTENT, faults=["503", "429", "cut:0"]))
    assert fetch(row).read_bytes() == CONTENT
    assert len(server.requests) == 4


def test_a_server_that_stays_busy_ends_in_a_sentence(server: LocalServer) -> None:
    fails(url_row(server.serve(FILE, CONTENT, faults=["503"] * 9)), "the server returned HTTP 503; try again later")
    assert len(server.requests) == len(http_download.RETRY_DELAYS_S) + 1


def test_a_connection_that_always_breaks_off_ends_in_a_sentence(server: LocalServer) -> None:
    row = url_row(server.serve(FILE, CONTENT, faults=["cut:300000"] * 99, ranges=False))
    fails(row, "broke off after 300000 of 1048576 bytes")


def test_a_wrong_hash_is_refused(server: LocalServer) -> None:
    row = url_row(server.serve(FILE, CONTENT[::-1]))
    fails(row, rf"its sha256 is \w+…, published is {SHA256[:12]}…")


def test_a_published_prefix_is_checked_as_such(server: LocalServer) -> None:
    """Some publishers give 8 digits only: they are compared, not ignored."""
    url = server.serve(FILE, CONTENT)
    fails(url_row(url, sha256=None, sha256_prefix="00000000"), "published is 00000000")
    assert fetch(url_row(url, sha256=None, sha256_prefix=SHA256[:8])).read_bytes() == CONTENT


@pytest.mark.parametrize("length", [0, 1, len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_truncated_or_longer_file_is_refused(server: LocalServer, length: int) -> None:
    row = url_row(server.serve(FILE, (CONTENT + b"more")[:length]))
    fails(row, f"it has {length} bytes, {len(CONTENT)} are published")


@pytest.mark.parametrize(("status", "reason"), [("404", "has no such file"), ("403", "refuses access"), ("410", "any more")])
def test_a_file_that_is_gone_is_named(server: LocalServer, status: str, reason: str) -> None:
    """jeff95.me went down with the weights of a whole repository (jfzhang95#119)."""
    fails(url_row(server.serve(FILE, CONTENT, faults=[status])), rf"{reason}.*\(HTTP {status}\)")
    assert len(server.requests) == 1


def test_no_network_is_named() -> None:
    with local_server() as server:
        url = server.url + FILE
    fails(url_row(url), "cannot be reached .*check the network")


def test_a_redirect_is_followed_but_never_to_a_weaker_scheme(server: LocalServer) -> None:
    server.serve("/elsewhere/net.tflite", CONTENT)
    server.redirects[FILE] = "/elsewhere/net.tflite"
    assert fetch(url_row(server.url + FILE)).read_bytes() == CONTENT
    request = http_download.urllib.request.Request("https://example.org/a")
    with pytest.raises(DownloadError, match="not https"):
        http_download.SafeRedirects().redirect_request(request, None, 302, "", {}, "http://example.org/b")  # type: ignore[arg-type]


def test_a_damaged_cache_is_repaired(server: LocalServer) -> None:
    """What was right when it came may be wrong now: every use is verified."""
    row = url_row(server.serve(FILE, CONTENT))
    path = fetch(row)
    path.write_bytes(bytes(len(CONTENT)))
    assert fetch(row).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_an_unwritable_cache_is_named(server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DEEPLABZOO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match=r"cannot be used: .*set DEEPLABZOO_CACHE to another folder"):
        fetch(url_row(server.serve(FILE, CONTENT)))


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DEEPLABZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "deeplabzoo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "deeplabzoo"


def _fetch_in_process(url: str, cache: str, answers: Any) -> None:
    os.environ["DEEPLABZOO_CACHE"] = cache
    answers.put(str(fetch(url_row(url))))


def test_two_processes_at_once_download_once(server: LocalServer) -> None:
    """The second waits for the first and uses its file."""
    url = server.serve(FILE, CONTENT)
    server.delay_s = 0.5
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_fetch_in_process, args=(url, str(cache_folder()), answers)) for _ in range(2)]
    for process in processes:
        process.start()
    paths = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == CONTENT
    assert len(server.asked("GET")) == 1


def test_downloads_are_logged(server: LocalServer, caplog: pytest.LogCaptureFixture) -> None:
    """One line names the address, the size and where the file goes."""
    caplog.set_level("INFO", "deeplabzoo")
    fetch(url_row(server.serve(FILE, CONTENT)))
    assert f"downloading {server.url}{FILE} (1.0 MB) to {cache_folder()}" in caplog.text
