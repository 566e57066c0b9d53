"""ADE20K: 0 is everything else and never scored, 1 to 150 are classes 0 to 149."""

import csv

import numpy as np
import pytest
from PIL import Image

from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.errors import DataError


def test_ids_move_down_by_one_and_other_is_ignored(tmp_path) -> None:
    ids = np.array([[0, 1, 2], [13, 149, 150]], np.uint8)
    for folder in ("images/training", "annotations/training"):
        (tmp_path / "ADEChallengeData2016" / folder).mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(tmp_path / "ADEChallengeData2016/images/training/ADE_train_00000001.jpg")
    mask = tmp_path / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"
    Image.fromarray(ids).save(mask)
    data = build_dataset("ade20k", tmp_path, "train")
    assert data[0].labels.tolist() == [[255, 0, 1], [12, 148, 149]]
    assert [data.classes[label] for label in (0, 12, 149)] == ["wall", "person", "flag"]
    Image.fromarray(np.full((2, 3), 151, np.uint8)).save(mask)
    with pytest.raises(DataError, match="value 151"):
        data[0]


def test_the_official_sample_reads_with_the_official_names(shared_data) -> None:
    """Every class that stands in the sample's masks has the name of objectInfo150.csv."""
    root = shared_data / "ade20k_sample"
    data = build_dataset("ade20k", root, "all")
    assert data.names == ("ADE_val_00000001", "ADE_val_00000002", "ADE_val_00000003")
    with (root / "objectInfo150.csv").open() as file:
        official = {int(row["Idx"]) - 1: row["Name"].split(";")[0] for row in csv.DictReader(file)}
    labels = set().union(*(np.unique(data[index].labels).tolist() for index in range(3))) - {255}
    assert len(labels) > 5
    for label in labels:
        assert official[label] == data.classes[label]


def test_a_missing_split_is_explained(tmp_path) -> None:
    with pytest.raises(DataError, match="annotations of ADEChallengeData2016"):
        build_dataset("ade20k", tmp_path, "train")
