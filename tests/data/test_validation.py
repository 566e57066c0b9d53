"""Labels are looked at on the CPU before the first step, and the file is named."""

import pickle

import numpy as np
import pytest
from PIL import Image

from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.data.image_mask_dataset import UnknownLabelValuesError
from deeplabzoo.data.validation import count_labels
from deeplabzoo.errors import DataError


def folder_of(root, masks: dict[str, np.ndarray], classes: tuple[str, ...]):
    for sub in ("images", "masks"):
        (root / "train" / sub).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(classes))
    for name, labels in masks.items():
        Image.new("RGB", labels.shape[::-1]).save(root / f"train/images/{name}.jpg")
        Image.fromarray(labels.astype(np.uint8)).save(root / f"train/masks/{name}.png")
    return build_dataset("folder", root, "train")


def test_the_counts_are_those_of_the_pixels(tmp_path) -> None:
    """Pixels, images and labelled pixels of the images that hold a class: what every kind of class weight needs."""
    masks = {"a": np.array([[0, 0, 1], [255, 0, 1]]), "b": np.array([[0, 0, 0, 255]])}
    counts = count_labels(folder_of(tmp_path, masks, ("sky", "sea", "ship")))
    assert counts.pixels.tolist() == [6, 2, 0]
    assert counts.present_pixels.tolist() == [8, 5, 0]
    assert counts.present_images.tolist() == [2, 1, 0]
    assert counts.ignored_pixels == 2
    assert counts.images == 2
    table = counts.table().splitlines()
    assert table[1].split() == ["sky", "75.00%", "2"]
    assert table[3].endswith("never occurs")
    assert "20.00%" in table[4]


@pytest.mark.parametrize(
    ("values", "classes", "hint"),
    [
        ([0, 38, 75, 113], ("a", "b", "c"), "palette PNG"),
        ([0, 1, 2], ("a", "b"), "numbered from 1"),
        ([0, 120, 3], ("a", "b"), "binary mask"),
        ([0, 1, 4], ("a", "b", "c"), "more classes"),
    ],
)
def test_values_outside_the_classes_name_file_and_likely_cause(tmp_path, values, classes, hint) -> None:
    """`Assertion t >= 0 && t < n_classes` with no file was the field's answer (meetps/pytorch-semseg#158)."""
    good, bad = np.zeros((2, 4)), np.zeros((2, 4))
    bad[0, : len(values)] = values
    data = folder_of(tmp_path, {"fine": good, "wrong": bad, "worse": bad}, classes)
    with pytest.raises(DataError, match=hint) as caught:
        count_labels(data)
    sentence = str(caught.value)
    assert "2 of 3 masks" in sentence
    assert "wrong.png" in sentence
    assert "worse.png" in sentence
    assert "fine" not in sentence
    assert f"{values[-1]} in 2 files" in sentence


def test_many_bad_files_are_named_at_a_bearable_length(tmp_path) -> None:
    data = folder_of(tmp_path, {f"m{i:02d}": np.full((2, 2), 9) for i in range(60)}, ("a", "b"))
    with pytest.raises(DataError, match=r"60 of 60 masks.* m05, m06, .*m54 and 5 more\.") as caught:
        count_labels(data)
    assert "m55" not in str(caught.value)


def test_masks_that_are_all_void_are_no_data(tmp_path) -> None:
    with pytest.raises(DataError, match="No pixel"):
        count_labels(folder_of(tmp_path, {"a": np.full((2, 2), 255)}, ("x", "y", "z")))


def test_any_dataset_can_be_scanned_and_progress_is_reported() -> None:
    logged: list[int] = []
    counts = count_labels(SyntheticShapes("val", count=6), progress=logged.append)
    assert logged == [1, 2, 3, 4, 5, 6]
    assert counts.pixels.sum() + counts.ignored_pixels == 6 * 64 * 64


def test_a_voc_subset_scans_clean(shared_data) -> None:
    """Real masks: 21 classes, void on the borders, background on about three quarters of the pixels."""
    counts = count_labels(build_dataset("voc", shared_data / "voc2012_subset", "val"))
    assert counts.images == 173
    assert (counts.present_images > 0).all()
    assert 0.6 < counts.pixels[0] / counts.pixels.sum() < 0.8
    assert 0.03 < counts.ignored_pixels / (counts.pixels.sum() + counts.ignored_pixels) < 0.08


def test_the_error_survives_the_way_out_of_a_worker() -> None:
    """A loader's process hands errors over pickled, or rebuilt from their sentence alone."""
    error = pickle.loads(pickle.dumps(UnknownLabelValuesError("a sentence", [7])))
    assert (str(error), error.values) == ("a sentence", (7,))
    assert type(error)("a sentence").values == ()
