"""classes.txt: names, and masks coded in colours or in ids with gaps."""

import numpy as np
import pytest
from PIL import Image

from deeplabzoo.data.class_file import read_class_file
from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.data.validation import count_labels
from deeplabzoo.errors import DataError

COLOURED = "road 128,64,128\nbuilding #464646\nvoid 0,0,0\ntraffic light\t250, 170, 30\n"


@pytest.fixture
def folder(tmp_path):
    for sub in ("images", "masks"):
        (tmp_path / "val" / sub).mkdir(parents=True)

    def add(name: str, mask: Image.Image) -> None:
        Image.new("RGB", mask.size).save(tmp_path / f"val/images/{name}.jpg")
        mask.save(tmp_path / f"val/masks/{name}.png")

    return tmp_path, add


def test_colours_become_classes(folder) -> None:
    """Masks as annotation tools paint them; the same colours draw the results."""
    root, add = folder
    (root / "classes.txt").write_text(COLOURED)
    painted = np.array([[(128, 64, 128), (70, 70, 70)], [(0, 0, 0), (250, 170, 30)]], np.uint8)
    add("painted", Image.fromarray(painted))
    add("with_alpha", Image.fromarray(painted).convert("RGBA"))
    data = build_dataset("folder", root, "val")
    assert data.classes == ("road", "building", "traffic light")
    assert data.palette == ((128, 64, 128), (70, 70, 70), (250, 170, 30))
    for sample in (data[0], data[1]):
        assert sample.labels.dtype == np.uint8
        assert sample.labels.tolist() == [[0, 1], [255, 2]]


def test_a_grey_image_among_coloured_masks_is_read_by_colour(folder) -> None:
    """One frame that is void all over is saved as grey by some tools: 0 is then black, not class 0."""
    root, add = folder
    (root / "classes.txt").write_text(COLOURED)
    add("a", Image.new("RGB", (2, 2), (128, 64, 128)))
    add("b", Image.new("L", (2, 2), 0))
    assert (build_dataset("folder", root, "val")[1].labels == 255).all()


def test_an_unlisted_colour_is_named(folder) -> None:
    root, add = folder
    (root / "classes.txt").write_text(COLOURED)
    add("off", Image.new("RGB", (2, 3), (128, 64, 129)))
    data = build_dataset("folder", root, "val")
    with pytest.raises(DataError, match=r"off\.png' has colour #804081 in 6 pixels"):
        data[0]
    with pytest.raises(DataError, match=r"1 of 1 masks.*#804081 in 1 file"):
        count_labels(data)


def test_colours_of_number_masks_only_draw(folder) -> None:
    """A palette PNG holds numbers already; colours in classes.txt then say how results look."""
    root, add = folder
    (root / "classes.txt").write_text("a #ff0000\nb #00ff00\n")
    mask = Image.fromarray(np.array([[0, 1], [255, 0]], np.uint8)).convert("P")
    mask.putpalette([9] * 768)
    add("numbers", mask)
    data = build_dataset("folder", root, "val")
    assert data[0].labels.tolist() == [[0, 1], [255, 0]]
    assert data.palette == ((255, 0, 0), (0, 255, 0))


def test_ids_with_gaps_become_classes(folder) -> None:
    """COCO-Stuff's way: 182 ids of which some do not exist, 255 for unlabelled; and 16 bits where ids need them."""
    root, add = folder
    (root / "classes.txt").write_text("person id=0\nstreet sign id=91\nvoid id=7\nwood id=1181\n")
    add("ids", Image.fromarray(np.array([[0, 91], [255, 7]], np.uint8)))
    add("wide", Image.fromarray(np.array([[1181, 91], [0, 0]], np.uint16)))
    data = build_dataset("folder", root, "val")
    assert data.classes == ("person", "street sign", "wood")
    assert data[0].labels.tolist() == [[0, 1], [255, 255]]
    assert data[1].labels.tolist() == [[2, 1], [0, 0]]
    add("zgap", Image.fromarray(np.full((2, 2), 90, np.uint8)))
    with pytest.raises(DataError, match="value 90"):
        build_dataset("folder", root, "val")[2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("a #ff0000\nb\n", "a colour but not 'b'"),
        ("a id=1\nb\n", "an id but not 'b'"),
        ("a #ff0000\nb 255,0,0\n", "to another class"),
        ("a id=4\nb id=4\n", "to another class"),
        ("a 1,2,300\n", "0 to 255"),
        ("a\nb\na\n", "names 'a' twice"),
        ("\n".join(f"c{i}" for i in range(256)), "at most 255"),
    ],
)
def test_a_class_file_that_contradicts_itself_is_refused(tmp_path, text, sentence) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_class_file(file)


@pytest.mark.parametrize(
    "text",
    [
        "2 disc\n0 ground\n1 square",
        "name\nground\nsquare\ndisc",
        "Class\nground\nsquare\ndisc",
        "ground # all\nsquare\ndisc # 3",
    ],
)
def test_numbers_headers_and_comments_are_no_part_of_a_name(tmp_path, text) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text)
    known = read_class_file(file)
    names = {number: known.classes[label] for number, label in known.label_map.items() if label != 255}
    assert names == {0: "ground", 1: "square", 2: "disc"}


def test_plain_names_need_nothing_else(tmp_path) -> None:
    file = tmp_path / "classes.txt"
    file.write_bytes("\ufeffHintergrund\r\nTür 2\r\n\r\nvoid\r\n".encode())
    known = read_class_file(file)
    assert known.classes == ("Hintergrund", "Tür 2")
    assert known.colours is None
    assert known.label_map == {0: 0, 1: 1, 2: 255, 255: 255}
