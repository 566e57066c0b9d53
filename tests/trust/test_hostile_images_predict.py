"""Hostile photos where users meet them: predict over a folder, lists, odd names, tiles from file to file, the demo."""

import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
from fuzz.mutation import mutated
from helpers.color_net import ColorNet
from image_attacks import PHOTO, chunk, common_files, png, tiff, window_files
from image_bombs import gigapixels
from PIL import Image

import deeplabzoo.cli.predict as predict_module
from deeplabzoo.cli.predict import main
from deeplabzoo.data.image_io import read_header
from deeplabzoo.data.image_sources import Source, find_images
from deeplabzoo.demo.app import segment_upload
from deeplabzoo.errors import DeepLabZooError, ImageError, OutputError
from deeplabzoo.inference.batch import compute_stamp, is_up_to_date
from deeplabzoo.inference.inputs import job_for_folder, png_stamp_metadata
from deeplabzoo.inference.large_predict import predict_to_files
from deeplabzoo.inference.predictor import Predictor

SCENE = np.zeros((40, 60, 3), np.uint8)
SCENE[:20, :30, 0] = 255
NAMES = (
    "two\nlines.png",
    "\x1b[2J\x1b[31mred.png",
    "\u202egnp.exe.png",
    "caf\u00e9 e\u0301 \U0001f3d4 \u200d.png",
    os.fsdecode(b"latin-\xe9-\xff.png"),
    "-rf.png",
    "%s {0} $x^2$ `id`.png",
    "  spaces  .png",
    "n" * 251 + ".png",
    "\U0001f3d4" * 62 + ".png",
)
"""File names that Linux allows."""


@pytest.fixture(autouse=True)
def net(monkeypatch: pytest.MonkeyPatch) -> ColorNet:
    known = ColorNet()
    monkeypatch.setattr(predict_module, "load_named_model", lambda model, weights: known)
    return known


def save(path: Path) -> Path:
    Image.fromarray(SCENE).save(path, "PNG")
    return path


