"""Folders as people and annotation tools lay them out, and masks in every coding that they have."""

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from deeplabzoo.cli.prepare import main as prepare
from deeplabzoo.data.class_file import read_class_file
from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.data.datasets.folder import list_splits
from deeplabzoo.errors import DataError

CLASSES = ("ground", "square", "disc")
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 0, 255))
LABELS = np.zeros((24, 32), np.uint8)
LABELS[4:12, 4:16] = 1
LABELS[12:20, 16:30] = 2


def put(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def put_pair(image: Path, mask: Path, seed: int = 0) -> None:
    put(image, np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8))
    put(mask, LABELS)


LAYOUTS = {
    "split folders": ("{split}/images/{name}.jpg", "{split}/masks/{name}.png"),
    "images/train": ("images/{split}/{name}.jpg", "masks/{split}/{name}.png"),
    "images/train, labels": ("images/{split}/{name}.jpg", "labels/{split}/{name}.png"),
    "mmsegmentation": ("img_dir/{split}/{name}.jpg", "ann_dir/{split}/{name}.png"),
    "ADE20K's words": ("images/{split}ing/{name}.jpg", "annotations/{split}ing/{name}.png"),
    "capitals": ("{Split}_Images/{name}.jpg", "{Split}_Masks/{name}.png"),
    "Carvana": ("{split}/{name}.jpg", "{split}_masks/{name}_mask.png"),
    "joined words": ("{split}images/{name}.jpg", "{split}annot/{name}.png"),
    "other words": ("{split}/imgs/{name}.jpg", "{split}/annotations/{name}.png"),
    "mask suffix": ("{split}/images/{name}.jpg", "{split}/masks/{name}_mask.png"),
    "label suffix": ("{split}/images/{name}_image.jpg", "{split}/labels/{name}_label.png"),
    "nested": ("{split}/images/town{name}/{name}.jpg", "{split}/masks/town{name}/{name}.png"),
    "nested, split below": ("images/{split}/town{name}/{name}.jpg", "masks/{split}/town{name}/{name}.png"),
    "Roboflow": ("{split}/{name}_jpg.rf.0a1b.jpg", "{split}/{name}_jpg.rf.0a1b_mask.png"),
    "below one folder": ("export/{split}/images/{name}.jpg", "export/{split}/masks/{name}.png"),
}


