"""Data sets on disk: the layouts that are read, and a sentence with the file's name for everything that does not fit."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplabzoo.data.classes import class_list
from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.errors import DataError, DeepLabZooError, ImageError, UnknownNameError

PHOTO = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def save(path: Path, pixels: np.ndarray | Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path)


def save_palette(path: Path, labels: np.ndarray) -> None:
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette([value for colour in class_list("voc").palette for value in colour])
    save(path, image)


def mask_of(*values: int) -> np.ndarray:
    """A 4 x 6 mask of zeros that begins with `values`."""
    mask = np.zeros(24, np.uint8)
    mask[: len(values)] = values
    return mask.reshape(4, 6)


def make_voc(home: Path, listed: Sequence[str] = ("b", "a"), split: str = "val") -> None:
    for stem in listed:
        save(home / "JPEGImages" / f"{stem}.jpg", PHOTO)
        save_palette(home / "SegmentationClass" / f"{stem}.png", mask_of(0, 20, 255))
    (home / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    (home / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in listed))


def make_folder(home: Path, masks: dict[str, np.ndarray]) -> None:
    for stem, mask in masks.items():
        save(home / "images" / f"{stem}.png", PHOTO)
        save(home / "masks" / f"{stem}.png", mask)


def sentence(error: pytest.ExceptionInfo[DeepLabZooError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("home", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_is_found_wherever_the_root_points(tmp_path: Path, home: str) -> None:
    make_voc(tmp_path / home)
    data = build_dataset("voc", tmp_path, "val")
    assert (data.name, data.split, data.ignore_index, len(data)) == ("voc", "val", 255, 2)
    assert data.names == ("b", "a"), "the order is that of the list"
    assert (data.classes, data.palette) == (class_list("voc").classes, class_list("voc").palette)
    sample = data[0]
    assert sample.name == "b"
    assert sample.image.shape == (4, 6, 3)
    np.testing.assert_array_equal(sample.labels, mask_of(0, 20, 255))


def test_voc_aug_splits_read_the_merged_masks(tmp_path: Path) -> None:
    """PyTorch-Encoding#98: trainaug's labels are in another folder, and the wrong one fails late or not at all."""
    make_voc(tmp_path, ["a"], split="trainaug")
    save(tmp_path / "SegmentationClassAug" / "a.png", mask_of(7))
    assert build_dataset("voc", tmp_path, "trainaug")[0].labels[0, 0] == 7


def test_voc_reads_merged_masks_where_there_are_no_others(tmp_path: Path) -> None:
    """A list of SBD's images under any name: `train+train_extra` is then one split with masks in two folders."""
    make_voc(tmp_path, ["a"], split="train")
    (tmp_path / "ImageSets" / "Segmentation" / "extra.txt").write_text("z\n")
    save(tmp_path / "JPEGImages" / "z.jpg", PHOTO)
    save(tmp_path / "SegmentationClassAug" / "z.png", mask_of(7))
    both = build_dataset("voc", tmp_path, "train+extra")
    assert both.names == ("a", "z")
    assert [int(both.read_labels(place)[0, 0]) for place in range(2)] == [0, 7]


def test_voc_names_the_files_that_its_list_promises(tmp_path: Path) -> None:
    make_voc(tmp_path, ["a", "b", "c", "d"])
    for stem in ("b", "d"):
        (tmp_path / "SegmentationClass" / f"{stem}.png").unlink()
    with pytest.raises(DataError, match=r"2 of the 4 images in .*val\.txt' have no mask in .*: 'b', 'd';") as error:
        build_dataset("voc", tmp_path, "val")
    sentence(error)
    (tmp_path / "JPEGImages" / "c.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the 4 images .* have no image in .*: 'c';"):
        build_dataset("voc", tmp_path, "val")


def test_an_image_listed_twice_is_refused(tmp_path: Path) -> None:
    make_voc(tmp_path, ["a", "b", "a"])
    with pytest.raises(DataError, match="lists 'a' more than once"):
        build_dataset("voc", tmp_path, "val")


