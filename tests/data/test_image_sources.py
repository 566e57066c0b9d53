"""Odd names and links in circles: each good image is still found, under a name of its own."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.data.image_sources import find_images, read_url
from deeplabzoo.errors import DataError, DeepLabZooError


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")
    return path


@settings(max_examples=30, deadline=None)
@given(st.sets(st.from_regex(r"[aA][bB]?\.(jpg|JPG|png)", fullmatch=True), min_size=2, max_size=8))
def test_names_that_differ_in_case_alone_get_names_of_their_own(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    """As on a disk that takes them for one, results must not overwrite each other; no image is refused."""
    folder = tmp_path_factory.mktemp("photos")
    for name in names:
        save(folder / name)
    found = find_images([str(folder)])
    assert {one.path.name for one in found} == names
    assert len({str(one.name).casefold() for one in found}) == len(names)


def test_a_link_to_itself_costs_no_other_image(tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "out").symlink_to("out")
    for recursive in (False, True):
        found = find_images([str(tmp_path / "photos")], recursive=recursive, out=tmp_path / "out")
        assert [one.path.name for one in found] == ["a.jpg", "loop.jpg"]


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_link_to_itself_in_a_dataset_is_named(kind: str, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        save(tmp_path / "val" / folder / "a.png")
        save(tmp_path / "val" / folder / "b.png")
    (tmp_path / "val" / kind / "b.png").unlink()
    (tmp_path / "val" / kind / "b.png").symlink_to("b.png")
    with pytest.raises(DeepLabZooError, match=r"b\.png"):
        build_dataset("folder", tmp_path, "val", classes=("x", "y"))[1]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match="does not exist"):
        build_dataset("folder", tmp_path / "loop", "val", classes=("x", "y"))


@pytest.mark.parametrize("name", ["cat::1.jpg", "s3::b.jpg"])
def test_a_file_with_colons_in_its_name_is_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "we::ird" / name)
    monkeypatch.chdir(tmp_path / "we::ird")
    assert [one.url for one in find_images([name])] == [None]
    monkeypatch.chdir(tmp_path)
    assert [one.url for one in find_images(["we::ird"])] == [None]


@pytest.mark.parametrize("url", ["zip://", "zip://x.jpg", "reference://x", "zip://x.jpg::nowhere.zip", "tar://a::b"])
def test_an_odd_url_is_one_sentence(url: str) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(DeepLabZooError):
        read_url(url, max_pixels=1000)
