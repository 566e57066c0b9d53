"""Which formats are opened, bombs that hide from a simpler check, and that reading leaves the rest of the process alone."""

import os
import random
import resource
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_attacks import PHOTO, every_file, png, saved
from PIL import Image

from deeplabzoo.data.image_file import FORMATS, MAX_SCANS
from deeplabzoo.data.image_io import read_header, read_image, read_image_bytes
from deeplabzoo.errors import ImageError


def iptc(content: bytes, width: int = 64, height: int = 64) -> bytes:
    """A container that names the size of what is inside; Pillow opens the inside with any plug-in."""

    def field(record: int, dataset: int, value: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, dataset, len(value)) + value

    size = field(3, 20, struct.pack(">H", width)) + field(3, 30, struct.pack(">H", height))
    return field(3, 60, b"\0\0") + field(3, 65, b"\0") + size + field(3, 120, b"\1") + field(8, 10, content)


CONTAINERS = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "EPS in IPTC": iptc(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"),
    "PNG in IPTC": iptc(png(8, 8, data=bytes(8 * 25))),
    "BLP": b"BLP1" + struct.pack("<II", 0, 0) + struct.pack("<IIII", 16, 16, 5, 0) + bytes(200),
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =  8".ljust(80) + b"END".ljust(2880),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "ICNS": b"icns" + struct.pack(">I", 16) + b"ic09" + struct.pack(">I", 8),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_container_of_another_format_is_never_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file and as an upload; no program is started and no plug-in beyond the listed ones sees a byte."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    Image.init()
    for name, (factory, accept) in list(Image.OPEN.items()):
        if name not in FORMATS:
            monkeypatch.setitem(Image.OPEN, name, (lambda *_, name=name: pytest.fail(f"{name} was opened"), accept))
        assert factory is not None
    path = tmp_path / "a.jpg"
    path.write_bytes(CONTAINERS[kind])
    for read in (read_image, lambda path: read_image_bytes(path.read_bytes())):
        with pytest.raises(ImageError, match="is not an image of a known format"):
            read(path)
    assert read_header(path) is None


def test_every_other_format_of_pillow_is_refused(tmp_path: Path) -> None:
    """All formats that Pillow writes: those of the list are read, and no other."""
    path = tmp_path / "a.png"
    for kind, data in every_file().items():
        name = kind.split()[0]
        if kind.endswith((" RGB", " L")) and name not in ("DIB", "MPO", "PDF"):
            path.write_bytes(data)
            if name in FORMATS:
                assert read_image(path).shape[2] == 3
            else:
                with pytest.raises(ImageError, match="not an image of a known format"):
                    read_image(path)


SCANS = saved(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
SEGMENTS = [at for at in range(2, SCANS.index(b"\xff\xda")) if SCANS[at] == 0xFF and SCANS[at + 1] in (0xE0, 0xDB, 0xC2, 0xC4)]
LAST_SCAN = SCANS[SCANS.rindex(b"\xff\xda") : -2]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SEGMENTS), st.lists(st.sampled_from([b"\0", b"B", b"\xff\0", b"\xff\xff", b"\xff\xd0"]), max_size=4))
def test_scans_are_counted_whatever_stands_between_segments(at: int, junk: list[bytes]) -> None:
    """libjpeg skips any bytes before a marker, so a count that stops at them would miss the scans behind."""
    bomb = SCANS[:at] + b"".join(junk) + SCANS[at:-2] + LAST_SCAN * (MAX_SCANS + 1) + b"\xff\xd9"
    with pytest.raises(ImageError, match=r"is a JPEG of more than 64 scans|is not an image|cannot be opened"):
        read_image_bytes(bomb)


def test_bytes_behind_the_end_of_a_jpeg_are_no_scans() -> None:
    """A motion photo has a film behind its image."""
    whole = SCANS + LAST_SCAN * 100
    assert np.array_equal(read_image_bytes(whole), read_image_bytes(SCANS))


def jpeg2000(**options: object) -> bytes:
    return saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (257, 255, 3), np.uint8)), "JPEG2000", **options)


def with_tiles(width: int, height: int) -> bytes:
    data = bytearray(jpeg2000())
    at = data.index(b"\xff\x4f\xff\x51") + 8 + 16
    data[at : at + 8] = struct.pack(">II", width, height)
    return bytes(data)


