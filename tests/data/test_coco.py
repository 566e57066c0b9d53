"""COCO with VOC's labels: torchvision's selection rule, and its pixels."""

import json

import numpy as np
import pytest
from PIL import Image

from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.data.validation import check_splits_differ, count_labels
from deeplabzoo.errors import DataError

coco_mask = pytest.importorskip("pycocotools.mask", reason="polygons need pycocotools, from the train extra")

PERSON, DOG, HAT = 1, 18, 26  # COCO's ids; a hat is no class of VOC
HEIGHT, WIDTH = 60, 80


def box(top: int, left: int, bottom: int, right: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def crowd(top: int, left: int, bottom: int, right: int) -> dict:
    """Uncompressed run lengths, column by column, as COCO writes crowds."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top:bottom, left:right] = 1
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    bounds = [0, *edges, flat.size]
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(bounds).tolist()}


def made_coco(root, annotations: list[tuple[int, int, object, float]], split: str = "val", images: int = 3):
    """`annotations` are (image id, category, segmentation, area)."""
    (root / "annotations").mkdir(exist_ok=True)
    (root / f"{split}2017").mkdir()
    listed = []
    for image_id in range(images, 0, -1):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / f"{split}2017/{image_id:012d}.jpg")
        listed.append({"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": HEIGHT, "width": WIDTH})
    content = {
        "images": listed,
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "segmentation": s, "area": a, "iscrowd": int(isinstance(s, dict))}
            for n, (i, c, s, a) in enumerate(annotations)
        ],
    }
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


def test_polygons_become_labels_and_overlaps_are_ignored(tmp_path) -> None:
    """Two boxes that share a strip: person, void, dog; a hat does not count and stays background."""
    made_coco(
        tmp_path,
        [
            (1, PERSON, box(10, 10, 40, 30), 600),
            (1, DOG, box(10, 25, 40, 50), 750),
            (1, HAT, box(0, 0, 5, 5), 25),
            (2, PERSON, crowd(20, 5, 30, 15), 100),
        ],
    )
    data = build_dataset("coco", tmp_path, "val")
    assert data.names == ("000000000001", "000000000002", "000000000003")
    labels = data[0].labels
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[10:40, 10:50] = data.classes.index("person")
    expected[10:40, 25:50] = data.classes.index("dog")
    expected[10:40, 25:30] = 255
    np.testing.assert_array_equal(labels, expected)
    people = data[1].labels
    assert set(np.unique(people)) == {0, data.classes.index("person")}
    assert np.argwhere(people).min(0).tolist() == [20, 5]
    assert np.count_nonzero(people) == 100
    assert not data[2].labels.any()
    assert count_labels(data).images == 3


def test_training_images_need_more_than_a_thousand_pixels(tmp_path) -> None:
    """The sum over instances of VOC's categories counts, and exactly 1000 is not enough; val keeps every image."""
    annotations = [
        (1, PERSON, box(0, 0, 20, 50), 1000.0),
        (2, PERSON, box(0, 0, 20, 25), 500.0),
        (2, DOG, box(20, 0, 40, 26), 500.5),
        (3, HAT, box(0, 0, 60, 80), 4800.0),
    ]
    made_coco(tmp_path, annotations, split="train")
    made_coco(tmp_path, annotations, split="val")
    assert build_dataset("coco", tmp_path, "train").names == ("000000000002",)
    assert len(build_dataset("coco", tmp_path, "val")) == 3


def test_labels_equal_the_rule_written_with_stacked_masks(tmp_path) -> None:
    """Against the definition on random polygons: a mask per instance, its label where one covers, void where more do."""
    rng = np.random.default_rng(0)
    categories = [1, 2, 3, 18, 44, 72]
    chosen = [(1, int(rng.choice(categories)), [rng.uniform(0, 60, 10).tolist()], 900.0) for _ in range(6)]
    data = build_dataset("coco", made_coco(tmp_path, chosen), "val")
    names = {1: "person", 2: "bicycle", 3: "car", 18: "dog", 44: "bottle", 72: "tvmonitor"}
    masks = np.stack([coco_mask.decode(coco_mask.frPyObjects(s, HEIGHT, WIDTH)).any(2) for _, _, s, _ in chosen])
    labels = np.array([data.classes.index(names[c]) for _, c, _, _ in chosen])
    expected = (masks * labels[:, None, None]).max(0)
    expected[masks.sum(0) > 1] = 255
    assert (expected == 255).any()
    np.testing.assert_array_equal(data[0].labels, expected)


def test_broken_annotations_and_missing_files_are_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"val2017/.*annotations there: none"):
        build_dataset("coco", tmp_path, "val")
    made_coco(tmp_path, [(1, PERSON, [["x"]], 2000.0)])
    with pytest.raises(DataError, match=r"000000000001\.jpg' cannot be drawn"):
        build_dataset("coco", tmp_path, "val")[0]
    for text in ("{", "[]", '{"images": [{"id": 1}], "annotations": []}', '{"images": [], "annotations": []}'):
        (tmp_path / "annotations/instances_val2017.json").write_text(text)
        with pytest.raises(DataError, match="instances_val2017"):
            build_dataset("coco", tmp_path, "val")


