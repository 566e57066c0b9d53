"""COCO 2017 with VOC's labels, as torchvision's published segmentation weights were trained: polygons become 21 classes.

The rule (torchvision, references/segmentation/coco_utils.py): of COCO's 80 categories the 20 of VOC count and the others are
background; pixels that two instances claim are ignored; of the training images those remain whose instances of these
categories have more than 1000 pixels in all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deeplabzoo.data.classes import CLASS_LISTS, Palette
from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.image_io import Labels, read_image
from deeplabzoo.errors import DataError, UsageError, did_you_mean

_COCO_ID_OF_LABEL = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
"""Position is VOC's label; 0 is background and no category."""
_LABEL = {coco_id: label for label, coco_id in enumerate(_COCO_ID_OF_LABEL) if label}
_MIN_PIXELS = 1000

Instance = tuple[int, Any]
"""(label, segmentation: a list of polygons x1 y1 x2 y2 ..., or run lengths of a crowd)."""


def build_split(root: Path, split: str, classes: Sequence[str] | None = None) -> "CocoDataset":
    """Open `SPLIT2017/*.jpg` with `annotations/instances_SPLIT2017.json`, `train` selected by the rule above, `val` whole.

    `classes` is not looked at: these are VOC's 21. Needs pycocotools (the `train` extra). Raises DataError if a file or folder
    is missing or the annotations are not COCO's.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError:
        raise UsageError("Drawing COCO's polygons needs pycocotools: pip install 'deeplabzoo[train]'.") from None
    images, annotations = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
    if not images.is_dir() or not annotations.is_file():
        found = sorted(
            path.stem.removeprefix("instances_").removesuffix("2017") for path in root.glob("annotations/instances_*")
        )
        raise DataError(
            f"COCO has no split '{split}' in '{root}': expected '{images.name}/' and 'annotations/{annotations.name}'; "
            f"annotations there: {', '.join(found) or 'none'}.{did_you_mean(split, found)}"
        )
    known = CLASS_LISTS["coco"]
    frames = _read_images(annotations, only_large=split == "train")
    return CocoDataset(split=split, classes=known.classes, palette=known.palette, frames=frames, images=images)


@dataclass(frozen=True)
class CocoImage:
    """One image of the annotations: its file, its size in pixels, and the instances of VOC's categories."""

    file_name: str
    height: int
    width: int
    instances: tuple[Instance, ...]


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A data set of annotated images; see SegmentationDataset for the meaning of its fields."""

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
            runs = coco_mask.frPyObjects(segmentation, frame.height, frame.width)
            drawn = coco_mask.decode(runs)  # type: ignore[no-untyped-call,unused-ignore]
        except Exception as error:  # a C extension under untrusted JSON: TypeError, ValueError, MemoryError, plain Exception
            raise DataError(f"An instance of '{frame.file_name}' cannot be drawn: {error}.") from None
        covered_HW = drawn.astype(bool) if drawn.ndim == 2 else drawn.any(axis=2)
        labels_HW[covered_HW] = label
        claims_HW += covered_HW
    labels_HW[claims_HW > 1] = ignore_index
    return labels_HW


def _read_images(annotations: Path, *, only_large: bool) -> list[CocoImage]:
    """Keep of the annotations (half a gigabyte for train) what the labels need, in the order of image ids."""
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        instances: dict[int, list[Instance]] = {image["id"]: [] for image in content["images"]}
        pixels = dict.fromkeys(instances, 0.0)
        for one in content["annotations"]:
            label = _LABEL.get(one["category_id"])
            if label is not None:
                instances[one["image_id"]].append((label, one["segmentation"]))
                pixels[one["image_id"]] += one["area"]
        frames = [
            _parse_image(image, instances[image["id"]])
            for image in sorted(content["images"], key=lambda image: image["id"])
            if not only_large or pixels[image["id"]] > _MIN_PIXELS
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"'{annotations}' is not an instances file of COCO: {type(error).__name__} at {error}.") from None
    if not frames:
        raise DataError(f"'{annotations}' has no image with more than {_MIN_PIXELS} pixels of VOC's categories.")
    return frames


def _parse_image(image: Mapping[str, Any], instances: Sequence[Instance]) -> CocoImage:
    file_name, height, width = image["file_name"], int(image["height"]), int(image["width"])
    if Path(file_name).name != file_name or height < 1 or width < 1:
        raise ValueError(f"image {image['id']}")
    return CocoImage(file_name, height, width, tuple(instances))