@pytest.mark.parametrize("valid", ["val", "valid", "validation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_split_folders_is_read(layout: str, valid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal stems in train and val are different images; the splits have the right ones; the check passes."""
    if layout == "ADE20K's words" and valid != "validation":
        pytest.skip("its words are training and validation")
    image, mask = LAYOUTS[layout]
    for number, split in enumerate(("train", valid)):
        for name in ("0000", "0001"):
            words = {"split": split, "Split": split.capitalize(), "name": name}
            parts = [one.format(**words).replace("validationing", "validation") for one in (image, mask)]
            put_pair(tmp_path / parts[0], tmp_path / parts[1], seed=10 * number + int(name))
    home = tmp_path / "export" if (tmp_path / "export").is_dir() else tmp_path
    (home / "classes.txt").write_text("\n".join(CLASSES))
    assert list_splits(tmp_path) == ["train", "val"]
    for number, split in enumerate(("train", "val")):
        data = build_dataset("folder", tmp_path, split)
        assert len(data) == 2
        for index in range(2):
            assert np.array_equal(data[index].labels, LABELS)
            assert data.files[data.names[index]][0].is_file()
        assert all(("train", valid)[number] in str(path).lower() for path, _ in data.files.values())
    assert prepare(["folder", "--root", str(tmp_path)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("images", "masks"), ("imgs", "labels"), ("Image", "GT"), ("JPEGImages", "SegmentationClass")]
)
def test_two_folders_without_splits_are_read(words: tuple[str, str], tmp_path: Path) -> None:
    for number in range(5):
        put_pair(tmp_path / words[0] / f"{number}.jpg", tmp_path / words[1] / f"{number}.png", number)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert list_splits(tmp_path) == ["train", "val"]
    assert len(build_dataset("folder", tmp_path, "train")) == 4


@pytest.mark.parametrize("home", ["", "images", "export"])
def test_masks_beside_images_without_splits_are_read(home: str, tmp_path: Path) -> None:
    """`a.jpg` beside `a_mask.png`; class names and a README may stand in the folder above."""
    for number in range(5):
        put_pair(tmp_path / home / f"{number}.jpg", tmp_path / home / f"{number}_mask.png", number)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    (tmp_path / "README.md").write_text("ours")
    assert list_splits(tmp_path) == ["train", "val"]
    assert len(build_dataset("folder", tmp_path, "train")) == 4


@pytest.mark.parametrize("name", ["README.txt", "LICENSE.txt", "notes.txt", "0.txt", "labels.txt", "requirements.txt"])
def test_a_text_file_that_lists_no_image_is_no_split(name: str, tmp_path: Path) -> None:
    """A licence must neither turn off the split by name nor become a split of its own."""
    for number in range(5):
        put_pair(tmp_path / "images" / f"{number}.jpg", tmp_path / "masks" / f"{number}.png", number)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    (tmp_path / name).write_text("0 0.5 0.5 0.25 0.25\nCreative Commons, see the address above\n")
    assert list_splits(tmp_path) == ["train", "val"]
    assert len(build_dataset("folder", tmp_path, "val")) == 1


def test_voc_with_classes_of_its_own_is_read(tmp_path: Path) -> None:
    """The layout of VOC, with lists; masks by number."""
    for number in range(4):
        put_pair(tmp_path / "JPEGImages" / f"{number}.jpg", tmp_path / "SegmentationClass" / f"{number}.png", number)
    (tmp_path / "SegmentationObject").mkdir()
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n2\n")
    (lists / "val.txt").write_text("3\n")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert list_splits(tmp_path) == ["train", "val"]
    assert build_dataset("folder", tmp_path, "train").names == ("0", "1", "2")


def painted(labels: np.ndarray = LABELS) -> np.ndarray:
    return np.array(COLOURS, np.uint8)[labels]


def test_cvats_segmentation_mask_is_read(tmp_path: Path) -> None:
    """CVAT's export `Segmentation mask 1.1`: VOC's folders, colours in labelmap.txt, one list called default."""
    for number in range(5):
        put_pair(tmp_path / "JPEGImages" / f"{number}.jpg", tmp_path / "SegmentationClass" / f"{number}.png", number)
        put(tmp_path / "SegmentationClass" / f"{number}.png", painted())
        put(tmp_path / "SegmentationObject" / f"{number}.png", painted())
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "default.txt").write_text("\n".join("01234") + "\n")
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nsquare:255,0,0::\ndisc:0,0,255::\n"
    )
    assert list_splits(tmp_path) == ["train", "val"]
    data = build_dataset("folder", tmp_path, "train")
    assert data.classes == ("background", "square", "disc")
    assert all(np.array_equal(data[index].labels, LABELS) for index in range(len(data)))


