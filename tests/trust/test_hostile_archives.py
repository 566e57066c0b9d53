"""Archives that lead out of their folder, link out of it, unpack to terabytes or lie about themselves leave nothing behind."""

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from fuzz.contract import Target, the_watch

from deeplabzoo.data.download import extract_folder
from deeplabzoo.errors import DataError, DownloadError, OutputError

LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
LIMIT = 1 << 20
"""Unpacked size allowed in these tests, in bytes."""


def unpack(path: Path) -> object:
    return extract_folder(path, "wanted", path.parent / "unpacked", max_bytes=LIMIT)


UNPACK = Target("archives", unpack, list, file_name="data.archive", writes=True, mebibytes=32)


def entry(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data) if fields.get("type", tarfile.REGTYPE) not in (LINK, HARD) else 0
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar(*entries: tuple[tarfile.TarInfo, bytes], **options: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:  # type: ignore[call-overload]
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zipped(files: Mapping[str, bytes], mode: int = 0, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = compression
            archive.writestr(info, data)
    return file.getvalue()


HOSTILE: Mapping[str, Callable[[], bytes]] = {
    "upwards": lambda: tar(entry("wanted/../../evil")),
    "upwards at the end": lambda: tar(entry("wanted/a/..")),
    "absolute": lambda: tar(entry("/etc/evil")),
    "absolute inside": lambda: tar(entry("/wanted/evil")),
    "backslashes": lambda: tar(entry("wanted\\..\\..\\evil")),
    "drive": lambda: tar(entry("C:/evil")),
    "stream of a drive": lambda: tar(entry("wanted/a.txt:evil")),
    "link": lambda: tar(entry("wanted/a", type=LINK, linkname="/etc/passwd")),
    "link, then a file through it": lambda: tar(entry("wanted/a", type=LINK, linkname="../.."), entry("wanted/a/evil")),
    "hard link": lambda: tar(entry("wanted/a", type=HARD, linkname="../../evil")),
    "hard link to a file in it": lambda: tar(entry("wanted/a"), entry("wanted/b", type=HARD, linkname="wanted/a")),
    "pipe": lambda: tar(entry("wanted/a", type=tarfile.FIFOTYPE)),
    "device": lambda: tar(entry("wanted/a", type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
    "block device": lambda: tar(entry("wanted/a", type=tarfile.BLKTYPE, devmajor=8, devminor=0)),
    "a name twice": lambda: tar(entry("wanted/a"), entry("wanted/a", b"other")),
    "a file, then a folder of its name": lambda: tar(entry("wanted/a"), entry("wanted/a/b")),
    "a folder, then a file of its name": lambda: tar(entry("wanted/a/b"), entry("wanted/a")),
    "a name of 5000 letters": lambda: tar(entry("wanted/" + "x" * 5000)),
    "folders 2000 deep": lambda: tar(entry("wanted/" + "d/" * 2000 + "a")),
    "a name that writes on the terminal": lambda: tar(entry("wanted/../\x1b[2J")),
    "a size below 0": lambda: _with_size(b"\xff" * 12),
    "a size beyond the file": lambda: _with_size(b"77777777777\0"),
    "a size of 2 ** 88": lambda: _with_size(b"\x80" + b"\xff" * 11),
    "a size that is no number": lambda: _with_size(b"zzzzzzzzzzz\0"),
    "headers of its own for ever": lambda: tar(entry("wanted/a", b"30 path=wanted/a\n" * 10_000, type=tarfile.XHDTYPE)),
    "a header of 32 MiB": lambda: gzip.compress(tar(entry("x", bytes(1 << 25), type=tarfile.XHDTYPE)), 1),
    "a name of 32 MiB": lambda: gzip.compress(tar(entry("x", b"a" * (1 << 25), type=tarfile.GNUTYPE_LONGNAME)), 1),
    "bomb of gzip": lambda: gzip.compress(_zeros()),
    "bomb of bzip2": lambda: bz2.compress(_zeros()),
    "bomb of xz": lambda: lzma.compress(_zeros()),
    "bomb in front of the folder": lambda: gzip.compress(_zeros("other/a")),
    "bomb in a bomb": lambda: gzip.compress(gzip.compress(_zeros())),
    "zip upwards": lambda: zipped({"wanted/../../evil": b"x"}),
    "zip absolute": lambda: zipped({"/wanted/evil": b"x"}),
    "zip with a link": lambda: zipped({"wanted/a": b"/etc/passwd"}, stat.S_IFLNK | 0o777),
    "zip with a pipe": lambda: zipped({"wanted/a": b""}, stat.S_IFIFO | 0o666),
    "zip with a device": lambda: zipped({"wanted/a": b""}, stat.S_IFCHR | 0o666),
    "zip bomb": lambda: zipped({"wanted/a": bytes(1 << 24)}, compression=zipfile.ZIP_DEFLATED),
    "zip bomb of lzma": lambda: zipped({"wanted/a": bytes(1 << 24)}, compression=zipfile.ZIP_LZMA),
    "zip whose file is longer than it says": lambda: _lying_zip(),
    "zip with a password": lambda: _flagged_zip(0x1),
    "zip of an unknown method": lambda: zipped({"wanted/a": b"x"}).replace(
        struct.pack("<H", 20) + b"\0\0\0\0", b"\x14\0\0\0\x63\0"
    ),
    "zip in a zip": lambda: zipped({"wanted.zip": zipped({"wanted/a": b"x"})}),
    "neither": lambda: b"not an archive at all" * 100,
    "nothing": lambda: b"",
}


def _with_size(field: bytes) -> bytes:
    """A tar whose only entry has this size field, its checksum made right."""
    data = bytearray(tar(entry("wanted/a")))
    data[124:136] = field
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    return bytes(data)


def _zeros(name: str = "wanted/a") -> bytes:
    return tar(entry(name, bytes(1 << 24)))


def _lying_zip() -> bytes:
    """Says 5 bytes in both headers, and its stream goes on."""
    data = zipped({"wanted/a": bytes(3 * LIMIT)}, compression=zipfile.ZIP_DEFLATED)
    return data.replace(struct.pack("<I", 3 * LIMIT), struct.pack("<I", 5))


def _flagged_zip(flag: int) -> bytes:
    data = bytearray(zipped({"wanted/a": b"x" * 20}))
    data[6] |= flag
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= flag
    return bytes(data)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_leaves_nothing(name: str, tmp_path: Path) -> None:
    """One of our own errors, within the stated time and 32 MiB; no folder, no file and no link is left, inside or out."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    broken = the_watch().run(UNPACK, HOSTILE[name](), folder)
    assert broken is None, broken
    assert isinstance(the_watch().outcome, DownloadError | OutputError)
    assert sorted(os.listdir(folder)) == [UNPACK.file_name]
    assert sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*")) == ["a", "a/b", f"a/b/{UNPACK.file_name}"]


def test_what_surrounds_the_wanted_folder_may_be_odd(tmp_path: Path) -> None:
    """A link beside the folder that is wanted is passed over, as the archives of data sets have them."""
    path = tmp_path / "data.tar"
    links = (entry("other/a", type=LINK, linkname="/etc/passwd"), entry("wanted", type=LINK, linkname="/etc"))
    path.write_bytes(tar(*links, entry("wanted/a")))
    unpack(path)
    assert [one.name for one in (tmp_path / "unpacked").iterdir()] == ["a"]


def test_unpacked_files_run_nothing_and_belong_to_nobody_else(tmp_path: Path) -> None:
    """Owner, set-uid and execute bits of the archive are not taken over."""
    path = tmp_path / "data.tar"
    path.write_bytes(tar(entry("wanted/a", mode=0o6777, uid=12345, gid=12345)))
    unpack(path)
    found = (tmp_path / "unpacked" / "a").stat()
    assert found.st_mode & 0o7111 == 0
    assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid())


@pytest.mark.parametrize("target", ["unpacked", "dangling"])
def test_a_link_in_the_place_of_the_target_is_not_followed(target: str, tmp_path: Path) -> None:
    """Whoever can write beside the target cannot make it another folder."""
    path = tmp_path / "data.tar"
    path.write_bytes(tar(entry("wanted/a")))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "unpacked").symlink_to("elsewhere" if target == "unpacked" else "nowhere")
    with pytest.raises((OutputError, DataError)):
        unpack(path)
    assert not list((tmp_path / "elsewhere").iterdir())
