"""Archives of data sets: verified, unpacked whole or not at all, and nothing outside their folder is ever touched."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from deeplabzoo.data.download import Archive, extract_folder, fetch_archive
from deeplabzoo.errors import DownloadError, OutputError

FILES = {"outer/data/a.txt": b"alpha", "outer/data/deep/b.txt": b"beta", "outer/other.txt": b"not wanted"}
ROOM = 1000


def tar_of(path: Path, files: dict[str, bytes], *special: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in special:
            tar.addfile(member)
    return path


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_one_folder_is_unpacked_and_nothing_else(tmp_path, make) -> None:
    extract_folder(make(tmp_path / "archive", FILES), "outer/data", tmp_path / "root/data", max_bytes=ROOM)
    assert contents(tmp_path / "root") == {"data/a.txt": b"alpha", "data/deep/b.txt": b"beta"}


@pytest.mark.parametrize("make", [tar_of, zip_of])
@pytest.mark.parametrize("name", ["outer/data/../../../evil", "/outer/data/evil", "outer/data/..\\evil", "../evil", "c:evil"])
def test_names_that_lead_out_are_refused(tmp_path, make, name) -> None:
    """A traversal entry fails the whole archive, and no folder appears."""
    with pytest.raises(DownloadError, match="leads out"):
        extract_folder(make(tmp_path / "archive", FILES | {name: b"x"}), "outer/data", tmp_path / "root/data", max_bytes=ROOM)
    assert contents(tmp_path) == {"archive": (tmp_path / "archive").read_bytes()}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind) -> None:
    member = tarfile.TarInfo("outer/data/link")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(DownloadError, match="link or a device"):
        extract_folder(tar_of(tmp_path / "archive", FILES, member), "outer/data", tmp_path / "data", max_bytes=ROOM)
    assert not (tmp_path / "data").exists()


def test_links_in_zip_files_are_refused(tmp_path) -> None:
    path = zip_of(tmp_path / "archive", FILES)
    with zipfile.ZipFile(path, "a") as zipped:
        link = zipfile.ZipInfo("outer/data/link")
        link.external_attr = 0o120777 << 16
        zipped.writestr(link, "/etc/passwd")
    with pytest.raises(DownloadError, match="link or a device"):
        extract_folder(path, "outer/data", tmp_path / "data", max_bytes=ROOM)


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_a_bomb_is_stopped_at_the_limit(tmp_path, make) -> None:
    """What counts are the bytes that come out, not the size that a header claims; nothing stays behind."""
    path = make(tmp_path / "archive", {"outer/data/zeros": bytes(5_000_000)})
    assert path.stat().st_size < 50_000
    with pytest.raises(DownloadError, match="more than 1000 bytes"):
        extract_folder(path, "outer/data", tmp_path / "data", max_bytes=ROOM)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_a_damaged_archive_leaves_nothing(tmp_path, make) -> None:
    path = make(tmp_path / "archive", {f"outer/data/{i}": bytes(range(256)) * 40 for i in range(20)})
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        path.write_bytes(broken)
        with pytest.raises(DownloadError, match="archive"):
            extract_folder(path, "outer/data", tmp_path / "data", max_bytes=10**6)
        assert list(tmp_path.iterdir()) == [path]


def test_another_archive_and_an_existing_folder_are_named(tmp_path) -> None:
    path = tar_of(tmp_path / "archive", FILES)
    with pytest.raises(DownloadError, match="no folder 'VOCdevkit'"):
        extract_folder(path, "VOCdevkit", tmp_path / "data", max_bytes=ROOM)
    (tmp_path / "data").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        extract_folder(path, "outer/data", tmp_path / "data", max_bytes=ROOM)


def test_a_download_is_verified_before_it_is_opened(tmp_path) -> None:
    """A wrong file is removed and the next call fetches it again; a right one is not fetched twice."""
    good = tar_of(tmp_path / "good", FILES).read_bytes()
    archive = Archive(("http://host/x.tgz",), "x.tgz", hashlib.md5(good).hexdigest(), "outer/data", ROOM)
    served = [b"truncated", good]

    def download(url: str, path: Path) -> None:
        assert url == archive.urls[0]
        path.write_bytes(served.pop(0))

    with pytest.raises(DownloadError, match="md5"):
        fetch_archive(archive, tmp_path / "data", download, archive_dir=tmp_path / "kept")
    assert not (tmp_path / "data").exists()
    fetch_archive(archive, tmp_path / "data", download, archive_dir=tmp_path / "kept")
    fetch_archive(archive, tmp_path / "again", download, archive_dir=tmp_path / "kept")
    assert contents(tmp_path / "again") == contents(tmp_path / "data") == {"a.txt": b"alpha", "deep/b.txt": b"beta"}
    assert served == []


def test_the_next_place_is_tried(tmp_path) -> None:
    """VOC's host is down for weeks at a time (pytorch/vision#2829, #4243, #9269)."""
    content = tar_of(tmp_path / "good", FILES).read_bytes()
    archive = Archive(("http://down/x", "http://up/x"), "x.tgz", hashlib.md5(content).hexdigest(), "outer/data", ROOM)
    asked = []

    def download(url: str, path: Path) -> None:
        asked.append(url)
        if "down" in url:
            raise DownloadError(f"{url} does not answer.")
        path.write_bytes(content)

    fetch_archive(archive, tmp_path / "data", download, archive_dir=tmp_path)
    assert asked == list(archive.urls)
    assert contents(tmp_path / "data")["a.txt"] == b"alpha"
