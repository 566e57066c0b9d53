"""CamVid as the SegNet tutorial lays it out: 11 classes, `SPLIT/` pictures beside `SPLITannot/` masks."""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.data.image_mask_dataset import ImageMaskDataset, default_label_map, pair_folders
from deeplabzoo.errors import DataError, did_you_mean

_VOID = 11
"""What the mask files write for unlabelled pixels; read as the ignore index, as is 255."""


def build_split(root: Path, split: str, classes: Sequence[str] | None = None) -> ImageMaskDataset:
    """Open `ROOT/SPLIT` with `ROOT/SPLITannot`, for a root that is, or contains, the CamVid folder.

    `classes` is not looked at: CamVid has its 11. Raises DataError if a folder is missing or a file has no partner.
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
        label_map=default_label_map(known.num_classes, void=(_VOID, 255), ignore_index=known.ignore_index),
        ignore_index=known.ignore_index,
    )
