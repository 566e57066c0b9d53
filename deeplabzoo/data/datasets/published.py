"""Readers of the published datasets: PASCAL VOC 2012, Cityscapes, ADE20K and CamVid, each in its official layout."""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.data.image_mask_dataset import ImageMaskDataset, default_label_map, pair_folders, pair_listed
from deeplabzoo.errors import DataError, did_you_mean

# PASCAL VOC 2012 segmentation in its official layout (host.robots.ox.ac.uk/pascal/VOC/voc2012, development kit section 6).


def build_voc(root: Path, split: str, classes: Sequence[str] | None = None) -> ImageMaskDataset:
    """Open the images that `ImageSets/Segmentation/SPLIT.txt` lists, below a root that is, or contains, VOCdevkit/VOC2012.

    Masks come from SegmentationClass, or from SegmentationClassAug (VOC and SBD merged) where the split's name ends in `aug` or
    the mask of its first image exists there only.
    `classes` is not used: VOC has its 21. Raises DataError if the layout is not there or a listed file is missing.
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
        raise DataError(f"The list '{list_file}' is empty; expected one image name a line.")
    plain, merged = home / "SegmentationClass", home / "SegmentationClassAug"
    only_merged = not (plain / f"{stems[0]}.png").is_file() and (merged / f"{stems[0]}.png").is_file()
    masks = merged if split.endswith("aug") or only_merged else plain
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


# Cityscapes with fine annotations: the official `labelIds` files, read as the 19 classes that are evaluated. The ids are mapped
# here, so that no converted masks are needed and training on raw ids is impossible (hszhao/PSPNet#39, fregu856/deeplabv3#5).


_CITYSCAPES_EVALUATED_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Position is the train id; labels.py of cityscapesScripts."""
_CITYSCAPES_IDS = range(34)
_CITYSCAPES_IGNORE = 255

ID_TO_TRAIN_ID: dict[int, int] = {
    **dict.fromkeys(_CITYSCAPES_IDS, _CITYSCAPES_IGNORE),
    **{label_id: train_id for train_id, label_id in enumerate(_CITYSCAPES_EVALUATED_IDS)},
}
"""Value in a labelIds file (0 to 33) -> label 0 to 18, or 255 for the classes that are not evaluated."""

_CITYSCAPES_IMAGE, _CITYSCAPES_MASK = "_leftImg8bit", "_gtFine_labelIds"


def build_cityscapes(root: Path, split: str, classes: Sequence[str] | None = None) -> ImageMaskDataset:
    """Open `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` with `gtFine/SPLIT/CITY/*_gtFine_labelIds.png`, named as without suffix.

    `classes` is not used: Cityscapes has its 19. Raises DataError if the layout is not there or a file has no partner; the
    official test split holds no labels, and is refused.
    """
    images, masks = root / "leftImg8bit", root / "gtFine"
    if not images.is_dir() or not masks.is_dir():
        raise DataError(
            f"'{root}' is not Cityscapes: expected the folders leftImg8bit and gtFine, unpacked from its two zip files."
        )
    found = sorted(one.name for one in images.iterdir() if (masks / one.name).is_dir() and one.name != "test")
    if split not in found:
        there = ", ".join(found) or "none"
        raise DataError(f"Cityscapes has no labelled split '{split}' in '{root}', only {there}.{did_you_mean(split, found)}")
    image_files, mask_files = (
        _files_by_frame(images / split, _CITYSCAPES_IMAGE),
        _files_by_frame(masks / split, _CITYSCAPES_MASK),
    )
    unpaired = sorted(image_files.keys() ^ mask_files.keys())
    if unpaired or not image_files:
        what = f"{len(unpaired)} frames have no partner, the first '{unpaired[0]}'" if unpaired else "there are no frames"
        raise DataError(
            f"Each *{_CITYSCAPES_IMAGE}.png in '{images / split}' needs a *{_CITYSCAPES_MASK}.png in '{masks / split}', "
            f"but {what}."
        )
    known = CLASS_LISTS["cityscapes"]
    return ImageMaskDataset(
        name="cityscapes",
        split=split,
        classes=known.classes,
        palette=known.palette,
        files={frame: (path, mask_files[frame]) for frame, path in image_files.items()},
        label_map=ID_TO_TRAIN_ID,
        ignore_index=known.ignore_index,
    )


def _files_by_frame(folder: Path, ending: str) -> dict[str, Path]:
    """Return `aachen_000000_000019` -> file for every city below `folder`, in the order of names; any suffix."""
    files = sorted(path for path in folder.glob(f"*/*{ending}.*") if not path.name.startswith("."))
    return {path.stem.removesuffix(ending): path for path in files}


# ADE20K in its scene-parsing release: grey PNGs where 1 to 150 are the classes and 0 is everything else, which is not scored.


_ADE20K_FOLDERS = {"train": "training", "val": "validation"}
"""Our word for a split -> the folder's name in ADEChallengeData2016."""
_ADE20K_OTHER = 0


def build_ade20k(root: Path, split: str, classes: Sequence[str] | None = None) -> ImageMaskDataset:
    """Open `images/training` with `annotations/training` (`train`), `validation` (`val`), or both folders unsplit (`all`).

    The root is, or contains, ADEChallengeData2016. `classes` is not used: the benchmark has its 150. Raises DataError if
    the layout is not there or a file has no partner.
    """
    home = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    part = _ADE20K_FOLDERS.get(split, "" if split == "all" else split)
    images, masks = home / "images" / part, home / "annotations" / part
    if not images.is_dir() or not masks.is_dir():
        raise DataError(
            f"ADE20K has no '{images}' with '{masks}'; expected the folders images and annotations of ADEChallengeData2016, "
            "with training and validation in them (splits train and val), or with the files themselves (split all)."
        )
    known = CLASS_LISTS["ade20k"]
    return ImageMaskDataset(
        name="ade20k",
        split=split,
        classes=known.classes,
        palette=known.palette,
        files=pair_folders(images, masks),
        label_map={_ADE20K_OTHER: known.ignore_index, **{label + 1: label for label in range(known.num_classes)}},
        ignore_index=known.ignore_index,
    )


# CamVid as the SegNet tutorial lays it out: 11 classes, `SPLIT/` images beside `SPLITannot/` masks.


_CAMVID_VOID = 11
"""What the mask files write for unlabelled pixels; read as the ignore index, as is 255."""


def build_camvid(root: Path, split: str, classes: Sequence[str] | None = None) -> ImageMaskDataset:
    """Open `ROOT/SPLIT` with `ROOT/SPLITannot`, for a root that is, or contains, the CamVid folder.

    `classes` is not used: CamVid has its 11. Raises DataError if a folder is missing or a file has no partner.
    """
    home = root if (root / f"{split}annot").is_dir() or not (root / "CamVid").is_dir() else root / "CamVid"
    if not (home / split).is_dir() or not (home / f"{split}annot").is_dir():
        found = sorted(one.name for one in home.iterdir() if (home / f"{one.name}annot").is_dir())
        raise DataError(
            f"CamVid has no split '{split}' in '{home}': expected the folders '{split}' and '{split}annot'; "
            f"splits there: {', '.join(found) or 'none'}.{did_you_mean(split, found)}"
        )
    known = CLASS_LISTS["camvid"]
    return ImageMaskDataset(
        name="camvid",
        split=split,
        classes=known.classes,
        palette=known.palette,
        files=pair_folders(home / split, home / f"{split}annot"),
        label_map=default_label_map(known.num_classes, void=(_CAMVID_VOID, 255), ignore_index=known.ignore_index),
        ignore_index=known.ignore_index,
    )
