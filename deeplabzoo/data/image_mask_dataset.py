"""Datasets of image and mask files: pairing the files of two folders, and reading a pair with every check."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deeplabzoo.data.classes import Palette
from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.image_io import Labels, read_header, read_image_and_orientation, read_mask, warn_once_per_folder
from deeplabzoo.errors import DataError

_NOT_DATA = {"thumbs.db", "desktop.ini"}
_SHOWN = 5
_SAME_SIZE_ORIENTATIONS = (2, 3, 4)
"""EXIF orientations that mirror or turn an image without swapping height and width."""
_WORDS = "masks?|labels?|seg|segmentation|gt|annotation|labelids|labeltrainids|images?|img|sat|rgb|leftimg8bit"
_MASK_WORDS_AT_START = re.compile(rf"^(?:{_WORDS})[_-]", re.IGNORECASE)
_MASK_WORDS_AT_END = re.compile(rf"(?:[_-](?:{_WORDS}|L|gtfine))+$", re.IGNORECASE)


def default_label_map(num_classes: int, void: Iterable[int] = (255,), ignore_index: int = 255) -> dict[int, int]:
    """Return the usual coding of mask files: class i stands as i, and each of `void` becomes `ignore_index`."""
    return {**{label: label for label in range(num_classes)}, **dict.fromkeys(void, ignore_index)}


@dataclass(frozen=True, eq=False)
class ImageMaskDataset:
    """A dataset of image and mask files; see SegmentationDataset for the meaning of its fields."""

    name: str
    split: str
    classes: tuple[str, ...]
    palette: Palette
    files: Mapping[str, tuple[Path, Path]]
    """Stem -> (image, mask)."""
    label_map: Mapping[int, int]
    """Value in a mask file -> label; a value that is not listed is an error."""
    ignore_index: int = 255
    read_values: Callable[[Path], Labels] = read_mask
    """Reads a mask file into the values that `label_map` explains."""
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.files))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Read one pair; raises ImageError, or DataError when sizes differ or the mask has values outside the classes."""
        name = self.names[index]
        image_path, mask_path = self.files[name]
        image, orientation = read_image_and_orientation(image_path)
        labels = self.read_labels(index)
        if labels.shape != image.shape[:2]:
            raise DataError(
                f"The mask '{mask_path}' is {labels.shape[1]} x {labels.shape[0]} pixels but its image '{image_path}' is "
                f"{image.shape[1]} x {image.shape[0]} (width x height, upright); they must be of one size."
            )
        if orientation in _SAME_SIZE_ORIENTATIONS or (orientation != 1 and labels.shape[0] == labels.shape[1]):
            header = read_header(mask_path)
            if header is None or header.orientation != orientation:
                warn_once_per_folder(
                    image_path,
                    "orientation",
                    f"'{image_path}' is turned upright by its EXIF orientation {orientation}, '{mask_path}' has none: the "
                    "mask is taken to be upright. If it was drawn on the image as stored, save such images again without EXIF.",
                )
        return Sample(image=image, labels=labels, name=name)

    def read_labels(self, index: int) -> Labels:
        """Read one mask; raises ImageError, or UnknownLabelValuesError when it has values outside the classes."""
        _, mask_path = self.files[self.names[index]]
        return map_labels(self.read_values(mask_path), self.label_map, mask_path)


class UnknownLabelValuesError(DataError):
    """A mask holds `values` (numbers, or colours as #rrggbb) that are no label.

    They have a default because loader workers rebuild errors from the sentence.
    """

    def __init__(self, message: str, values: Sequence[int | str] = ()) -> None:
        super().__init__(message)
        self.values = tuple(values)


def map_labels(values_HW: Labels, label_map: Mapping[int, int], path: Path) -> Labels:
    """Turn the values of a mask file into labels; raises UnknownLabelValuesError naming the file and values without a label."""
    if all(value == label for value, label in label_map.items()) and _has_all_values(values_HW, label_map):
        return values_HW
    counts = np.bincount(values_HW.reshape(-1))
    found = np.flatnonzero(counts).tolist()
    outside = [value for value in found if value not in label_map]
    if outside:
        listed = ", ".join(f"{value} in {counts[value]} pixel{'s' if counts[value] > 1 else ''}" for value in outside[:_SHOWN])
        more = f" and {len(outside) - _SHOWN} values more" if len(outside) > _SHOWN else ""
        hint = "; JPEG blurs label numbers, save masks as PNG" if path.suffix.lower() in (".jpg", ".jpeg") else ""
        message = f"The mask '{path}' has label value {listed}{more}; expected {_ranges(label_map)}{hint}."
        raise UnknownLabelValuesError(message, outside)
    if all(label_map[value] == value for value in found):
        return values_HW
    table = np.zeros(len(counts), values_HW.dtype)
    table[found] = [label_map[value] for value in found]
    return table[values_HW]


def _has_all_values(values_HW: Labels, label_map: Mapping[int, int]) -> bool:
    """Whether a coding has every value: by comparing with the ends of its few ranges, a tenth of the time of counting."""
    inside = np.zeros(values_HW.shape, np.bool_)
    for low, high in _contiguous_ranges(label_map):
        inside |= (values_HW >= low) & (values_HW <= high)
    return bool(inside.all())


