"""ADE20K in its scene-parsing release: grey PNGs where 1 to 150 are the classes and 0 is everything else, which is not scored.

Id maps of other data sets, such as COCO-Stuff's with its gaps, are read by the `folder` data set with `id=` in its classes.txt.
"""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.data.image_mask_dataset import ImageMaskDataset, pair_folders
from deeplabzoo.errors import DataError

_FOLDERS = {"train": "training", "val": "validation"}
"""Our word for a split -> the folder's name in ADEChallengeData2016."""
_OTHER = 0


def build_split(root: Path, split: str, classes: Sequence[str] | None = None) -> ImageMaskDataset:
    """Open `images/training` with `annotations/training` (`train`), `validation` (`val`), or both folders unsplit (`all`).

    The root is, or contains, ADEChallengeData2016. `classes` is not looked at: the benchmark has its 150. Raises DataError if
    the layout is not there or a file has no partner.
    """
    home = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    part = _FOLDERS.get(split, "" if split == "all" else split)
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
        label_map={_OTHER: known.ignore_index, **{label + 1: label for label in range(known.num_classes)}},
        ignore_index=known.ignore_index,
    )
