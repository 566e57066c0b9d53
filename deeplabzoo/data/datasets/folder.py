"""Your own dataset: folders of images and of masks, in the layouts that people and annotation tools use."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from deeplabzoo.data.class_file import CLASS_FILES, ClassFile, MaskReader, read_class_file
from deeplabzoo.data.classes import ClassList, default_palette
from deeplabzoo.data.dataset import hold_out, read_list
from deeplabzoo.data.image_io import read_header, read_mask
from deeplabzoo.data.image_mask_dataset import (
    ImageMaskDataset,
    default_label_map,
    pair_files,
    pair_folders,
    pair_listed,
    strip_mask_words,
)
from deeplabzoo.data.image_sources import IMAGE_SUFFIXES
from deeplabzoo.errors import DataError, DeepLabZooError
from deeplabzoo.log import logger

UNSPLIT = "all"
"""The split's name where a dataset is not split."""

_UNSPLIT_LIST = "default"
"""The list that CVAT writes for a task without splits."""

_SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""A word in the name of a folder or list -> the split."""
_IMAGE_WORDS = {"images", "image", "img", "imgs", "jpegimages", "photos"}
_MASK_WORDS = {
    *("masks", "mask", "labels", "label", "annotations", "annotation", "ann", "annot", "gt", "groundtruth"),
    *("segmentationclasspng", "segmentationclass", "segmentations", "segmentation", "seg"),
}
_NEUTRAL_WORDS = {"dir", "set", "data"}
_JOINED_WORDS = re.compile(r"\b(training|train|validation|valid|val|testing|test)(?=image|mask|label|annot)", re.IGNORECASE)
_FOLDER_DEPTH = 2
_MASKS_INSPECTED = 32
_LOSSY_SUFFIXES = (".jpg", ".jpeg")
_MASK_SUFFIXES = (".png", ".npy", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".jpg", ".jpeg", ".pgm")

Pairs = dict[str, tuple[Path, Path]]


def build_split(root: Path, split: str, classes: Sequence[str] | None = None) -> ImageMaskDataset:
    """Open one split of a folder, in the first of these layouts that is there.

    - `ROOT/SPLIT/images` with `ROOT/SPLIT/masks`;
    - `ROOT/images` with `ROOT/masks` and a list of names `ROOT/SPLIT.txt`;
    - folders whose names differ in the words for images and masks alone: `images/train` and `masks/train`, `img_dir/train` and
      `ann_dir/train`, `Train_Images` and `Train_Masks`, `train` and `train_masks`; `valid` and `validation` are `val`;
    - VOC's `JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation/SPLIT.txt`;
    - `ROOT/SPLIT` with `NAME.jpg` beside `NAME_mask.png`;
    - images and masks without any split: `all` is everything, `val` a fifth chosen by name, `train` the rest (logged).

    Class names come from a class file in ROOT or ROOT/SPLIT (see `read_class_file`), or else from `classes`. Masks hold 0, 1, 2
    ... and 255 for void, or the ids or colours of the class file; with two classes they may instead hold 0 and 255 only: then
    255 is class 1 (logged).

    Raises:
        DataError: A folder is missing, a file has no counterpart, or no class names are known.
    """
    given, root = root, _data_root(root)
    files, masks = _files(root, split)
    lossy = [mask for _, mask in files.values() if mask.suffix.lower() in _LOSSY_SUFFIXES]
    if lossy:
        logger.warning(
            f"{len(lossy)} masks in '{masks}' are JPEG ({lossy[0].name}), which changes numbers at outlines; save PNGs."
        )
    known = _classes((root, masks, masks.parent, given), classes)
    label_map = known.label_map
    if len(known.classes) == 1:
        raise DataError(
            f"'{root}' names one class, '{known.classes[0]}'; name what is around it, too, on a line before it: background."
        )
    grey_is_colour = False
    if known.colours is not None:
        grey_is_colour = any(_is_coloured(mask) for _, mask in files.values())
    elif len(known.classes) == 2 and not known.has_ids and label_map.get(1) == 1:
        label_map = _binary_label_map([mask for _, mask in files.values()], label_map)
        if label_map == _BINARY_255:
            logger.info(f"The masks in '{masks}' hold 0 and 255; 255 is read as class 1 ({known.classes[1]}), not as void.")
    labels = default_label_map(len(known.classes))
    return ImageMaskDataset(
        name="folder",
        split=split,
        classes=known.classes,
        palette=known.palette,
        files=files,
        label_map={value: value for value in (*labels, *label_map.values())},
        read_values=MaskReader(label_map, known.colours, grey_is_colour),
    )


def list_splits(root: Path) -> list[str]:
    """Return the splits of a folder in the order train, val, then by name; those made by fraction where nothing names any."""
    root = _data_root(root)
    named = {_SPLIT_WORDS.get(one.name, one.name) for one in root.iterdir() if _is_split(one)}
    whole = _unsplit_folders(root)
    named |= set(_lists(root, whole[0])) if whole else set()
    named = (named - {_UNSPLIT_LIST}) or {split for split, _, _ in _split_folders(root)}
    if not named and whole:
        return ["train", "val"] if len(_pair(*whole)) > 1 else [UNSPLIT]
    return sorted(named, key=lambda name: (name != "train", name != "val", name))


def _data_root(root: Path) -> Path:
    """Return the folder that has the data: `root`, or VOCdevkit/VOC2012 or the only folder in it, as archives unpack."""
    for _ in range(_FOLDER_DEPTH):
        if (root / "images").is_dir() or (root / "JPEGImages").is_dir():
            break
        entries = [one for one in root.iterdir() if one.is_dir() and not one.name.startswith((".", "__"))]
        if len(entries) != 1 or _files_beside(root) or _is_split(entries[0]) or _words(entries[0].name)[1:] != ("", None):
            break
        root = entries[0]
    return root


def _files(root: Path, split: str) -> tuple[Pairs, Path]:
    """Return stem -> (image, mask) of one split, and the folder of masks."""
    for name in (split, *(name for name, meaning in _SPLIT_WORDS.items() if meaning == split and name != split)):
        home = root / name
        if _is_split(home):
            return pair_folders(home / "images", home / "masks"), home / "masks"
    whole = _unsplit_folders(root)
    if whole is not None:
        images, masks = whole
        lists = _lists(root, images)
        if split in lists:
            return pair_listed(read_list(lists[split]), images, masks, lists[split]), masks
        if split == UNSPLIT:
            return _pair(images, masks), masks
        if split in ("train", "val") and list_splits(root) == ["train", "val"] and not list(_split_folders(root)):
            return _split_by_name(_pair(images, masks), root, split), masks
    found = [(images, masks) for name, images, masks in _split_folders(root) if name == split]
    if len(found) > 1:
        listed = ", ".join(f"'{images}'" for images, _ in found)
        raise DataError(f"Several folders of '{root}' hold images of '{split}': {listed}; keep one of them there.")
    if found:
        images, masks = found[0]
        return _pair(images, masks), masks
    choices = ", ".join(dict.fromkeys([*list_splits(root), *([UNSPLIT] if whole else [])])) or "none"
    raise DataError(
        f"There is no '{root / split / 'images'}' with '{root / split / 'masks'}' beside it, nor images and masks of '{split}' "
        f"in another known layout (docs/data.md); splits in '{root}': {choices}.{_other_annotations(root)}"
    )


def _is_split(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _words(name: str) -> tuple[str, str, str | None]:
    """Return (the rest of a path's words, `image`, `mask` or nothing, its split) of a relative path such as `Train_Images`.

    >>> _words("img_dir/train"), _words("Train_Masks")
    (('', 'image', 'train'), ('', 'mask', 'train'))
    """
    kind, split = "", None
    rest: list[str] = []
    for word in re.split(r"[^a-z0-9]+", _JOINED_WORDS.sub(r"\1_", name).lower()):
        if word in _SPLIT_WORDS and split is None:
            split = _SPLIT_WORDS[word]
        elif word in _MASK_WORDS:
            kind = "mask"
        elif word in _IMAGE_WORDS and kind != "mask":
            kind = "image"
        elif word and word not in _NEUTRAL_WORDS:
            rest.append(word)
    return "_".join(rest), kind, split


def _folders_below(root: Path, depth: int = _FOLDER_DEPTH) -> Iterator[Path]:
    if depth:
        for folder in sorted(one for one in root.iterdir() if one.is_dir() and not one.name.startswith(".")):
            yield folder
            yield from _folders_below(folder, depth - 1)


def _split_folders(root: Path) -> list[tuple[str, Path, Path]]:
    """Return (split, images, masks) of folders below `root` whose names differ in the words for images and masks alone."""
    images: dict[tuple[str, str], Path] = {}
    masks: dict[tuple[str, str], Path] = {}
    for folder in _folders_below(root):
        rest, kind, split = _words(str(folder.relative_to(root)))
        if split is None or not _has_files(folder):
            continue
        if kind == "mask":
            masks.setdefault((split, rest), folder)
        elif kind == "image" or (split, rest) not in images:
            images[split, rest] = folder
    found = [(key[0], images[key], masks[key]) for key in sorted(images) if key in masks]
    paired = {folder for _, folder, _ in found}
    found = [one for one in found if not paired & set(one[1].parents)]  # folders in folders are read with those above
    alone = [(key[0], folder, folder) for key, folder in sorted(images.items()) if key not in masks and _files_beside(folder)]
    return found or alone


def _has_files(folder: Path) -> bool:
    """Whether a folder has image files or masks, in it or in folders of it."""
    return any(Path(name).suffix.lower() in _MASK_SUFFIXES for _, _, names in os.walk(folder) for name in names)


def _unsplit_folders(root: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and masks directly in a folder, by whatever words they are called; None without a pair."""
    if _is_split(root):
        return root / "images", root / "masks"
    named = [(one, _words(one.name)) for one in sorted(root.iterdir()) if one.is_dir() and not one.name.startswith(".")]
    images = [one for one, words in named if words == ("", "image", None)]
    masks = [one for one, words in named if words in (("", "mask", None), ("class", "mask", None)) and _has_files(one)]
    direct = [one for one in masks if one.name == "SegmentationClassPNG"] or masks
    if len(images) == 1 and direct:
        return images[0], direct[0]
    return next(((one, one) for one in (root, *images) if _files_beside(one)), None)


def _files_beside(folder: Path) -> dict[str, Path]:
    """Return image stem -> mask of a folder that holds both: `a.jpg` beside `a_mask.png`."""
    files = sorted(folder.iterdir())
    stems = {path.stem for path in files if path.suffix.lower() in IMAGE_SUFFIXES}
    masks = ((strip_mask_words(path.stem), path) for path in files if path.suffix.lower() in _MASK_SUFFIXES)
    return {stem: path for stem, path in masks if stem != path.stem and stem in stems}


def _pair(images: Path, masks: Path) -> Pairs:
    """Pair the files of two folders, or of one that holds both."""
    if images != masks:
        return pair_folders(images, masks)
    beside = _files_beside(images)
    files = {path.stem: path for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    return pair_files({stem: path for stem, path in files.items() if path not in beside.values()}, beside, images, masks)


def _lists(root: Path, images: Path) -> dict[str, Path]:
    """Return split -> list. A text file is a list if it is called like a split or names an image; a README is none."""
    files = [*sorted(root.glob("*.txt")), *sorted((root / "ImageSets" / "Segmentation").glob("*.txt"))]
    found: dict[str, Path] = {}
    stems: set[str] | None = None
    for path in files:
        if path.name in CLASS_FILES or not path.is_file():
            continue
        name = _SPLIT_WORDS.get(path.stem.lower(), path.stem)
        if name not in _SPLIT_WORDS.values():
            stems = {one.stem for one in images.rglob("*")} if stems is None else stems
            try:
                if not stems & set(read_list(path)):
                    continue
            except DeepLabZooError:
                continue
        found.setdefault(name, path)
    return found


def _split_by_name(files: Pairs, root: Path, split: str) -> Pairs:
    held = hold_out(files)
    logger.info(
        f"'{root}' has neither split folders nor train.txt and val.txt: {len(held)} of {len(files)} images, by name, are val."
    )
    return {stem: pair for stem, pair in files.items() if (stem in held) == (split == "val")}


def _other_annotations(root: Path) -> str:
    """Return a hint for annotations that are no masks; empty where there are none."""
    if next(root.rglob("*.json"), None) is not None:
        return " JSON annotations are not read here: export masks, or COCO's format for --data coco."
    return ""


def _classes(folders: Sequence[Path], classes: Sequence[str] | None) -> ClassFile:
    for folder in folders:
        for name in CLASS_FILES:
            if (folder / name).is_file():
                return read_class_file(folder / name)
    if classes is None:
        raise DataError(
            f"The classes of '{folders[0]}' have no names; write them into '{folders[0] / CLASS_FILES[0]}', one a line, "
            "label 0 first."
        )
    known = ClassList("folder", tuple(classes), default_palette(len(classes)))
    return ClassFile(known.classes, known.palette, default_label_map(known.num_classes), None)


def _is_coloured(mask: Path) -> bool:
    """Whether a mask is an RGB image; one that cannot be opened is named when it is read."""
    header = None if mask.suffix.lower() == ".npy" else read_header(mask)
    return header is not None and header.mode in ("RGB", "RGBA")


_BINARY_255 = {0: 0, 255: 1}


def _binary_label_map(masks: Iterable[Path], label_map: Mapping[int, int]) -> dict[int, int]:
    """Return what the numbers of masks of two classes mean: 0 and 1 with 255 for void, or 0 and 255.

    Reads masks until one holds 1 and 255, or 32 hold something other than 0. Raises DataError where some hold 0 and 1, others 0
    and 255, and none both: in half of them the object would be void. A mask among the others is an error when it is read.
    """
    with_1: Path | None = None
    with_255: Path | None = None
    inspected = 0
    for path in masks:
        try:
            counts = np.bincount(read_mask(path).reshape(-1), minlength=256)
        except DeepLabZooError:
            continue  # named when it is read
        if counts[1] and counts[255] and not counts[2:255].any():
            return dict(label_map)
        blurred = counts[2:64].any() or counts[192:255].any()
        if counts[1] and not blurred:
            with_1 = with_1 or path
        elif counts[192:].any() and counts[64:192].sum() < counts.sum() / 5:
            with_255 = with_255 or path
        inspected += bool(counts[1:].any())
        if inspected == _MASKS_INSPECTED:
            break
    if with_1 is not None and with_255 is not None:
        raise DataError(
            f"The mask '{with_1}' holds 0 and 1, '{with_255}' holds 0 and 255: save all masks with the same numbers, or write "
            "'id=0' and 'id=1' behind the class names if 255 is void."
        )
    return dict(_BINARY_255) if with_255 is not None else dict(label_map)