@pytest.mark.parametrize("side", [(1, 1), (2, 3), (8, 8), (1, 257), (255, 1)])
def test_a_jpeg_2000_of_tiny_tiles_is_refused(side: tuple[int, int]) -> None:
    """The decoder takes 12 kB a tile before the first one is decoded."""
    with pytest.raises(ImageError, match="tiles, too many for its size"):
        read_image_bytes(with_tiles(*side))


@pytest.mark.parametrize("options", [{"codeblock_size": (4, 4)}, {"precinct_size": (8, 8), "num_resolutions": 1}])
def test_a_jpeg_2000_of_tiny_blocks_is_refused(options: dict[str, object]) -> None:
    flat = Image.new("RGB", (1024, 1024), "grey")
    with pytest.raises(ImageError, match="very small code blocks or precincts"):
        read_image_bytes(saved(flat, "JPEG2000", **options))


@pytest.mark.parametrize("options", [{}, {"tile_size": (64, 64)}, {"codeblock_size": (32, 32)}, {"precinct_size": (128, 128)}])
def test_a_jpeg_2000_as_encoders_write_it_is_read(options: dict[str, object]) -> None:
    assert read_image_bytes(jpeg2000(**options)).shape == (257, 255, 3)


def test_a_jpeg_2000_of_two_sizes_is_refused() -> None:
    data = bytearray(jpeg2000())
    at = data.index(b"ihdr") + 4
    data[at : at + 8] = struct.pack(">II", 16, 16)
    with pytest.raises(ImageError, match="declares two sizes"):
        read_image_bytes(bytes(data))


def test_a_tiff_of_one_huge_tile_is_refused(tmp_path: Path) -> None:
    """The tile is decoded whole, whatever the image's own size."""
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((16, 16), np.uint8), tile=(1024, 1024), compression="zlib")
    with pytest.raises(ImageError, match="tiles of 1024 x 1024 pixels, more than the limit of 100000"):
        read_image(path, max_pixels=100_000)
    assert read_image(path).shape == (16, 16, 3)


SPARSE = """
import resource, sys
from pathlib import Path
from deeplabzoo.data.image_io import read_image, read_mask
from deeplabzoo.errors import DataError, ImageError
for path in map(Path, sys.argv[1:]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_image, read_mask):
        try:
            read(path)
        except (ImageError, DataError):
            pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, path
"""


def test_a_file_that_is_long_without_content_takes_no_memory(tmp_path: Path) -> None:
    """8 kB on the disk, 12 GB long: every format that is read, in a process that may take 3 GB of addresses."""
    paths = []
    for kind in ("JPEG", "PNG", "WEBP", "JPEG2000", "GIF", "BMP", "PPM", "TIFF"):
        path = tmp_path / f"a.{kind.lower()}"
        path.write_bytes(saved(Image.fromarray(PHOTO), kind))
        os.truncate(path, 12 << 30)
        paths.append(path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    limit = (3 << 30, 3 << 30)
    done = subprocess.run(
        [sys.executable, "-c", SPARSE, *map(str, paths)],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def readers(tmp_path: Path):
    """Two threads that read images until the test ends."""
    path, stop = tmp_path / "a.jpg", threading.Event()
    path.write_bytes(saved(Image.fromarray(PHOTO), "JPEG"))

    def read() -> None:
        while not stop.is_set():
            read_image(path)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield path
    stop.set()
    for thread in threads:
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_while_threads_read_images_reads_images(readers: Path) -> None:
    """A lock that a thread of the parent holds stays locked in the child for ever."""
    for _ in range(20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            try:
                threading.Timer(20, os._exit, [1]).start()
                read_image(readers)
                os._exit(0)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


def test_reading_leaves_the_warnings_of_other_threads_alone(readers: Path) -> None:
    """The host's filters are as they were, its warnings arrive, and Pillow's own limit never changes."""
    before, random_ = Image.MAX_IMAGE_PIXELS, random.Random(0)
    for _ in range(300):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            expected = list(warnings.filters)
            for _ in range(random_.randrange(20)):
                assert before == Image.MAX_IMAGE_PIXELS
            warnings.warn("of the host", UserWarning, stacklevel=1)
            left = [one for one in warnings.filters if one[2].__name__ != "_PillowWarning"]
            assert left == [one for one in expected if one[2].__name__ != "_PillowWarning"]
        assert [str(one.message) for one in caught] == ["of the host"]
