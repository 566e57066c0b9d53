"""Annotations in COCO's JSON: COCO 2017 with VOC's 21 labels, or a dataset with categories of its own.

For COCO 2017 the rule is that of torchvision's published weights (references/segmentation/coco_utils.py): of the 80 categories
the 20 of VOC count and the others are background; pixels that two instances claim are ignored; of the training images those
remain whose instances of these categories have more than 1000 pixels in all. With other categories, each is a class, in the
order of their ids, after the background; no image is left out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deeplabzoo.data.classes import CLASS_LISTS, ClassList, Palette, default_palette
from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.image_io import MAX_PIXELS, Labels, read_image
from deeplabzoo.errors import DataError, UsageError, did_you_mean
from deeplabzoo.log import logger

_COCO_ID_OF_LABEL = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
"""Position is VOC's label; 0 is background and no category."""
_LABEL = {coco_id: label for label, coco_id in enumerate(_COCO_ID_OF_LABEL) if label}
_OFFICIAL_NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 9: "boat", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 44: "bottle", 62: "chair", 63: "couch", 64: "potted plant",
    67: "dining table", 72: "tv",
}  # fmt: skip
"""COCO's names of the categories that are VOC's; annotations with other names are not COCO 2017's."""
_MIN_PIXELS = 1000

Instance = tuple[int, Any]
"""(label, segmentation: a list of polygons x1 y1 x2 y2 ..., or run lengths of a crowd)."""


