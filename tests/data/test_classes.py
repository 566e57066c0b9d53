"""Class lists: plain data that the whole package speaks in."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from deeplabzoo.data.classes import CLASS_LISTS, ClassList, class_list, default_palette, subset_note
from deeplabzoo.errors import UnknownNameError, UsageError


def test_known_lists_have_the_published_number_of_classes() -> None:
    counts = {name: len(known.classes) for name, known in CLASS_LISTS.items()}
    assert counts == {
        "voc": 21,
        "cityscapes": 19,
        "coco": 21,
        "ade20k": 150,
        "camvid": 11,
        "person": 2,
        "pascalcontext": 60,
        "pascalcontext59": 59,
        "cocostuff": 171,
        "cocostuff10k": 171,
        "mapillary": 65,
        "loveda": 7,
        "potsdam": 6,
        "vaihingen": 6,
        "isaid": 16,
    }


@pytest.mark.parametrize("name", CLASS_LISTS)
def test_every_class_has_a_name_of_its_own_and_a_colour(name: str) -> None:
    """Reports are keyed by class name: two of one name would hide each other."""
    known = class_list(name)
    assert known.name == name
    assert len(set(known.classes)) == len(known.classes) == len(known.palette) == known.num_classes
    assert all(0 <= value <= 255 for colour in known.palette for value in colour)
    assert known.ignore_index not in range(known.num_classes)


def test_voc_labels_stand_at_their_published_numbers() -> None:
    voc = class_list("voc")
    assert voc.classes[0] == "background"
    assert list(voc.classes[1:]) == sorted(voc.classes[1:])  # the development kit numbers them alphabetically
    assert (voc.classes[15], voc.palette[15]) == ("person", (192, 128, 128))
    assert class_list("coco").classes == voc.classes


def test_default_palette_is_vocs_colour_map() -> None:
    """Spot values of the official map, the void colour 255 among them; and no two of 4096 labels look alike."""
    colours = default_palette(4096)
    assert colours[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert (colours[20], colours[255]) == ((0, 64, 128), (224, 224, 192))
    assert len(set(colours)) == 4096
    assert default_palette(0) == ()


def test_published_palettes_have_their_known_colours() -> None:
    cityscapes, camvid, ade20k = class_list("cityscapes"), class_list("camvid"), class_list("ade20k")
    assert cityscapes.palette[cityscapes.classes.index("car")] == (0, 0, 142)
    assert cityscapes.palette[cityscapes.classes.index("traffic light")] == (250, 170, 30)
    assert camvid.palette[camvid.classes.index("Road")] == (128, 64, 128)
    assert ade20k.palette[ade20k.classes.index("sky")] == (6, 230, 230)
    assert (ade20k.classes[149], ade20k.palette[149]) == ("flag", (92, 0, 255))


def test_ade20k_names_follow_the_published_table(shared_data: Path) -> None:
    """The table lists synonyms word by word; ours is the first synonym, so its words begin the row."""
    with (shared_data / "ade20k_sample" / "objectInfo150.csv").open(newline="", encoding="utf-8") as file:
        rows = [row["Name"].split(";") for row in csv.DictReader(file)]
    for words, name in zip(rows, class_list("ade20k").classes, strict=True):
        assert words[: len(name.split())] == name.split()


def test_voc_palette_equals_that_of_the_published_masks(shared_data: Path) -> None:
    from PIL import Image

    masks = shared_data / "voc2012_subset" / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    with Image.open(min(masks.iterdir())) as mask:
        stored = mask.getpalette()
    assert stored is not None
    assert [value for colour in default_palette(256) for value in colour][: len(stored)] == stored


def test_a_subset_is_called_one_by_the_names_of_splits_and_of_folders() -> None:
    assert {subset_note("ade20k", split, 3) for split in ("val", "validation")} == {"3-image subset of 2000"}
    assert subset_note("ade20k", "val", 2000) is None
    assert subset_note("ade20k", "train", 10) == "10-image subset of 20210"


def test_unknown_list_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'cityscape'.*Did you mean 'cityscapes'\?"):
        class_list("cityscape")


def test_a_list_that_cannot_label_a_report_is_refused() -> None:
    with pytest.raises(UsageError, match="dog stands there twice"):
        ClassList("mine", ("dog", "cat", "dog"), default_palette(3))
    with pytest.raises(UsageError, match="2 classes but 3 colours"):
        ClassList("mine", ("dog", "cat"), default_palette(3))


def test_class_lists_import_nothing_heavy() -> None:
    """Listing names must stay instant, so the lists may not pull in torch, numpy or Pillow."""
    code = "import sys, deeplabzoo.data.classes; print([m for m in ('torch', 'numpy', 'PIL', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