def test_voc_names_its_splits_and_its_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not VOC 2012: expected a folder that is, or contains, VOCdevkit/VOC2012"):
        build_dataset("voc", tmp_path, "val")
    make_voc(tmp_path)
    make_voc(tmp_path, ["a"], split="train")
    with pytest.raises(DataError, match=r"no split 'vall'.*only train, val\. Did you mean 'val'\?"):
        build_dataset("voc", tmp_path, "vall")
    (tmp_path / "ImageSets" / "Segmentation" / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.txt' is empty"):
        build_dataset("voc", tmp_path, "empty")


@pytest.mark.parametrize("home", ["", "CamVid"])
def test_camvid_reads_its_void_as_ours(tmp_path: Path, home: str) -> None:
    """The masks write 11 for void; a loss or a score that takes 11 for a class is wrong in silence (or dies on the GPU)."""
    save(tmp_path / home / "test" / "one.jpg", PHOTO)
    save(tmp_path / home / "testannot" / "one.png", mask_of(0, 10, 11, 255))
    data = build_dataset("camvid", tmp_path, "test")
    assert (len(data), len(data.classes), data.ignore_index) == (1, 11, 255)
    assert data[0].labels[0].tolist() == [0, 10, 255, 255, 0, 0]


def test_camvid_names_its_splits(tmp_path: Path) -> None:
    save(tmp_path / "train" / "one.png", PHOTO)
    save(tmp_path / "trainannot" / "one.png", mask_of(0))
    with pytest.raises(DataError, match=r"no split 'trian'.*splits there: train\. Did you mean 'train'\?"):
        build_dataset("camvid", tmp_path, "trian")


def test_folder_pairs_by_stem_whatever_the_suffix(tmp_path: Path) -> None:
    for index, (image, mask) in enumerate([("jpg", "png"), ("webp", "bmp"), ("png", "tif"), ("JPG", "pgm")]):
        save(tmp_path / "test" / "images" / f"p{index}.x.{image}", PHOTO)
        save(tmp_path / "test" / "masks" / f"p{index}.x.{mask}", mask_of(0, 1, 2, 255))
    for clutter in (".DS_Store", "Thumbs.db"):
        (tmp_path / "test" / "images" / clutter).write_text("x")
    data = build_dataset("folder", tmp_path, "test", classes=("sky", "sea", "sand"))
    assert data.names == ("p0.x", "p1.x", "p2.x", "p3.x")
    assert data.classes == ("sky", "sea", "sand")
    for index in range(4):
        assert data[index].labels[0].tolist() == [0, 1, 2, 255, 0, 0]


def test_a_folder_without_splits_is_the_split_all(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": mask_of(1), "b": mask_of(0)})
    assert len(build_dataset("folder", tmp_path, "all", classes=("x", "y"))) == 2
    with pytest.raises(DataError, match=r"no '.*test/images'.*splits in .*: train, val, all\."):
        build_dataset("folder", tmp_path, "test", classes=("x", "y"))


def test_folder_takes_class_names_from_its_own_file_first(tmp_path: Path) -> None:
    make_folder(tmp_path / "val", {"a": mask_of(2)})
    with pytest.raises(DataError, match=r"have no names; write them into '.*classes\.txt'"):
        build_dataset("folder", tmp_path, "val")
    (tmp_path / "classes.txt").write_text("ground\ntree\n\n car \n", encoding="utf-8")
    assert build_dataset("folder", tmp_path, "val", classes=("x",)).classes == ("ground", "tree", "car")
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty; expected one class name"):
        build_dataset("folder", tmp_path, "val")
    (tmp_path / "classes.txt").write_text("tree\ntree\n")
    with pytest.raises(DataError, match="names 'tree' twice"):
        build_dataset("folder", tmp_path, "val")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="not UTF-8"):
        build_dataset("folder", tmp_path, "val")


def test_unpaired_files_are_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "val", {stem: mask_of(0) for stem in "abc"})
    (tmp_path / "val" / "masks" / "a.png").unlink()
    (tmp_path / "val" / "images" / "c.png").unlink()
    with pytest.raises(
        DataError, match=r"'a\.png' in .*images' without a mask in .*'c\.png' in .*masks' without an image"
    ) as error:
        build_dataset("folder", tmp_path, "val", classes=("x", "y"))
    sentence(error)


def test_many_unpaired_files_are_counted(tmp_path: Path) -> None:
    make_folder(tmp_path / "val", {f"p{index}": mask_of(0) for index in range(9)})
    for index in range(1, 9):
        (tmp_path / "val" / "masks" / f"p{index}.png").unlink()
    with pytest.raises(DataError, match=r"'p5\.png' and 3 more in"):
        build_dataset("folder", tmp_path, "val", classes=("x", "y"))


def test_two_files_of_one_stem_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "val", {"a": mask_of(0)})
    save(tmp_path / "val" / "images" / "a.jpg", PHOTO)
    with pytest.raises(DataError, match=r"a\.jpg' and .*a\.png' have the same stem"):
        build_dataset("folder", tmp_path, "val", classes=("x", "y"))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / "val" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="are empty"):
        build_dataset("folder", tmp_path, "val", classes=("x", "y"))


def test_values_outside_the_classes_name_file_and_values(tmp_path: Path) -> None:
    """pytorch-semseg#158, Pytorch-UNet#375 and five more: found late, on the GPU; here by file and value."""
    make_folder(tmp_path / "val", {"good": mask_of(2), "wrong": mask_of(224, 224, 224, 3)})
    data = build_dataset("folder", tmp_path, "val", classes=("x", "y", "z"))
    assert data[0].labels.max() == 2
    with pytest.raises(
        DataError, match=r"wrong\.png' has label value 3 in 1 pixel, 224 in 3 pixels; expected 0\.\.2 or 255\.$"
    ) as error:
        data[1]
    sentence(error)