def test_roboflows_class_table_is_read(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        put_pair(tmp_path / split / "a.rf.1.jpg", tmp_path / split / "a.rf.1_mask.png")
        (tmp_path / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, square\n2, disc\n")
    for split in ("train", "val"):
        data = build_dataset("folder", tmp_path, split)
        assert data.classes == ("background", "square", "disc")
        assert np.array_equal(data[0].labels, LABELS)


def test_labelmes_arrays_are_read(tmp_path: Path) -> None:
    put_pair(tmp_path / "train" / "images" / "a.jpg", tmp_path / "train" / "masks" / "a.png")
    (tmp_path / "train" / "masks" / "a.png").unlink()
    np.save(tmp_path / "train" / "masks" / "a.npy", np.where(LABELS == 2, -1, LABELS).astype(np.int32))
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\nsquare\ndisc\n")
    data = build_dataset("folder", tmp_path, "train")
    assert data.classes == ("background", "square", "disc")
    assert np.array_equal(data[0].labels, np.where(LABELS == 2, 255, LABELS))


ROWS = {
    "CVAT": "# label:color_rgb:parts:actions\nground:0,0,0::\nsquare:255,0,0::\ndisc:0,0,255::",
    "spaces": "ground 0 0 0\nsquare 255 0 0\ndisc 0 0 255",
    "commas": "ground,0,0,0\nsquare,255,0,0\ndisc,0,0,255",
    "a table with a header": "name,r,g,b\nground,0,0,0\nsquare,255,0,0\ndisc,0,0,255",
    "CamVid": "0 0 0\tground\n255 0 0\tsquare\n0 0 255\tdisc",
    "comments": "# ours\nground #000000\n#another\nsquare #ff0000\ndisc #0000ff",
}


@pytest.mark.parametrize("text", ROWS.values(), ids=ROWS.keys())
def test_colours_of_other_tools_are_colours(text: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    known = read_class_file(tmp_path / "classes.txt")
    assert known.classes == CLASSES
    assert known.palette == COLOURS


@pytest.mark.parametrize(
    "text", ["0,ground\n1,square\n2,disc", "id;name\n0;ground\n1;square\n2;disc", "0: ground\n1: square\n2: disc"]
)
def test_numbers_of_other_tools_are_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    known = read_class_file(tmp_path / "classes.txt")
    assert known.classes == CLASSES
    assert known.label_map == {0: 0, 1: 1, 2: 2, 255: 255}


@pytest.mark.parametrize(
    "text",
    [
        "names: [a, b]",
        "nc: 2\nnames:\n- a",
        '{"a": 0}',
        "[\n  'a'\n]",
        "- a\n- b",
        "<a>",
        "0 0.5 0.5 0.25 0.25",
        "255 0 0\n0 255 0",
    ],
)
def test_json_and_yaml_are_no_class_names(text: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match="as JSON, YAML or a table of numbers has; expected one class name a line"):
        read_class_file(tmp_path / "classes.txt")


@given(st.integers(0, 3), st.sampled_from(["void", "ignore", "Unlabeled"]))
def test_the_number_of_a_void_line_is_not_scored(place: int, word: str) -> None:
    """A line of that name keeps its number: those behind it are not shifted."""
    import tempfile

    names = list(CLASSES)
    names.insert(place, word)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "classes.txt"
        file.write_text("\n".join(names))
        known = read_class_file(file)
    assert known.classes == CLASSES
    assert {names[value]: label for value, label in known.label_map.items() if value < 4} == {
        **{name: CLASSES.index(name) for name in CLASSES},
        word: 255,
    }


def folder_of(root: Path, masks: dict[str, Image.Image], classes: str) -> Path:
    for name, mask in masks.items():
        put(root / "train" / "images" / f"{Path(name).stem}.png", np.zeros((mask.height, mask.width, 3), np.uint8))
        (root / "train" / "masks").mkdir(exist_ok=True)
        mask.save(root / "train" / "masks" / name)
    (root / "classes.txt").write_text(classes)
    return root


COLOURED = "ground #000000\nsquare #ff0000\ndisc #0000ff"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(8)), st.data())
def test_a_palette_in_any_order_is_read_by_its_colours(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], data
) -> None:
    """A quantised mask numbers its colours as they come."""
    image = Image.fromarray(np.array(order, np.uint8)[LABELS])
    palette = np.full((256, 3), 77, np.uint8)
    for label, index in enumerate(order[:3]):
        palette[index] = COLOURS[label]
    image.putpalette(palette.ravel().tolist())
    root = folder_of(tmp_path_factory.mktemp("data"), {"a.png": image}, COLOURED)
    assert np.array_equal(build_dataset("folder", root, "train")[0].labels, LABELS)


def test_each_file_is_read_by_colour_or_number(tmp_path: Path) -> None:
    """Grey numbers first, then colours, palettes and transparency: no file decides for another."""
    clear = Image.fromarray(painted()).convert("RGBA")
    alpha = np.asarray(clear).copy()
    alpha[LABELS == 0] = (9, 9, 9, 0)
    numbers = Image.fromarray(LABELS)
    numbers.putpalette([value for index in range(256) for value in (index, 200, 9)])
    masks = {
        "a.png": Image.fromarray(LABELS),
        "b.png": Image.fromarray(painted()),
        "c.png": Image.fromarray(alpha),
        "d.png": Image.fromarray(painted()).quantize(3),
        "e.png": numbers,
        "f.png": Image.fromarray(np.stack([LABELS] * 3, axis=2)),
    }
    data = build_dataset("folder", folder_of(tmp_path, masks, COLOURED), "train")
    for index, name in enumerate(data.names):
        assert np.array_equal(data[index].labels, LABELS), name


