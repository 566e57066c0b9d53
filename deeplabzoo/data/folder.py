"""A data set of one's own: a folder of images and a folder of masks."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from deeplabzoo.data.classes import ClassList
from deeplabzoo.data.images import read_mask
from deeplabzoo.data.pairs import Pairs, codes_of, pair_folders
from deeplabzoo.data.palettes import default_palette
from deeplabzoo.errors import DataError
from deeplabzoo.say import say

WHOLE = "all"
"""The split's name where a data set is not split."""

_ENOUGH_MASKS = 32


def open_split(root: Path, split: str, classes: Sequence[str] | None = None) -> Pairs:
    """Open `ROOT/SPLIT/images` with `ROOT/SPLIT/masks`, or `ROOT/images` with `ROOT/masks` as the split `all`.

    Class names are the lines of ROOT/classes.txt, or else `classes`. Masks hold 0, 1, 2 ... and 255 for void; with two classes
    they may instead hold 0 and 255 only, which is then class 1 (and said). Raises DataError if a folder is missing, a file has
    no partner, or no class names are known.
    """
    images, masks = _folders(root, split)
    names = _class_names(root, classes)
    files = pair_folders(images, masks)
    codes = codes_of(len(names))
    if len(names) == 2 and _black_and_white(mask for _, mask in files.values()):
        say(f"The masks in '{masks}' hold 0 and 255; 255 is read as class 1 ({names[1]}), not as void.")
        codes = {0: 0, 255: 1}
    known = ClassList("folder", names, default_palette(len(names)))
    return Pairs(
        name="folder",
        split=split,
        classes=known.classes,
        palette=known.palette,
        files=files,
        codes=codes,
        ignore_index=known.ignore_index,
    )


def _folders(root: Path, split: str) -> tuple[Path, Path]:
    home = root / split
    if split == WHOLE and not home.is_dir():
        home = root
    if (home / "images").is_dir() and (home / "masks").is_dir():
        return home / "images", home / "masks"
    splits = sorted(one.name for one in root.iterdir() if (one / "images").is_dir() and (one / "masks").is_dir())
    if (root / "images").is_dir() and (root / "masks").is_dir():
        splits.append(WHOLE)
    raise DataError(
        f"There is no '{home / 'images'}' with '{home / 'masks'}' beside it; splits in '{root}': {', '.join(splits) or 'none'}."
    )


def _class_names(root: Path, classes: Sequence[str] | None) -> tuple[str, ...]:
    file = root / "classes.txt"
    if not file.is_file():
        if classes is None:
            raise DataError(f"The classes of '{root}' have no names; write them into '{file}', one a line, label 0 first.")
        return tuple(classes)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"'{file}' is not UTF-8 text; expected one class name a line.") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise DataError(f"'{file}' is empty; expected one class name a line, label 0 first.")
    return names


def _black_and_white(masks: Iterable[Path]) -> bool:
    """Whether 255 means class 1: it does if masks have it and none has a 1.

    Stops at the first 1, or at the 32nd mask with 255; a later mask that says otherwise is then an error when it is read.
    """
    with_255 = 0
    for path in masks:
        values = set(np.unique(read_mask(path)).tolist())
        if 1 in values:
            return False
        with_255 += 255 in values
        if with_255 == _ENOUGH_MASKS:
            break
    return with_255 > 0