def test_many_wrong_values_are_summed_up_and_jpeg_is_suspected(tmp_path: Path) -> None:
    save(tmp_path / "val" / "images" / "a.png", PHOTO)
    save(tmp_path / "val" / "masks" / "a.jpg", mask_of(*range(0, 240, 10)))
    with pytest.raises(DataError, match=r"values more; expected 0\.\.2 or 255; JPEG blurs label numbers, save masks as PNG"):
        build_dataset("folder", tmp_path, "val", classes=("x", "y", "z"))[0]


def test_black_and_white_masks_are_two_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """0/255 masks are how every drawing program saves them; taken for void they would leave nothing to score."""
    make_folder(tmp_path / "val", {"a": mask_of(0), "b": mask_of(255, 255), "c": mask_of(255)})
    with caplog.at_level(logging.INFO, "deeplabzoo"):
        data = build_dataset("folder", tmp_path, "val", classes=("background", "person"))
    assert "255 is read as class 1 (person), not as void" in caplog.text
    assert [int(data[index].labels.sum()) for index in range(3)] == [0, 2, 1]


def test_masks_of_0_and_1_keep_255_as_void(tmp_path: Path) -> None:
    make_folder(tmp_path / "val", {"a": mask_of(255, 255), "b": mask_of(1, 255)})
    data = build_dataset("folder", tmp_path, "val", classes=("background", "person"))
    assert data[0].labels[0].tolist() == [255, 255, 0, 0, 0, 0]
    assert data[1].labels[0].tolist() == [1, 255, 0, 0, 0, 0]


def test_masks_that_mix_both_codings_are_refused(tmp_path: Path) -> None:
    masks = {f"p{index:02d}": mask_of(255) for index in range(40)}
    make_folder(tmp_path / "val", {**masks, "z": mask_of(1)})
    data = build_dataset("folder", tmp_path, "val", classes=("background", "person"))
    with pytest.raises(DataError, match=r"z\.png' has label value 1 in 1 pixel; expected 0 or 255\."):
        data[40]


def test_a_mask_of_another_size_names_both(tmp_path: Path) -> None:
    """A mask is never resized in silence (Deformable-ConvNets#255)."""
    make_folder(tmp_path / "val", {"a": mask_of(1).T.copy()})
    with pytest.raises(DataError, match=r"a\.png' is 4 x 6 pixels but its image '.*a\.png' is 6 x 4 \(width x height") as error:
        build_dataset("folder", tmp_path, "val", classes=("x", "y"))[0]
    sentence(error)


def test_rgb_masks_and_broken_images_keep_their_sentences(tmp_path: Path) -> None:
    make_folder(tmp_path / "val", {"a": PHOTO, "b": mask_of(1)})
    (tmp_path / "val" / "images" / "b.png").write_text("no image")
    data = build_dataset("folder", tmp_path, "val", classes=("x", "y", "z"))
    with pytest.raises(DataError, match=r"a\.png' holds RGB colours"):
        data[0]
    with pytest.raises(ImageError, match=r"b\.png' is not an image"):
        data[1]


def test_sixteen_bit_masks_hold_more_than_255_classes(tmp_path: Path) -> None:
    mask = np.zeros((4, 6), np.uint16)
    mask[0, :3] = [299, 7, 300]
    make_folder(tmp_path / "val", {"a": mask})
    data = build_dataset("folder", tmp_path, "val", classes=[f"class {index}" for index in range(300)])
    with pytest.raises(DataError, match=r"300 in 1 pixel; expected 0\.\.299\."):
        data[0]


def test_unknown_data_and_missing_roots_give_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'camvit'; known are voc, .*, folder\. Did you mean 'camvid'\?"):
        build_dataset("camvit", tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        build_dataset("voc", tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        build_dataset("voc", tmp_path / "file")


def test_an_index_past_the_end_ends_a_loop(tmp_path: Path) -> None:
    make_voc(tmp_path)
    assert [sample.name for sample in build_dataset("voc", tmp_path)] == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "folder", "split", "count"), [("voc", "voc2012_subset", "val", 173), ("camvid", "camvid", "val", 101)]
)
def test_real_data_is_read(shared_data: Path, name: str, folder: str, split: str, count: int) -> None:
    data = build_dataset(name, shared_data / folder, split)
    assert len(data) == count
    for index in range(0, count, 20):
        sample = data[index]
        assert sample.image.shape[:2] == sample.labels.shape
        assert set(np.unique(sample.labels)) <= {*range(len(data.classes)), 255}


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_mask_without_the_orientation_of_its_image_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, orientation: int
) -> None:
    """The sizes agree, so that nothing else would say it; a mask with the same orientation is turned with its image."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, options in (("a", {}), ("b", {"exif": exif})):
        make_folder(tmp_path / name / "val", {"a": mask_of(1)})
        Image.fromarray(PHOTO).save(tmp_path / name / "val" / "images" / "a.png", exif=exif)
        Image.fromarray(mask_of(1)).save(tmp_path / name / "val" / "masks" / "a.png", **options)
        build_dataset("folder", tmp_path / name, "val", classes=("x", "y"))[0]
        assert caplog.text.count(f"is turned upright by its EXIF orientation {orientation}") == 1