def test_a_palette_that_gives_classes_the_colours_of_others_is_refused(tmp_path: Path) -> None:
    """Some colours are listed in another order and one is not: neither numbers nor colours are right."""
    image = Image.fromarray(LABELS)
    image.putpalette([255, 0, 0, 0, 0, 0, 10, 200, 30] + [0] * 759)
    data = build_dataset("folder", folder_of(tmp_path, {"a.png": image}, COLOURED), "train")
    with pytest.raises(DataError, match=r"a\.png' has colour #0ac81e in 112 pixels"):
        data[0]


@pytest.mark.parametrize("values", [(0, 255), (0, 1)])
def test_one_class_name_is_refused(values: tuple[int, int], tmp_path: Path) -> None:
    """The background would be the class, and the object void: a score of 100 %."""
    root = folder_of(tmp_path, {"a.png": Image.fromarray(np.array(values, np.uint8)[LABELS % 2])}, "fg")
    with pytest.raises(DataError, match="names one class, 'fg'; name what is around it, too, on a line before it: background"):
        build_dataset("folder", root, "train")


def binary(high: int) -> Image.Image:
    return Image.fromarray((LABELS > 0).astype(np.uint8) * high)


@pytest.mark.parametrize("order", [(1, 255), (255, 1)])
def test_masks_of_0_and_1_among_0_and_255_are_refused(order: tuple[int, int], tmp_path: Path) -> None:
    """In either order; half of the objects would be void."""
    root = folder_of(tmp_path, {"a.png": binary(order[0]), "b.png": binary(order[1])}, "background\nobject")
    with pytest.raises(DataError, match=r"holds 0 and 1, .* holds 0 and 255: save all masks with the same numbers"):
        build_dataset("folder", root, "train")
    (root / "classes.txt").write_text("background id=0\nobject id=1")
    assert {int(one.labels.max()) for one in build_dataset("folder", root, "train")} == {1, 255}


