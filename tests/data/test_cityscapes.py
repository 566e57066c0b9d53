"""Cityscapes: raw ids on disk, 19 classes read."""

import numpy as np
import pytest
from PIL import Image

from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.data.datasets.published import ID_TO_TRAIN_ID
from deeplabzoo.errors import DataError


def frame(root, name: str, labels: np.ndarray) -> None:
    city = name.split("_")[0]
    photo = root / f"leftImg8bit/train/{city}/{name}_leftImg8bit.png"
    mask = root / f"gtFine/train/{city}/{name}_gtFine_labelIds.png"
    for path in (photo, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", labels.shape[::-1]).save(photo)
    Image.fromarray(labels.astype(np.uint8)).save(mask)
    Image.fromarray(labels.astype(np.uint16)).save(mask.with_name(f"{name}_gtFine_instanceIds.png"))


def test_every_id_becomes_its_class(tmp_path) -> None:
    """All 34 ids, told by name: the evaluated ones in order, every other one ignored."""
    frame(tmp_path, "aachen_000000_000019", np.arange(34).reshape(2, 17))
    data = build_dataset("cityscapes", tmp_path, "train")
    labels = data[0].labels.ravel()
    named = {label_id: data.classes[label] for label_id, label in enumerate(labels) if label != 255}
    expected = {
        7: "road",
        8: "sidewalk",
        11: "building",
        17: "pole",
        19: "traffic light",
        23: "sky",
        24: "person",
        33: "bicycle",
    }
    assert named.items() >= expected.items()
    assert [named[label_id] for label_id in sorted(named)] == list(data.classes)
    assert len(named) == 19
    assert (labels[[0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30]] == 255).all()


def test_the_official_sample_reads(shared_data) -> None:
    data = build_dataset("cityscapes", shared_data / "cityscapes_sample", "train")
    assert data.names == ("aachen_000000_000019", "aachen_000001_000019")
    sample = data[0]
    assert sample.image.shape == (1024, 2048, 3)
    assert sample.labels.shape == (1024, 2048)
    assert set(np.unique(sample.labels)) <= {*range(19), 255}
    share = np.bincount(sample.labels.ravel(), minlength=256) / sample.labels.size
    assert share[0] > 0.2  # a street scene: road
    assert sample.labels[-1, 0] == 255  # the car's own bonnet and the rectified border


def test_a_frame_without_labels_is_named(tmp_path) -> None:
    for name in ("ulm_000000_000019", "ulm_000001_000019"):
        frame(tmp_path, name, np.zeros((2, 2)))
    (tmp_path / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match="1 frames have no partner, the first 'ulm_000001_000019'"):
        build_dataset("cityscapes", tmp_path, "train")


def test_another_folder_or_split_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="leftImg8bit and gtFine"):
        build_dataset("cityscapes", tmp_path, "train")
    frame(tmp_path, "ulm_000000_000019", np.zeros((2, 2)))
    with pytest.raises(DataError, match="only train"):
        build_dataset("cityscapes", tmp_path, "tran")


def test_trainids_in_place_of_ids_are_found_out(tmp_path) -> None:
    """255 stands in no labelIds file: somebody's converted masks are not silently read as ids."""
    frame(tmp_path, "ulm_000000_000019", np.array([[0, 255], [7, 7]]))
    assert 255 not in ID_TO_TRAIN_ID
    with pytest.raises(DataError, match="value 255 in 1 pixel"):
        build_dataset("cityscapes", tmp_path, "train")[0]
