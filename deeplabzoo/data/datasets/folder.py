"""A data set of one's own: a folder of images and a folder of masks."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from deeplabzoo.data.class_file import ClassFile, read_class_file, read_colour_mask
from deeplabzoo.data.classes import ClassList, default_palette
from deeplabzoo.data.dataset import hold_out, read_list
from deeplabzoo.data.image_io import Labels, read_header, read_mask
from deeplabzoo.data.image_mask_dataset import ImageMaskDataset, default_label_map, files_by_stem, pair_folders, pair_listed
from deeplabzoo.errors import DataError
from deeplabzoo.log import logger

UNSPLIT = "all"
"""The split's name where a data set is not split."""

_MASKS_INSPECTED = 32
_LOSSY_SUFFIXES = (".jpg", ".jpeg")


def build_split(root: Path, split: str, classes: Sequence[str] | None = None) -> ImageMaskDataset:
    """Open one split of a folder, in the first of these forms that is there.

    - `ROOT/SPLIT/images` with `ROOT/SPLIT/masks`;
    - `ROOT/images` with `ROOT/masks` and a list of names `ROOT/SPLIT.txt`;
    - the same two folders without any list: `all` is everything, `val` a fifth chosen by name, `train` the rest (said aloud).

    Class names come from ROOT/classes.txt (see class_file), or else from `classes`. Masks hold 0, 1, 2 ... and 255 for void, or
    the ids or RGB colours of classes.txt; with two classes they may instead hold 0 and 255 only: then that is class 1 (said).
    Raises DataError if a folder is missing, a file has no partner, or no class names are known.
    """
    files, masks = _files(root, split)
    lossy = [mask for _, mask in files.values() if mask.suffix.lower() in _LOSSY_SUFFIXES]
    if lossy:
        logger.info(
            f"{len(lossy)} masks in '{masks}' are JPEG ({lossy[0].name}), which changes numbers at outlines; save PNGs."
        )
    known = _classes(root, classes)
    label_map = known.label_map
    read: Callable[[Path], Labels] = read_mask
    if known.colours is not None and _is_coloured(next(mask for _, mask in files.values())):
        label_map, read = default_label_map(len(known.classes)), partial(read_colour_mask, colours=known.colours)
    elif len(known.classes) == 2 and 1 in label_map and _is_binary_255(mask for _, mask in files.values()):
        logger.info(f"The masks in '{masks}' hold 0 and 255; 255 is read as class 1 ({known.classes[1]}), not as void.")
        label_map = {0: 0, 255: 1}
    return ImageMaskDataset(
        name="folder",
        split=split,
        classes=known.classes,
        palette=known.palette,
        files=files,
        label_map=label_map,
        read_values=read,
    )


def _files(root: Path, split: str) -> tuple[dict[str, tuple[Path, Path]], Path]:
    """Return stem -> (image, mask) of one split, and the folder of masks."""
    home = root / split
    if (home / "images").is_dir() and (home / "masks").is_dir():
        return pair_folders(home / "images", home / "masks"), home / "masks"
    images, masks = root / "images", root / "masks"
    if images.is_dir() and masks.is_dir():
        lists = _lists(root)
        if split in lists:
            return pair_listed(read_list(lists[split]), images, masks, lists[split]), masks
        files = pair_folders(images, masks)
        if split == UNSPLIT:
            return files, masks
        if split in ("train", "val") and list_splits(root) == ["train", "val"]:
            return _split_by_name(files, root, split), masks
    choices = ", ".join(_choices(root)) or "none"
    raise DataError(f"There is no '{home / 'images'}' with '{home / 'masks'}' beside it; splits in '{root}': {choices}.")


def list_splits(root: Path) -> list[str]:
    """Return the splits of a folder in the order train, val, then by name; those made by fraction where nothing names any."""
    named = {one.name for one in root.iterdir() if _is_split(one)}
    whole = _is_split(root)
    named |= set(_lists(root)) if whole else set()
    if not named and whole:
        return ["train", "val"] if len(files_by_stem(root / "images")) > 1 else [UNSPLIT]
    return sorted(named, key=lambda name: (name != "train", name != "val", name))


def _is_split(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _lists(root: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(root.glob("*.txt")) if path.name != "classes.txt" and path.is_file()}


def _choices(root: Path) -> list[str]:
    return list(dict.fromkeys([*list_splits(root), *([UNSPLIT] if _is_split(root) else [])]))


def _split_by_name(files: dict[str, tuple[Path, Path]], root: Path, split: str) -> dict[str, tuple[Path, Path]]:
    held = hold_out(files)
    logger.info(
        f"'{root}' has neither split folders nor train.txt and val.txt: {len(held)} of {len(files)} pictures, by name, are val."
    )
    return {stem: pair for stem, pair in files.items() if (stem in held) == (split == "val")}


def _classes(root: Path, classes: Sequence[str] | None) -> ClassFile:
    file = root / "classes.txt"
    if file.is_file():
        return read_class_file(file)
    if classes is None:
        raise DataError(f"The classes of '{root}' have no names; write them into '{file}', one a line, label 0 first.")
    known = ClassList("folder", tuple(classes), default_palette(len(classes)))
    return ClassFile(known.classes, known.palette, default_label_map(known.num_classes), None)


def _is_coloured(mask: Path) -> bool:
    """Whether a mask is an RGB picture; the first one decides for all. What cannot be opened is named when it is read."""
    header = read_header(mask)
    return header is not None and header.mode in ("RGB", "RGBA")


def _is_binary_255(masks: Iterable[Path]) -> bool:
    """Whether 255 means class 1: it does if masks have it and none has a 1.

    Stops at the first 1, or at the 32nd mask with 255; a later mask that says otherwise is then an error when it is read.
    """
    with_255 = 0
    for path in masks:
        values = set(np.unique(read_mask(path)).tolist())
        if 1 in values:
            return False
        with_255 += 255 in values
        if with_255 == _MASKS_INSPECTED:
            break
    return with_255 > 0