@pytest.mark.parametrize("kind", ["grey JPEG", "colour JPEG", "antialiased PNG", "JPEG as PNG"])
def test_a_blurred_black_and_white_mask_is_the_nearest_class(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = np.kron((LABELS > 0).astype(np.uint8), np.ones((3, 5), np.uint8))
    sharp, name = Image.fromarray(right * 255), "a.jpg" if "JPEG" in kind else "a.png"
    if kind == "colour JPEG":
        sharp = sharp.convert("RGB")
    if kind == "antialiased PNG":
        sharp = sharp.resize((1600, 720), Image.Resampling.NEAREST).resize((160, 72), Image.Resampling.BICUBIC)
    root = folder_of(tmp_path, {name: sharp}, "background\nobject")
    if kind == "JPEG as PNG":
        path = root / "train" / "masks" / "a.jpg"
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    with caplog.at_level(logging.INFO, "deeplabzoo"):
        labels = build_dataset("folder", root, "train")[0].labels
    assert np.array_equal(labels, right)
    if kind != "antialiased PNG":
        assert "pixels beside the values of its classes" in caplog.text


def test_a_jpeg_of_colours_is_the_nearest_class_or_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The middle between two of several classes may be a third: no pixel becomes a class that is not there."""
    right = np.kron(LABELS, np.ones((8, 8), np.uint8))
    image = Image.fromarray(painted(right))
    labels = build_dataset("folder", folder_of(tmp_path, {"a.jpg": image}, COLOURED), "train")[0].labels
    known = labels != 255
    assert known.mean() > 0.9
    assert (labels == right)[known].mean() > 0.995
    assert "in the middle between two are ignored" in caplog.text


@pytest.mark.parametrize("classes", ["background\nobject", COLOURED])
def test_a_photo_in_the_place_of_a_mask_is_refused(classes: str, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    for mask in (noise, noise.convert("L")):
        root = folder_of(tmp_path / mask.mode, {"a.png": mask}, classes)
        with pytest.raises(DataError, match=r"a\.png"):
            build_dataset("folder", root, "train")[0]


@pytest.mark.parametrize("value", [2, 7, 128, 250, 254])
def test_an_area_of_another_number_in_a_black_and_white_mask_is_refused(value: int, tmp_path: Path) -> None:
    """Outlines are blurred, areas are not: an area is a class that is not listed, however near its number is to 0 or 255."""
    area = np.where(LABELS > 0, 255, 0).astype(np.uint8)
    area[20:23, 1:12] = value
    whole = np.full_like(LABELS, value)
    masks = {"a.png": binary(255), "area.png": Image.fromarray(area), "whole.png": Image.fromarray(whole)}
    data = build_dataset("folder", folder_of(tmp_path, masks, "background\nobject"), "train")
    assert set(np.unique(data[0].labels)) == {0, 1}
    for index in (1, 2):
        with pytest.raises(DataError, match=f"label value {value} in "):
            data[index]


def test_an_area_of_an_unlisted_colour_in_a_jpeg_is_refused(tmp_path: Path) -> None:
    right = np.kron(LABELS, np.ones((8, 8), np.uint8))
    image = painted(right)
    image[160:192, 0:64] = (0, 128, 0)
    root = folder_of(tmp_path, {"a.jpg": Image.fromarray(image)}, COLOURED)
    with pytest.raises(DataError, match="gives to no class"):
        build_dataset("folder", root, "train")[0]


def test_label_numbers_in_a_jpeg_are_refused(tmp_path: Path) -> None:
    """JPEG turns 1 into 0 and 2 in silence; a mask of one number has nothing that could change."""
    masks = {"a.jpg": Image.fromarray(LABELS), "b.jpg": Image.fromarray(np.zeros_like(LABELS))}
    data = build_dataset("folder", folder_of(tmp_path, masks, "\n".join(CLASSES)), "train")
    with pytest.raises(DataError, match=r"a\.jpg' is a JPEG, which changes label numbers"):
        data[0]
    assert not data[1].labels.any()


def test_splits_with_other_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Roboflow writes a class file for each split; with another order a class would be evaluated as another."""
    for number, (split, names) in enumerate(
        (("train", "0, ground\n1, square\n2, disc"), ("valid", "0, ground\n1, disc\n2, square"))
    ):
        put_pair(tmp_path / split / "a.jpg", tmp_path / split / "a_mask.png", seed=number)
        (tmp_path / split / "_classes.csv").write_text(f"Pixel Value, Class\n{names}\n")
    assert prepare(["folder", "--root", str(tmp_path)]) == 1
    assert "'train' has the classes ground, square, disc, 'val' has ground, disc, square" in capsys.readouterr().err


def test_subsets_of_cvat_are_read_from_their_folders(tmp_path: Path) -> None:
    for number, subset in enumerate(("Train", "Validation")):
        put_pair(tmp_path / "JPEGImages" / subset / "a.jpg", tmp_path / "SegmentationClass" / subset / "a.png", seed=number)
        file = tmp_path / "ImageSets" / "Segmentation" / f"{subset}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{subset}/a\n")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert list_splits(tmp_path) == ["train", "val"]
    train, val = (build_dataset("folder", tmp_path, split)[0] for split in ("train", "val"))
    assert np.array_equal(train.labels, LABELS)
    assert not np.array_equal(train.image, val.image)


def test_equal_images_in_two_splits_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Equal bytes under other names are reported; equal names with other bytes are two images."""
    for number, split in enumerate(("train", "val")):
        put_pair(tmp_path / split / "images" / "0000.png", tmp_path / split / "masks" / "0000.png", seed=number)
        put_pair(tmp_path / split / "images" / f"{split}.png", tmp_path / split / "masks" / f"{split}.png", seed=9)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert prepare(["folder", "--root", str(tmp_path)]) == 0
    logged = caplog.text
    assert "train/images/train.png" in logged
    assert "val/images/val.png" in logged
    assert "0000" not in logged