def test_a_file_name_cannot_lead_out_of_the_folder(tmp_path) -> None:
    made_coco(tmp_path, [])
    file = tmp_path / "annotations/instances_val2017.json"
    file.write_text(file.read_text().replace("000000000001.jpg", "../../secret.jpg"))
    with pytest.raises(DataError, match="image 1"):
        build_dataset("coco", tmp_path, "val")


def own_coco(root, annotations: str, images: str, segmentation: object) -> None:
    """Two categories of one's own under ids that are a person and a bicycle in COCO."""
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    (root / images).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / images / "a.jpg")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "segmentation": segmentation, "area": 9}],
    }
    (root / annotations).write_text(json.dumps(content))


def compressed(top: int, left: int, bottom: int, right: int) -> dict:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    runs = coco_mask.encode(mask)
    return {"size": [HEIGHT, WIDTH], "counts": runs["counts"].decode()}


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_train.json", "images"),
        ("train/_annotations.coco.json", "train"),
    ],
)
@pytest.mark.parametrize("kind", [box, crowd, compressed])
def test_categories_of_ones_own_are_the_classes(tmp_path, kind, annotations, images) -> None:
    """Id 1 is no person because COCO says so; polygons and both kinds of run lengths are drawn, in each tool's layout."""
    own_coco(tmp_path, annotations, images, kind(10, 10, 40, 30))
    data = build_dataset("coco", tmp_path, "train")
    assert data.classes == ("background", "disc", "square")
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[10:40, 10:30] = 2
    np.testing.assert_array_equal(data[0].labels, expected)


@pytest.mark.parametrize(("category", "outline", "sentence"), [(5, True, "category_id 5"), (2, False, "all boxes")])
def test_instances_that_would_be_background_are_refused(tmp_path, category, outline, sentence) -> None:
    own_coco(tmp_path, "annotations/instances_val.json", "val", box(10, 10, 40, 30) if outline else [])
    file = tmp_path / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace('"category_id": 2', f'"category_id": {category}'))
    with pytest.raises(DataError, match=sentence):
        build_dataset("coco", tmp_path, "val")


def test_equal_names_in_two_splits_are_two_images_unless_their_bytes_are_equal(tmp_path) -> None:
    for split, grey in (("train", 0), ("val", 99)):
        own_coco(tmp_path, f"annotations/instances_{split}.json", split, box(10, 10, 40, 30))
        Image.new("RGB", (WIDTH, HEIGHT), (grey, 0, 0)).save(tmp_path / split / "a.jpg")
    splits = [build_dataset("coco", tmp_path, split) for split in ("train", "val")]
    check_splits_differ(*splits)
    (tmp_path / "val" / "a.jpg").write_bytes((tmp_path / "train" / "a.jpg").read_bytes())
    with pytest.raises(DataError, match="The image 'a' is in 'train' and in 'val'"):
        check_splits_differ(*splits)


@pytest.mark.parametrize(
    "segmentation", [{"size": [5, 5], "counts": [25]}, {"size": [HEIGHT, WIDTH], "counts": "é"}, {"counts": [1]}, [["x"]], 7]
)
def test_a_segmentation_that_cannot_be_drawn_is_one_sentence(tmp_path, segmentation) -> None:
    own_coco(tmp_path, "annotations/instances_val.json", "val", segmentation)
    with pytest.raises(DataError, match=r"An instance of 'a\.jpg' cannot be drawn"):
        build_dataset("coco", tmp_path, "val")[0]
