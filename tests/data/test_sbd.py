"""trainaug: the 10582 images of the papers, made from VOC and SBD, checked by count, hash and an empty overlap with val."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from deeplabzoo.data.dataset import read_list, split_hash
from deeplabzoo.data.download import TRAINAUG, SplitInfo, check_trainaug, make_trainaug, read_sbd_mask, trainaug_names
from deeplabzoo.data.image_io import read_mask
from deeplabzoo.errors import DataError

io = pytest.importorskip("scipy.io", reason="reading .mat needs scipy, from the train extra")

VOC_TRAIN, VOC_VAL = ["2007_000032", "2007_000039"], ["2007_000033"]
SBD_TRAIN, SBD_VAL = ["2008_000002", "2007_000033"], ["2008_000007", "2007_000032"]
EXPECTED = ["2007_000032", "2007_000039", "2008_000002", "2008_000007"]
FACTS = SplitInfo(4, hashlib.sha256("\n".join(EXPECTED).encode()).hexdigest())


def test_the_published_list_is_the_one_in_the_code(shared_data) -> None:
    """zhanghang1989/PyTorch-Encoding#98 and #220: 8498, 11355 or 10582? And no val image among them."""
    lists = {split: read_list(shared_data / "voc2012_lists" / f"{split}.txt") for split in ("train", "val", "trainaug")}
    check_trainaug(lists["trainaug"], lists["val"])
    assert TRAINAUG.count == 10582
    sbd = set(lists["trainaug"]) | set(lists["val"][:773])  # SBD's own lists reach into val
    assert trainaug_names(lists["train"], lists["val"], sbd) == sorted(lists["trainaug"])


def test_a_leaked_val_image_or_a_wrong_list_is_refused() -> None:
    with pytest.raises(DataError, match="1 images of VOC's val, the first '2007_000033'"):
        check_trainaug([*EXPECTED, "2007_000033"], VOC_VAL, FACTS)
    with pytest.raises(DataError, match="has 3 names"):
        check_trainaug(EXPECTED[1:], VOC_VAL, FACTS)
    with pytest.raises(DataError, match="10582"):
        check_trainaug(EXPECTED, VOC_VAL)


def write_mat(file, labels: np.ndarray) -> None:
    """The layout of SBD's files: a struct GTcls with Boundaries, Segmentation and CategoriesPresent."""
    content = {"Boundaries": np.zeros((20, 1)), "Segmentation": labels, "CategoriesPresent": np.unique(labels)}
    io.savemat(file, {"GTcls": content}, do_compression=True)


@pytest.fixture
def voc_and_sbd(tmp_path):
    voc, sbd = tmp_path / "VOCdevkit/VOC2012", tmp_path / "benchmark_RELEASE/dataset"
    for folder in (voc / "JPEGImages", voc / "SegmentationClass", voc / "ImageSets/Segmentation", sbd / "cls"):
        folder.mkdir(parents=True)
    (voc / "ImageSets/Segmentation/train.txt").write_text("\n".join(VOC_TRAIN))
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n".join(VOC_VAL) + "\n")
    (sbd / "train.txt").write_text("\n".join(SBD_TRAIN))
    (sbd / "val.txt").write_text("\n".join(SBD_VAL) + "\n")
    for name in {*VOC_TRAIN, *VOC_VAL, *SBD_TRAIN, *SBD_VAL}:
        Image.new("RGB", (12, 8), "red").save(voc / f"JPEGImages/{name}.jpg")
        write_mat(sbd / f"cls/{name}.mat", labels_of(name))
    for name in (*VOC_TRAIN, *VOC_VAL):
        Image.fromarray(np.full((8, 12), 255, np.uint8)).save(voc / f"SegmentationClass/{name}.png")
    return voc, tmp_path


def labels_of(name: str) -> np.ndarray:
    return np.random.default_rng(int(name.replace("_", ""))).integers(0, 21, (8, 12)).astype(np.uint8)


def test_sbd_becomes_palette_masks_beside_voc(voc_and_sbd) -> None:
    """SBD's labels where VOC has none, VOC's own where it has; a list that reads back; PNGs that show VOC's colours."""
    voc, root = voc_and_sbd
    make_trainaug(voc, root, FACTS)
    assert read_list(voc / "ImageSets/Segmentation/trainaug.txt") == EXPECTED
    assert sorted(path.stem for path in (voc / "SegmentationClassAug").iterdir()) == EXPECTED
    np.testing.assert_array_equal(read_mask(voc / "SegmentationClassAug/2008_000007.png"), labels_of("2008_000007"))
    assert (read_mask(voc / "SegmentationClassAug/2007_000032.png") == 255).all()
    with Image.open(voc / "SegmentationClassAug/2008_000002.png") as image:
        assert image.mode == "P"
        assert image.getpalette()[3:6] == [128, 0, 0]


def test_an_interrupted_conversion_goes_on(voc_and_sbd) -> None:
    """Without the list it is not finished; what was converted stays."""
    voc, root = voc_and_sbd
    damaged = root / "benchmark_RELEASE/dataset/cls/2008_000007.mat"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    with pytest.raises(DataError, match="2008_000007"):
        make_trainaug(voc, root, FACTS)
    assert not (voc / "ImageSets/Segmentation/trainaug.txt").exists()
    done = voc / "SegmentationClassAug/2008_000002.png"
    before = done.stat().st_mtime_ns
    damaged.write_bytes(whole)
    make_trainaug(voc, root, FACTS)
    assert done.stat().st_mtime_ns == before
    assert len(list((voc / "SegmentationClassAug").iterdir())) == 4


def test_what_is_missing_is_named(voc_and_sbd, tmp_path) -> None:
    voc, root = voc_and_sbd
    with pytest.raises(DataError, match=r"cls/, train\.txt"):
        make_trainaug(voc, voc, FACTS)
    (voc / "JPEGImages/2008_000002.jpg").unlink()
    with pytest.raises(DataError, match=r"2008_000002\.jpg"):
        make_trainaug(voc, root, FACTS)
    with pytest.raises(DataError, match="is missing"):
        read_sbd_mask(tmp_path / "none.mat")
    write_mat(tmp_path / "wild.mat", np.full((4, 4), 21, np.uint8))
    with pytest.raises(DataError, match="0 to 20"):
        read_sbd_mask(tmp_path / "wild.mat")


def test_a_hash_does_not_depend_on_the_order() -> None:
    assert split_hash(reversed(EXPECTED)) == FACTS.sha256
