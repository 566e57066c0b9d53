"""PASCAL VOC 2012 segmentation in its official layout (host.robots.ox.ac.uk/pascal/VOC/voc2012, development kit section 6)."""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.data.image_mask_dataset import ImageMaskDataset, default_label_map, pair_listed
from deeplabzoo.errors import DataError, did_you_mean


def build_split(root: Path, split: str, classes: Sequence[str] | None = None) -> ImageMaskDataset:
    """Open the pictures that `ImageSets/Segmentation/SPLIT.txt` lists, below a root that is, or contains, VOCdevkit/VOC2012.

    Masks come from SegmentationClass, or from SegmentationClassAug where the split's name ends in `aug` (VOC and SBD merged).
    `classes` is not looked at: VOC has its 21. Raises DataError if the layout is not there or a listed file is missing.
    """
    home = find_voc_root(root)
    lists = home / "ImageSets" / "Segmentation"
    list_file = lists / f"{split}.txt"
    if not list_file.is_file():
        found = sorted(path.stem for path in lists.glob("*.txt"))
        raise DataError(
            f"VOC has no split '{split}' in '{lists}', only {', '.join(found) or 'none'}.{did_you_mean(split, found)}"
        )
    stems = list_file.read_text(encoding="utf-8").split()
    if not stems:
        raise DataError(f"The list '{list_file}' is empty; expected one picture name a line.")
    masks = home / ("SegmentationClassAug" if split.endswith("aug") else "SegmentationClass")
    known = CLASS_LISTS["voc"]
    return ImageMaskDataset(
        name="voc",
        split=split,
        classes=known.classes,
        palette=known.palette,
        files=pair_listed(stems, home / "JPEGImages", masks, list_file),
        label_map=default_label_map(known.num_classes),
        ignore_index=known.ignore_index,
    )


def find_voc_root(root: Path) -> Path:
    """Return the folder VOC2012 that `root` is or contains; raises DataError if there is none."""
    for home in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (home / "ImageSets" / "Segmentation").is_dir():
            return home
    raise DataError(
        f"'{root}' is not VOC 2012: expected a folder that is, or contains, VOCdevkit/VOC2012 with ImageSets/Segmentation, "
        "JPEGImages and SegmentationClass."
    )
