"""`python -m deeplabzoo.prepare folder`: what is wrong with one's own data is said before a night of training."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplabzoo.cli.prepare import main


def write(root: Path, splits: dict[str, int], size: tuple[int, int] = (12, 8)) -> Path:
    """Write `splits` as folders of grey pictures with a square of class 1."""
    for split, count in splits.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            labels = np.zeros(size[::-1], np.uint8)
            labels[:4, :4] = 1
            Image.new("RGB", size, (90, 120, 60)).save(root / split / "images" / f"{split}{index}.jpg")
            Image.fromarray(labels).save(root / split / "masks" / f"{split}{index}.png")
    (root / "classes.txt").write_text("ground\nsquare\n")
    return root


def test_a_sound_folder_is_counted_split_by_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train comes first, then val, then what else is there; shares are of the labelled pixels; nothing is written."""
    root = write(tmp_path, {"test": 1, "train": 3, "val": 2})
    before = sorted(root.rglob("*"))
    assert main(["folder", "--root", str(root)]) == 0
    logged = capsys.readouterr().out
    headings = [line for line in logged.splitlines() if " images of " in line]
    assert [line.split(":")[0] for line in headings] == ["train", "val", "test"]
    assert headings[0] == "train: 3 images of 12 x 8 pixels"
    assert logged.count("16.67%") == 3
    assert sorted(root.rglob("*")) == before


def test_a_folder_without_splits_is_checked_as_it_will_be_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fifth by name is val, in training as here."""
    root = write(tmp_path, {"all": 10})
    for kind in ("images", "masks"):
        (root / "all" / kind).rename(root / kind)
    (root / "all").rmdir()
    assert main(["folder", "--root", str(root)]) == 0
    logged = capsys.readouterr().out
    assert "train: " in logged
    assert "val: " in logged


def test_a_fault_is_one_sentence_that_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mask of another size, a value outside the classes, a picture in two splits, a split that is missing."""
    faults = {
        "size": lambda root: Image.new("L", (5, 5)).save(root / "val" / "masks" / "val1.png"),
        "value": lambda root: Image.new("L", (12, 8), 7).save(root / "train" / "masks" / "train2.png"),
        "twice": lambda root: [
            (root / "train" / kind / f"train0.{end}").rename(root / "train" / kind / f"val0.{end}")
            for kind, end in (("images", "jpg"), ("masks", "png"))
        ],
        "no val": lambda root: (root / "val").rename(root / "later"),
    }
    words = {"size": "val1", "value": "train2", "twice": "'val0' is in 'train' and in 'val'", "no val": "no split 'val'"}
    for name, spoil in faults.items():
        root = write(tmp_path / name, {"train": 3, "val": 2})
        spoil(root)
        assert main(["folder", "--root", str(root)]) == 1
        logged = capsys.readouterr().err
        assert words[name] in logged
        assert len([line for line in logged.splitlines() if line.startswith("error: ")]) == 1


def test_a_missing_folder_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["folder", "--root", str(tmp_path / "absent")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()
