"""Wrong suffixes, cameras held in any way, noise for metadata, and what stands where a picture should and is none."""

import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest
from image_attacks import PHOTO, common_files, png, saved
from PIL import Image

from deeplabzoo.data.image_io import read_header, read_image, read_mask
from deeplabzoo.errors import ImageError


@pytest.mark.parametrize("kind", list(common_files()))
def test_the_suffix_does_not_matter(kind: str, tmp_path: Path) -> None:
    """A picture under any other picture's suffix, or none, is read by its content."""
    pixels = []
    for suffix in (".png", ".jpg", ".tif", ".gif", ".webp", ".bmp", ".txt", ""):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(common_files()[kind])
        pixels.append(read_image(path))
    assert all(np.array_equal(one, pixels[0]) for one in pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("where", ["exif", "xmp"])
def test_a_camera_held_in_any_way_gives_an_upright_image(where: str, orientation: int, tmp_path: Path) -> None:
    """JPEG as cameras write it, and the orientation in XMP alone as some editors leave it; the oracle is Exif 2.3."""
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:16, :32] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    path = tmp_path / "a.jpg"
    path.write_bytes(
        saved(Image.fromarray(stored), "JPEG", quality=95, **({"exif": exif} if where == "exif" else {"xmp": xmp.encode()}))
    )
    turned = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.transpose(1, 0, 2), 6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored.transpose(1, 0, 2)[::-1, ::-1], 8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]  # fmt: skip
    got = read_image(path)
    assert got.shape == turned.shape
    assert np.abs(got.astype(int) - turned).mean() < 3


def test_corrupt_metadata_does_not_cost_the_image(tmp_path: Path) -> None:
    """EXIF, a colour profile and XMP of seeded noise: the pixels are those of the photo without them, upright or turned."""
    random_ = random.Random(1)
    for kind in ("JPEG", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        plain = tmp_path / "plain"
        plain.write_bytes(saved(Image.fromarray(PHOTO), kind, **options))
        right = read_image(plain)
        for _ in range(60):
            exif = (
                b"Exif\0\0"
                + random_.choice((b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b""))
                + random_.randbytes(random_.randrange(200))
            )
            noise = {"exif": exif, "icc_profile": random_.randbytes(random_.randrange(1, 300)), "xmp": random_.randbytes(99)}
            path = tmp_path / "noisy"
            path.write_bytes(saved(Image.fromarray(PHOTO), kind, **options, **noise))
            got = read_image(path)
            assert sorted(got.shape) == sorted(right.shape)
            assert np.array_equal(np.sort(got, axis=None), np.sort(right, axis=None))


def odd_file(kind: str, folder: Path) -> Path:
    """Something that stands where a picture should."""
    path = folder / "a.jpg"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(str(path))
        case "device":
            return Path("/dev/zero")
        case "broken link":
            path.symlink_to("nowhere.jpg")
        case "link to itself":
            path.symlink_to("a.jpg")
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "too long":
            return folder / f"{'a' * 300}.jpg"
        case "zero byte":
            return folder / "a\0.jpg"
        case "beneath a file":
            path.write_bytes(png(2, 2))
            return path / "b.jpg"
    return path


ODD = {
    "pipe": "is a pipe, socket or device",
    "socket": "is a pipe, socket or device",
    "device": "is a pipe, socket or device",
    "broken link": "is a link to nothing",
    "link to itself": "cannot be read",
    "folder": "is a folder",
    "empty": "is empty",
    "too long": "name too long",
    "zero byte": "null byte",
    "beneath a file": "cannot be read",
}


@pytest.mark.parametrize(("kind", "words"), ODD.items())
def test_what_is_no_file_is_a_sentence_at_once(kind: str, words: str, tmp_path: Path) -> None:
    """Nothing is opened that could keep the reader waiting, and the sentence says what is there."""
    path = odd_file(kind, tmp_path)
    for read in (read_image, read_mask):
        with pytest.raises(ImageError, match=f"(?i){words}"):
            read(path)
    assert read_header(path) is None