def files_by_stem(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by stem, in the order of their names; hidden files are no data.

    Raises DataError if the folder does not exist, or two files have the same stem.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder '{folder}'.")
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        names = sorted(one.name for one in entries if _is_file_or_broken_link(one))
    for name in names:
        if name.startswith(".") or name.lower() in _NOT_DATA:
            continue
        path = folder / name
        if path.stem in found:
            raise DataError(f"'{found[path.stem]}' and '{path}' have the same stem; keep one, since masks are found by stem.")
        found[path.stem] = path
    return found


def _is_file_or_broken_link(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file, or a link that leads nowhere or to itself: reading names it, training would leave it out."""
    return os.path.isfile(entry.path) or (entry.is_symlink() and not os.path.exists(entry.path))


def pair_folders(images: Path, masks: Path) -> dict[str, tuple[Path, Path]]:
    """Return stem -> (image, mask) for two folders that must hold the same stems, whatever their suffixes.

    Folders that hold folders alone are searched, and stems are then paths. Where no stem is in both, words such as `_mask` and
    `_image` are left out (`a.jpg` with `a_mask.png`). Raises DataError naming the files that stand alone, or an empty folder.
    """
    image_files, mask_files = _files_below(images), _files_below(masks)
    if not image_files and not mask_files:
        raise DataError(f"The folders '{images}' and '{masks}' are empty.")
    return pair_files(image_files, mask_files, images, masks)


def pair_files(
    image_files: Mapping[str, Path], mask_files: Mapping[str, Path], images: Path, masks: Path
) -> dict[str, tuple[Path, Path]]:
    """Return stem -> (image, mask) for the files of two folders by stem; raises DataError naming the files that stand alone."""
    if not set(image_files) & set(mask_files):
        short_images, short_masks = ({strip_mask_words(stem): stem for stem in one} for one in (image_files, mask_files))
        if (
            len(short_images) == len(image_files)
            and len(short_masks) == len(mask_files)
            and set(short_images) & set(short_masks)
        ):
            mask_files = {short_images.get(short, stem): mask_files[stem] for short, stem in short_masks.items()}
    unpaired_images = [path.name for stem, path in image_files.items() if stem not in mask_files]
    unpaired_masks = [path.name for stem, path in mask_files.items() if stem not in image_files]
    if unpaired_images or unpaired_masks:
        parts = []
        if unpaired_images:
            parts.append(f"{_abbreviated(unpaired_images)} in '{images}' without a mask in '{masks}'")
        if unpaired_masks:
            parts.append(f"{_abbreviated(unpaired_masks)} in '{masks}' without an image in '{images}'")
        raise DataError(f"Images and masks pair by stem, but there is {' and '.join(parts)}.")
    return {stem: (path, mask_files[stem]) for stem, path in image_files.items()}


def strip_mask_words(stem: str) -> str:
    """Return a stem without the words by which the names of images and masks differ.

    >>> strip_mask_words("0001_mask"), strip_mask_words("mask-7"), strip_mask_words("12_sat")
    ('0001', '7', '12')
    """
    return _MASK_WORDS_AT_END.sub("", _MASK_WORDS_AT_START.sub("", stem)) or stem


def _files_below(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by stem, or of the folders in it by path where it has no files of its own."""
    found = files_by_stem(folder)
    if found:
        return found
    for below in sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")):
        found |= {f"{below.name}/{stem}": path for stem, path in _files_below(below).items()}
    return found


def pair_listed(stems: Sequence[str], images: Path, masks: Path, list_file: Path) -> dict[str, tuple[Path, Path]]:
    """Return stem -> (image, mask) for the stems of a list; raises DataError if one is listed twice or has a file missing."""
    # CVAT puts the files of a subset into folders of the list's name.
    images, masks = (below if (below := folder / list_file.stem).is_dir() else folder for folder in (images, masks))
    image_files, mask_files = files_by_stem(images), files_by_stem(masks)
    repeated = sorted(stem for stem, count in Counter(stems).items() if count > 1)
    if repeated:
        raise DataError(f"'{list_file}' lists {_abbreviated(repeated)} more than once; every image counts once.")
    for kind, files, folder in (("image", image_files, images), ("mask", mask_files, masks)):
        missing = [stem for stem in stems if stem not in files]
        if missing:
            raise DataError(
                f"{len(missing)} of the {len(stems)} images in '{list_file}' have no {kind} in '{folder}': "
                f"{_abbreviated(missing)}; complete the data, or list the images that are there."
            )
    return {stem: (image_files[stem], mask_files[stem]) for stem in stems}


def _abbreviated(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _ranges(label_map: Mapping[int, int]) -> str:
    """`0..20 or 255` for the values of a coding."""
    return " or ".join(str(low) if low == high else f"{low}..{high}" for low, high in _contiguous_ranges(label_map))


def _contiguous_ranges(label_map: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return the unbroken runs of a coding's values, each by its ends."""
    values = sorted(label_map)
    starts = [value for value in values if value - 1 not in label_map]
    ends = [value for value in values if value + 1 not in label_map]
    return list(zip(starts, ends, strict=True))
