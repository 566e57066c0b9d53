"""Whatever a server does: the right file or none, one sentence that says why, and the next call succeeds."""

import hashlib
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from fault_server import Fault, FaultServer, fault_server, within
from helpers.rows import row

from deeplabzoo.errors import DownloadError
from deeplabzoo.hub import download, http_download, integrity
from deeplabzoo.hub.download import cache_folder, fetch
from deeplabzoo.hub.manifest import UrlSource, WeightRow

CONTENT = bytes(range(256)) * 1000
SIZE = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = "/weights/net.pth"
OTHER = CONTENT[::-1]
KNOWN = {"bytes": SIZE, "sha256": SHA256}
UNKNOWN = {"bytes": None, "sha256": None}
"""Some publishers say neither size nor hash."""


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as running:
        running.serve(FILE, CONTENT)
        yield running


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits of the real thing, a hundred times as fast."""
    monkeypatch.setattr(http_download, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(http_download, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(http_download, "SPEED_WINDOW_S", 0.3)
    monkeypatch.setattr(download, "_LOCK_LOG_AFTER_S", 0.1)


def url_row(server: FaultServer, **published: Any) -> WeightRow:
    return row(source=UrlSource("url", server.url + FILE), **{**KNOWN, **published})


def files_left() -> list[str]:
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file() and path.suffix != ".lock")


def gives_the_file(asked: WeightRow) -> None:
    assert fetch(asked).read_bytes() == CONTENT
    assert files_left() == ["net.pth"]


def gives_a_sentence(asked: WeightRow, words: str) -> None:
    """One sentence with these words, and nothing in the cache that could be taken for a file."""
    with pytest.raises(DownloadError, match=words) as caught:
        fetch(asked)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    assert files_left() == []


@pytest.mark.parametrize("published", [KNOWN, UNKNOWN], ids=["published", "unknown"])
@pytest.mark.parametrize("tenth", range(11))
def test_a_file_that_is_cut_at_any_tenth_comes_whole(server: FaultServer, tenth: int, published: dict[str, Any]) -> None:
    """The line breaks at the beginning, at each tenth and behind the last byte; twice."""
    server.faults[FILE] = [Fault(cut_at=SIZE * tenth // 10), Fault(cut_at=SIZE // 20)]
    gives_the_file(url_row(server, **published))


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_retry_after_is_respected(server: FaultServer, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After, in seconds or as a date: asked again earlier, some hosts lock an address out."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    server.faults[FILE] = [Fault(status=status, headers={"Retry-After": one}) for one in ("7", date, "soon")]
    gives_the_file(url_row(server))
    assert waits[0] == 7
    assert 30 < waits[1] <= 40
    assert waits[2] == 0


def test_a_long_retry_after_is_not_waited_for(server: FaultServer) -> None:
    """The sentence says how long, and comes at once."""
    server.faults[FILE] = [Fault(status=429, headers={"Retry-After": "3600"})]
    within(2, lambda: gives_a_sentence(url_row(server), "HTTP 429 with Retry-After 3600 s; try again later"))
    gives_the_file(url_row(server))


@pytest.mark.parametrize(
    "fault",
    [Fault(silent=True), Fault(stall_at=0), Fault(stall_at=SIZE // 2), Fault(stall_at=SIZE - 1)],
    ids=["never answers", "no byte", "half", "all but one byte"],
)
def test_a_stalled_server_costs_a_bounded_time(server: FaultServer, fault: Fault) -> None:
    """One stall is gone past; four in a row end in a sentence, each after the time limit."""
    server.faults[FILE] = [fault]
    within(3, lambda: gives_the_file(url_row(server)))
    fetch(url_row(server)).unlink()
    server.serve(FILE, CONTENT, ranges=False)
    server.faults[FILE] = [fault] * 9
    within(5, lambda: gives_a_sentence(url_row(server), "timed out.*try again later|cannot be reached"))
    server.heal()
    gives_the_file(url_row(server))


def test_a_trickle_is_no_download(server: FaultServer) -> None:
    """A byte now and then keeps every socket alive: what would take weeks ends in a sentence."""
    server.faults[FILE] = [Fault(piece_bytes=1, pause_s=0.05)]
    within(5, lambda: gives_a_sentence(url_row(server), "the transfer is too slow"))
    gives_the_file(url_row(server))


def test_a_slow_line_is_a_download(server: FaultServer) -> None:
    """Slow is not stalled: the file comes, however many time limits it lasts."""
    server.faults[FILE] = [Fault(piece_bytes=SIZE // 40, pause_s=0.03)]
    gives_the_file(url_row(server))


def test_a_byte_an_attempt_ends(server: FaultServer) -> None:
    """Each attempt gets a byte further, so none is in vain; there is a last one all the same."""
    server.faults[FILE] = [Fault(cut_at=1)] * 2 * http_download.MAX_ATTEMPTS
    gives_a_sentence(url_row(server), r"broke off after \d+ of")
    assert len(server.requests) == http_download.MAX_ATTEMPTS
    server.heal()
    gives_the_file(url_row(server))


@pytest.mark.parametrize(
    ("location", "words"),
    [
        (FILE, "redirects in a circle"),
        ("/there", "redirects in a circle"),
        ("ftp://127.0.0.1/net.pth", "which is not http"),
        ("file:///etc/passwd", "out of the web"),
        ("http://[::1/net.pth", "leads to no valid address"),
        (f"http://{'a' * 70}.example/net.pth", "leads to no valid address|cannot be reached"),
    ],
)
def test_a_redirect_to_nowhere_is_a_sentence(server: FaultServer, location: str, words: str) -> None:
    """In a circle, out of the web, or to what is no address."""
    server.redirects |= {FILE: location, "/there": "/back", "/back": "/there"}
    gives_a_sentence(url_row(server), words)
    assert [answer.status for answer in integrity.check_remote([url_row(server)])] == ["unreachable"]
    server.heal()
    gives_the_file(url_row(server))


@pytest.mark.parametrize(
    ("fault", "published", "words"),
    [
        (Fault(body=CONTENT[:-1]), KNOWN, f"{SIZE - 1} bytes, {SIZE} are published"),
        (Fault(body=CONTENT + b"x"), KNOWN, f"{SIZE + 1} bytes, {SIZE} are published"),
        (Fault(body=OTHER), KNOWN, "its sha256 is"),
        (Fault(body=CONTENT[:-1], without=("Content-Length",)), KNOWN, f"it has {SIZE - 1} bytes, {SIZE} are published"),
        (Fault(body=CONTENT * 2, without=("Content-Length",)), KNOWN, f"is longer than {SIZE} bytes"),
        (Fault(body=CONTENT[:-1], headers={"Content-Length": "-5"}), KNOWN, f"it has {SIZE - 1} bytes"),
        (Fault(body=CONTENT[:-1], headers={"Content-Length": "\xb2"}), KNOWN, f"it has {SIZE - 1} bytes"),
        (Fault(cut_at=SIZE // 2, without=("Content-Length",)), UNKNOWN, "its length is unknown"),
    ],
    ids=[
        "short",
        "long",
        "other bytes",
        "short, no length",
        "endless, no length",
        "negative length",
        "no digit",
        "nothing known",
    ],
)
def test_a_download_that_is_not_the_published_file_is_removed(
    server: FaultServer, fault: Fault, published: dict[str, Any], words: str
) -> None:
    """Wrong length, wrong hash, and a length that nobody said."""
    server.faults[FILE] = [fault]
    gives_a_sentence(url_row(server, **published), words)
    gives_the_file(url_row(server, **published))


@pytest.mark.parametrize("cut", [0, SIZE // 2, SIZE - 1])
def test_chunks_that_end_early_are_not_the_file(server: FaultServer, cut: int) -> None:
    """Without a length only the last, empty chunk says that the file is whole."""
    chunked = {"headers": {"Transfer-Encoding": "chunked"}, "without": ("Content-Length",)}
    server.faults[FILE] = [Fault(cut_at=cut, **chunked), Fault(**chunked)]  # type: ignore[arg-type]
    gives_the_file(url_row(server, **UNKNOWN))


def test_a_kill_between_two_versions_splices_nothing(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when the new version's validator is written and the old version's beginning still lies there."""
    folder = cache_folder() / url_row(server).full_name
    folder.mkdir(parents=True)
    (folder / "net.pth.part").write_bytes(OTHER[:1000])
    (folder / "net.pth.part.etag").write_text('"old version"')
    opened = Path.open

    def killed(self: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if self.suffix == ".part" and "b" in mode and mode != "rb":
            raise KeyboardInterrupt
        return opened(self, mode, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(url_row(server, **UNKNOWN))
    gives_the_file(url_row(server, **UNKNOWN))


@pytest.mark.parametrize("etag", ['"a\r\n b"', "\xff\x00", "no quotes", '"'])
def test_a_strange_validator_is_no_crash(server: FaultServer, etag: str) -> None:
    """What a server calls its version goes back to it as it came, or not at all."""
    server.faults[FILE] = [Fault(cut_at=1000, headers={"ETag": etag})] * 2
    gives_the_file(url_row(server))


def test_a_file_that_vanishes_while_it_is_checked_is_fetched(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process found the file damaged and removed it between our look and our reading."""
    path = fetch(url_row(server))
    cached_sha256 = download.cached_sha256

    def vanishing(asked: Path) -> str:
        asked.unlink()
        return cached_sha256(asked)

    with monkeypatch.context() as patched:
        patched.setattr(download, "cached_sha256", vanishing)
        assert fetch(url_row(server)) == path
    gives_the_file(url_row(server))


def _fetch_with_limit(asked: WeightRow, cache: str, bytes_: int, answers: Any) -> None:
    os.environ["DEEPLABZOO_CACHE"] = cache
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
    try:
        answers.put(str(fetch(asked)))
    except DownloadError as error:
        answers.put(str(error))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_disk_that_takes_no_more_is_a_sentence(server: FaultServer, share: float) -> None:
    """Nothing is left of what did not fit, and with room again the file comes."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    asked = url_row(server)
    process = context.Process(target=_fetch_with_limit, args=(asked, str(cache_folder()), int(share * SIZE), answers))
    process.start()
    said = answers.get()
    process.join()
    assert "cannot be used" in said
    assert "set DEEPLABZOO_CACHE to another folder" in said
    assert files_left() == []
    gives_the_file(asked)


def test_kill_9_in_the_middle_costs_half_a_file(server: FaultServer) -> None:
    """No `finally` is run: what is left is a beginning and its validator, and the next fetch asks for the rest."""
    context = multiprocessing.get_context("fork")
    asked = url_row(server)
    process = context.Process(target=_fetch_with_limit, args=(asked, str(cache_folder()), SIZE, context.SimpleQueue()))
    server.faults[FILE] = [Fault(piece_bytes=SIZE // 10, pause_s=0.02, at_byte=(SIZE // 2, lambda: process.kill()))]
    process.start()
    process.join()
    assert process.exitcode == -9
    assert "net.pth" not in files_left()
    gives_the_file(asked)
    assert server.requests[-1].headers.get("Range", "").startswith("bytes=")


def test_the_hubs_own_hash_counts_where_nothing_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob of anybody's repository is named by its hash: bytes that changed on the disk or on the way are noticed."""
    link, blob = tmp_path / FILE[1:], tmp_path / SHA256
    link.parent.mkdir()
    link.symlink_to(blob)
    monkeypatch.setattr(download, "_hub_file", lambda *_: link)
    blob.write_bytes(CONTENT)
    assert download.fetch_from_hub("someone/theirs", "net.pth") == link
    blob.write_bytes(OTHER)
    with pytest.raises(DownloadError, match="its sha256 is"):
        download.fetch_from_hub("someone/theirs", "net.pth")
    assert not blob.exists()
    assert not link.is_symlink()
    with pytest.raises(DownloadError, match="was removed while it was verified; try again"):
        download.fetch_from_hub("someone/theirs", "net.pth")


def test_waiting_for_another_process_is_logged(
    server: FaultServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start that seems to hang says whom it waits for."""
    caplog.set_level("INFO", "deeplabzoo")
    monkeypatch.setattr(http_download, "TIMEOUT_S", 20.0)
    server.faults[FILE] = [Fault(piece_bytes=SIZE // 10, pause_s=0.05)]
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(lambda _: fetch(url_row(server)), range(2)))) == 1
    assert "another process is downloading it" in caplog.text
    assert len(server.asked("GET")) == 1
