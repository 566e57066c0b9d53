"""Cityscapes with fine annotations: the official `labelIds` files, read as the 19 classes that are evaluated.

The table from ids to train ids lives here, so nobody has to write converted masks beside the data and none can train on raw ids
(hszhao/PSPNet#39, fregu856/deeplabv3#5).
"""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.data.image_mask_dataset import ImageMaskDataset
from deeplabzoo.errors import DataError, did_you_mean

_EVALUATED_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Position is the train id; labels.py of cityscapesScripts."""
_ALL_IDS = range(34)
_IGNORE = 255

ID_TO_TRAIN_ID: dict[int, int] = {
    **dict.fromkeys(_ALL_IDS, _IGNORE),
    **{label_id: train_id for train_id, label_id in enumerate(_EVALUATED_IDS)},
}
"""Value in a labelIds file (0 to 33) -> label 0 to 18, or 255 for the classes that are not evaluated."""

_IMAGE, _MASK = "_leftImg8bit", "_gtFine_labelIds"


def build_split(root: Path, split: str, classes: Sequence[str] | None = None) -> ImageMaskDataset:
    """Open `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` with `gtFine/SPLIT/CITY/*_gtFine_labelIds.png`, named as without suffix.

    `classes` is not looked at: Cityscapes has its 19. Raises DataError if the layout is not there or a file has no partner; the
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
    image_files, mask_files = _files_by_frame(images / split, _IMAGE), _files_by_frame(masks / split, _MASK)
    unpaired = sorted(image_files.keys() ^ mask_files.keys())
    if unpaired or not image_files:
        what = f"{len(unpaired)} frames have no partner, the first '{unpaired[0]}'" if unpaired else "there are no frames"
        raise DataError(f"Each *{_IMAGE}.png in '{images / split}' needs a *{_MASK}.png in '{masks / split}', but {what}.")
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