def build_split(root: Path, split: str, classes: Sequence[str] | None = None) -> "CocoDataset":
    """Open `SPLIT2017/` with `annotations/instances_SPLIT2017.json`, or the layouts in which tools export their own data.

    Those are `annotations/instances_SPLIT.json` with `SPLIT/`, `images/SPLIT/` or `images/`, and `SPLIT/_annotations.coco.json`
    beside the images; `valid` is `val`.

    Args:
        root: The folder of the dataset.
        split: `train` (for COCO 2017: selected by the rule above), `val`, or another that has annotations.
        classes: Not used: the annotations have their own.

    Raises:
        UsageError: pycocotools (the `train` extra) is not installed.
        DataError: A file or folder is missing, or the annotations are not COCO's.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError:
        raise UsageError("Drawing COCO's polygons needs pycocotools: pip install 'deeplabzoo[train]'.") from None
    for name in (split, "valid") if split == "val" else (split,):
        for annotations, images in (
            (f"annotations/instances_{name}2017.json", f"{name}2017"),
            *((f"annotations/instances_{name}.json", folder) for folder in (name, f"images/{name}", "images")),
            (f"{name}/_annotations.coco.json", name),
        ):
            if (root / annotations).is_file() and (root / images).is_dir():
                return _open(root / annotations, root / images, split)
    found = sorted(path.stem.removeprefix("instances_").removesuffix("2017") for path in root.glob("annotations/instances_*"))
    raise DataError(
        f"COCO has no split '{split}' in '{root}': expected '{split}2017/' and 'annotations/instances_{split}2017.json', or "
        f"'{split}/_annotations.coco.json'; annotations there: {', '.join(found) or 'none'}.{did_you_mean(split, found)}"
    )


def _open(annotations: Path, images: Path, split: str) -> "CocoDataset":
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        names = {int(one["id"]): str(one["name"]) for one in content.get("categories", ())}
        own = {key: name for key, name in sorted(names.items()) if name.lower() != "background"}
        known = CLASS_LISTS["coco"]
        if names and any(names.get(key) != name for key, name in _OFFICIAL_NAMES.items()):
            labels = {key: label for label, key in enumerate(own, 1)}
            known = ClassList("coco", ("background", *own.values()), default_palette(len(own) + 1))
            if known.num_classes > known.ignore_index or not all(name.isprintable() for name in own.values()):
                raise ValueError(f"{len(own)} categories, or a name that is not printable")
            logger.info(f"'{annotations}' has categories of its own: {', '.join(known.classes)}.")
            _check_own(content, names)
            frames = _read_images(content, labels, min_pixels=0)
        else:
            frames = _read_images(content, _LABEL, min_pixels=_MIN_PIXELS if split == "train" else 0)
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError, UsageError) as error:
        raise DataError(f"'{annotations}' is not an instances file of COCO: {type(error).__name__} at {error}.") from None
    if not frames:
        raise DataError(f"'{annotations}' has no image with more than {_MIN_PIXELS} pixels of VOC's categories.")
    return CocoDataset(split=split, classes=known.classes, palette=known.palette, frames=frames, images=images)


def _check_own(content: Mapping[str, Any], names: Mapping[int, str]) -> None:
    """Raise ValueError for instances that would be background unnoticed: of no category, or all without an outline."""
    instances = content["annotations"]
    unknown = sorted({int(one["category_id"]) for one in instances} - set(names))
    if unknown:
        raise ValueError(f"category_id {unknown[0]}, which 'categories' does not list")
    if instances and not any(one.get("segmentation") for one in instances):
        raise ValueError("instances that are all boxes without a segmentation")


@dataclass(frozen=True)
class CocoImage:
    """One image of the annotations: its file, its size in pixels, and the instances of VOC's categories."""

    file_name: str
    height: int
    width: int
    instances: tuple[Instance, ...]


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A dataset of annotated images; see SegmentationDataset for the meaning of its fields."""

    split: str
    classes: tuple[str, ...]
    palette: Palette
    frames: Sequence[CocoImage]
    images: Path
    name: str = "coco"
    ignore_index: int = 255
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(Path(frame.file_name).stem for frame in self.frames))

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def image_paths(self) -> dict[str, Path]:
        """Name -> image file."""
        return {name: self.images / frame.file_name for name, frame in zip(self.names, self.frames, strict=True)}

    def __getitem__(self, index: int) -> Sample:
        """Read one image and draw its labels; raises ImageError, or DataError when the annotations give another size."""
        image = read_image(self.images / self.frames[index].file_name)
        labels = self.read_labels(index)
        if labels.shape != image.shape[:2]:
            raise DataError(
                f"'{self.images / self.frames[index].file_name}' is {image.shape[:2]}, its annotations say {labels.shape} "
                "(height, width); they belong to another release of COCO."
            )
        return Sample(image=image, labels=labels, name=self.names[index])

    def read_labels(self, index: int) -> Labels:
        """Draw the labels of one image, uint8 height x width."""
        return draw_instances(self.frames[index], self.ignore_index)


def draw_instances(frame: CocoImage, ignore_index: int = 255) -> Labels:
    """Return the label of the instance that covers each pixel, 0 where none does, `ignore_index` where several do.

    A pixel belongs to a polygon by the rule of COCO's own tools. Raises DataError for a segmentation that they cannot draw.
    """
    from pycocotools import mask as coco_mask

    labels_HW = np.zeros((frame.height, frame.width), np.uint8)
    claims_HW = np.zeros((frame.height, frame.width), np.uint16)
    for label, segmentation in frame.instances:
        try:
            runs = _run_lengths(segmentation, frame)
            if not runs:
                continue  # a box without a polygon
            drawn = coco_mask.decode(runs)  # type: ignore[no-untyped-call,unused-ignore]
        except Exception as error:  # a C extension under untrusted JSON: TypeError, ValueError, MemoryError, plain Exception
            raise DataError(f"An instance of '{frame.file_name}' cannot be drawn: {error}.") from None
        covered_HW = drawn.astype(bool) if drawn.ndim == 2 else drawn.any(axis=2)
        labels_HW[covered_HW] = label
        claims_HW += covered_HW
    labels_HW[claims_HW > 1] = ignore_index
    return labels_HW


def _run_lengths(segmentation: Any, frame: CocoImage) -> Any:
    """Return pycocotools' run lengths of polygons or of run lengths, which it calls compressed where they are text."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, Mapping):
        if list(segmentation["size"]) != [frame.height, frame.width]:
            raise ValueError(f"its size is {segmentation['size']}, that of the image {[frame.height, frame.width]}")
        if isinstance(segmentation["counts"], str):
            return {"size": [frame.height, frame.width], "counts": segmentation["counts"].encode("ascii")}
    return coco_mask.frPyObjects(segmentation, frame.height, frame.width) if segmentation else None


def _read_images(content: Mapping[str, Any], labels: Mapping[int, int], *, min_pixels: int) -> list[CocoImage]:
    """Keep of the annotations (half a gigabyte for train) what the labels need, in the order of image ids."""
    instances: dict[int, list[Instance]] = {image["id"]: [] for image in content["images"]}
    pixels = dict.fromkeys(instances, 0.0)
    for one in content["annotations"]:
        label = labels.get(one["category_id"])
        if label is not None:
            instances[one["image_id"]].append((label, one["segmentation"]))
            pixels[one["image_id"]] += one.get("area", 0)
    return [
        _parse_image(image, instances[image["id"]])
        for image in sorted(content["images"], key=lambda image: image["id"])
        if not min_pixels or pixels[image["id"]] > min_pixels
    ]


def _parse_image(image: Mapping[str, Any], instances: Sequence[Instance]) -> CocoImage:
    file_name, height, width = image["file_name"], int(image["height"]), int(image["width"])
    if Path(file_name).name != file_name or height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"image {image['id']} ({file_name!r}, {width} x {height})")
    return CocoImage(file_name, height, width, tuple(instances))