def all_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.soak)])
def test_bad_images_in_a_folder_cost_no_good_one(workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damaged, lying, empty and missing photos are each named in one line; the good ones are done, and the status is 1."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    save(photos / "a good one.png")
    save(photos / "z good one.png")
    bad = {f"cut {number}.jpg": data[: len(data) // 3] for number, data in enumerate(common_files().values())}
    bad |= {f"bomb {number}.png": data for number, data in enumerate(gigapixels().values())}
    bad |= {"empty.png": b"", "words.tif": b"no picture"}
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    (photos / "link.png").symlink_to("nowhere.png")
    (photos / "folder.png").mkdir()
    os.mkfifo(photos / "pipe.png")
    before = all_below(tmp_path)
    assert main([str(photos), "--out", str(out), "--labels", "--workers", workers]) == 1
    said = capsys.readouterr()
    skipped = [line for line in said.err.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == len(bad) + 1  # and the link
    assert all(any(f"{photos / name}'" in line for line in skipped) for name in [*bad, "link.png"])
    last = said.err.splitlines()[-1]
    assert last.startswith(f"error: {len(skipped)} of {len(skipped) + 2} images could not be read: ")
    assert last.endswith("the others are done.")
    assert "Traceback" not in said.err
    made = {"out", "out/a good one_labels.png", "out/z good one_labels.png"}
    assert all_below(tmp_path) - before == made
    assert {str(path) for path in made} <= all_below(tmp_path)


def test_any_file_name_is_labelled_and_logged_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Line breaks, terminal codes, reversed text, bytes that are no text, and names as long as a disk takes."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in NAMES:
        save(photos / name)
    assert main([str(photos), "--out", str(out)]) == 0
    logged = capsys.readouterr()
    lines = [line for line in logged.out.splitlines() if line]
    assert len(lines) == len(NAMES)
    assert all(line.isprintable() for line in lines)
    assert "\x1b" not in logged.err
    reports = [json.loads(path.read_bytes()) for path in out.iterdir() if path.suffix == ".json"]
    assert {report["image"] for report in reports} == {str(photos / name) for name in NAMES}
    assert len(list(out.iterdir())) == 3 * len(NAMES)
    with caplog.at_level(logging.INFO, "deeplabzoo"):
        assert main([str(photos), "--out", str(out)]) == 0
    assert f"skipped {len(NAMES)} of {len(NAMES)} images" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\0.png\n", "zero byte"),
        (b"a" * 5000 + b".png\n", "does not exist"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        (b"\n \n", "is empty"),
        (b"../../../../etc/passwd\n", "not an image"),
        (b"/dev/zero\n", "pipe, socket or device"),
        (b"\x1b[2J.png\n", "No file matches the pattern '\\x1b[2J.png'"),
    ],
)
def test_a_list_may_hold_anything(content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list of photos is somebody's text file: whatever stands in it ends in one sentence."""
    (tmp_path / "list.txt").write_bytes(content)
    assert main([str(tmp_path / "list.txt"), "--out", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert last.isprintable()


def test_a_list_from_windows_is_read(tmp_path: Path) -> None:
    """A byte order mark and carriage returns are no part of a name."""
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png\r\nb.png\r\n")
    assert [source.path.name for source in find_images([str(tmp_path / "list.txt")])] == ["a.png", "b.png"]


@pytest.mark.parametrize("hw", [(2, 65_500), (65_500, 2), (2, 2), (3, 17_000)])
def test_the_widest_images_are_answered(hw: tuple[int, int], tmp_path: Path) -> None:
    """65 500 pixels, where JPEG ends, by two: labels of every pixel, and files or a sentence that names the limit."""
    result = Predictor(ColorNet())(np.zeros((*hw, 3), np.uint8))
    assert result.labels.shape == hw
    result.save(tmp_path / "labels.png", "labels")
    result.save(tmp_path / "areas.json")
    if max(hw) > 16_383:
        with pytest.raises(OutputError, match=r"WEBP is limited to 16383 a side; use \.png or \.tif"):
            result.save(tmp_path / "overlay.webp")
    if hw[0] == 65_500:
        with pytest.raises(OutputError, match="JPEG is limited to 65500 a side"):
            result.save(tmp_path / "overlay.jpg")  # the legend makes it higher
    assert {path.name for path in tmp_path.iterdir()} == {"labels.png", "areas.json"}


def test_a_result_of_many_pixels_is_found_again(tmp_path: Path) -> None:
    """Above 179 megapixels Pillow refuses to open a file unasked; the stamp of a large map of labels is read all the same."""
    source = Source(tmp_path / "survey.tif", Path("survey"))
    source.path.write_bytes(b"an image")
    job = job_for_folder(source, tmp_path, ["labels"])
    stamp = compute_stamp(source, "settings")
    assert stamp is not None
    (name, words, *_) = png_stamp_metadata(stamp).chunks[0]
    job.files["labels"].write_bytes(png(20_000, 20_000, colours=0, extra=chunk(name, words)))
    header = read_header(job.files["labels"])
    assert header is not None
    assert header.hw == (20_000, 20_000)
    assert is_up_to_date(job, "settings", alpha=0.5, legend=True)
    assert not is_up_to_date(job, "another", alpha=0.5, legend=True)


def test_damage_in_the_middle_leaves_nothing_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that goes from file to file: rows that were labelled before the damage was met are taken away again."""
    monkeypatch.setattr("deeplabzoo.inference.large_predict._BAND_ROWS", 16)
    image = np.random.default_rng(0).integers(0, 256, (600, 300, 3), np.uint8)
    source, out = tmp_path / "a.tif", tmp_path / "out"
    out.mkdir()
    source.write_bytes(tiff(image, rowsperstrip=10, photometric="rgb")[:-50_000])
    predictor = Predictor(ColorNet(), tile=128, overlap=32)
    with pytest.raises(ImageError, match="damaged or cut short"):
        predict_to_files(predictor, source, {"labels": out / "labels.png", "json": out / "a.json"})
    assert list(out.iterdir()) == []


def test_the_demo_answers_or_refuses_any_upload() -> None:
    """Uploads of every format, changed at random: labels of the photo, or a sentence about the upload."""
    predictor, random_ = Predictor(ColorNet()), random.Random(3)
    files = [*common_files().values(), *window_files().values(), *gigapixels().values()]
    answered, sentences = 0, []
    for number in range(150):
        data = files[number] if number < len(files) else mutated(random_.choice(files), random_)
        try:
            content = segment_upload(data, predictor, 1_000_000)
            assert content["width"] * content["height"] <= 1_000_000
            answered += 1
        except DeepLabZooError as error:
            sentences.append(str(error))
    assert all(one.startswith("The upload ") and one.isprintable() for one in sentences)
    assert min(answered, len(sentences)) > 30


def test_odd_pixels_in_a_folder_are_labelled(tmp_path: Path) -> None:
    """Every common format through the command: the labels have the photo's size."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, data in enumerate(common_files().values()):
        (photos / f"{number}.png").write_bytes(data)
    assert main([str(photos), "--out", str(tmp_path / "out"), "--labels"]) == 0
    for number in range(len(common_files())):
        with Image.open(tmp_path / "out" / f"{number}_labels.png") as labels:
            assert labels.size == (PHOTO.shape[1], PHOTO.shape[0])
