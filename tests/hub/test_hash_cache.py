"""A file is hashed once while it stays what it was, and an altered one is noticed, however it was altered."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.local_server import LocalServer, local_server
from helpers.rows import row

from deeplabzoo.hub import download
from deeplabzoo.hub.download import cache_folder, fetch, read_or_compute_sha256
from deeplabzoo.hub.manifest import UrlSource

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read to be hashed."""
    seen: list[Path] = []

    def counted(path: Path) -> str:
        seen.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(download, "sha256_of", counted)
    monkeypatch.setattr(download, "_MIN_FILE_AGE_NS", 0)  # these files are all young
    monkeypatch.setattr(download, "_hash_cache", {})
    return seen


def in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_hash_cache", {})


def cached_file() -> Path:
    path = cache_folder() / "net.v1" / "net.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    return path


def test_a_file_in_our_cache_is_hashed_once_at_all(read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again in this process, and not in the next one."""
    path = cached_file()
    assert [read_or_compute_sha256(path, cache_folder()) for _ in range(3)] == [SHA256] * 3
    in_a_new_process(monkeypatch)
    assert read_or_compute_sha256(path, cache_folder()) == SHA256
    assert len(read) == 1


def test_a_file_elsewhere_is_hashed_once_a_process(read: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is noted about files that are not ours."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(CONTENT)
    assert [read_or_compute_sha256(path, cache_folder()) for _ in range(2)] == [SHA256] * 2
    in_a_new_process(monkeypatch)
    assert read_or_compute_sha256(path, cache_folder()) == SHA256
    assert len(read) == 2
    assert not (cache_folder() / "hashes").exists()


def rewritten(path: Path) -> None:
    path.write_bytes(CONTENT[::-1])


def rewritten_with_its_old_time(path: Path) -> None:
    before = path.stat()
    time.sleep(0.02)  # more than a tick of the file system's clock
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(CONTENT[::-1])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("alter", [rewritten, rewritten_with_its_old_time, replaced])
@pytest.mark.parametrize("new_process", [False, True])
def test_an_altered_file_is_noticed(
    alter: Callable[[Path], None], new_process: bool, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same size, even the same time of change: the inode or its own time tells."""
    path = cached_file()
    assert read_or_compute_sha256(path, cache_folder()) == SHA256
    time.sleep(0.02)
    alter(path)
    if new_process:
        in_a_new_process(monkeypatch)
    assert read_or_compute_sha256(path, cache_folder()) == hashlib.sha256(CONTENT[::-1]).hexdigest()


def test_what_has_just_been_written_is_always_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tick of the clock two states of a file look alike."""
    seen: list[Path] = []
    monkeypatch.setattr(download, "sha256_of", lambda path: seen.append(path) or SHA256)
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    for _ in range(3):
        read_or_compute_sha256(path, tmp_path)
    assert len(seen) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"sha256": 3}', '{"facts": [1], "sha256": "00"}'])
def test_a_damaged_note_is_not_believed(damage: str, read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the file is read."""
    path = cached_file()
    read_or_compute_sha256(path, cache_folder())
    (note,) = (cache_folder() / "hashes").iterdir()
    note.write_text(damage)
    in_a_new_process(monkeypatch)
    assert read_or_compute_sha256(path, cache_folder()) == SHA256
    assert len(read) == 2


def test_a_note_of_somebody_else_is_not_believed(read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared machine the cache may be a folder that others write to."""
    path = cached_file()
    read_or_compute_sha256(path, cache_folder())
    (note,) = (cache_folder() / "hashes").iterdir()
    note.write_text(json.dumps(json.loads(note.read_text()) | {"sha256": "0" * 64}))
    in_a_new_process(monkeypatch)
    monkeypatch.setattr(os, "getuid", lambda: note.stat().st_uid + 1)
    assert read_or_compute_sha256(path, cache_folder()) == SHA256


def test_a_download_that_was_altered_is_fetched_again(read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: fetched, remembered, altered with its old time put back, noticed, fetched again."""
    with local_server() as server:
        assert isinstance(server, LocalServer)
        source = UrlSource("url", server.serve("/net.safetensors", CONTENT))
        wanted = row(source=source, bytes=len(CONTENT), sha256=SHA256)
        path = fetch(wanted)
        fetch(wanted)
        fetch(wanted)
        assert len(read) == 1
        rewritten_with_its_old_time(path)
        in_a_new_process(monkeypatch)
        assert fetch(wanted).read_bytes() == CONTENT
        assert len(server.requests) == 2
