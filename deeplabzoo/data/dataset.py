"""The protocol of segmentation datasets, opening one by name, and splits of it."""

import fnmatch
import hashlib
import importlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deeplabzoo.data.classes import Palette
from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.errors import DataError, DeepLabZooError, UnknownNameError, UsageError, did_you_mean

_READERS = {
    "voc": "published:build_voc",
    "cityscapes": "published:build_cityscapes",
    "coco": "coco:build_split",
    "ade20k": "published:build_ade20k",
    "camvid": "published:build_camvid",
    "folder": "folder:build_split",
}
"""Name -> module of `datasets` and its function `(root, split, classes)`; imported on use, since each imports this module."""

DATASET_NAMES = tuple(_READERS)


@dataclass(frozen=True, eq=False)
class Sample:
    """One image with its labels, both at the size in which they were published."""

    image: Pixels
    """uint8 RGB, height x width x 3."""
    labels: Labels
    """uint8 or uint16 class numbers, height x width; the dataset's `ignore_index` where there is none."""
    name: str
    """The file's stem, unique within its split."""


class SegmentationDataset(Protocol):
    """Images with one class number per pixel; `data[i]` reads from disk, so it can raise ImageError and DataError."""

    @property
    def name(self) -> str:
        """`voc`, `camvid`, `folder` ..."""

    @property
    def split(self) -> str:
        """Which part, in the dataset's own word: `train`, `val` ..."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of labels 0, 1, 2 ..."""

    @property
    def palette(self) -> Palette:
        """A colour for each class."""

    @property
    def ignore_index(self) -> int:
        """The label of pixels that are not scored."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the images, in the order of their indices."""

    def __len__(self) -> int:
        """How many images there are."""

    def __getitem__(self, index: int) -> Sample:
        """Read one image and its labels."""

    def read_labels(self, index: int) -> Labels:
        """Read the labels alone, which costs far less where the image need not be decoded."""


def build_dataset(
    name: str, root: str | os.PathLike[str], split: str = "val", *, classes: Sequence[str] | None = None
) -> SegmentationDataset:
    """Open a dataset on disk; files are matched now and read later.

    Args:
        name: One of `DATASET_NAMES`.
        root: The folder that is or contains the dataset.
        split: `train`, `val` or another split that the dataset has, or parts of them: `train+val`, `train[20%]` (held out by a
            hash of the names), `train[!20%]` (the rest), `train[0006*]` (names that match a shell pattern).
        classes: Names of the classes of a `folder` without a class file of its own; the other datasets ignore it.

    Returns:
        The dataset; `data[i]` is a `Sample` of uint8 pixels, height x width x 3, and labels, height x width.

    Raises:
        UnknownNameError: No dataset has this name.
        UsageError: A split written in parts cannot be read, or its percentage is outside (0, 100).
        DataError: A folder is missing, the split is unknown, a part is empty, or a file has no counterpart.
    """
    if name not in _READERS:
        known = ", ".join(DATASET_NAMES)
        raise UnknownNameError(f"No dataset is called '{name}'; known are {known}.{did_you_mean(name, DATASET_NAMES)}")
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"The data folder '{folder}' {'is a file' if folder.exists() else 'does not exist'}; check --root.")
    module, function = _READERS[name].split(":")
    reader = importlib.import_module(f"deeplabzoo.data.datasets.{module}")

    def open_split(split: str) -> SegmentationDataset:
        data: SegmentationDataset = getattr(reader, function)(folder, split, classes)
        return data

    return _open_parts(split, open_split) if "+" in split or "[" in split else open_split(split)


def find_dataset(
    name: str, split: str, folder: Path, classes: Sequence[str], predicate: Callable[[SegmentationDataset], bool]
) -> SegmentationDataset | None:
    """Return the first dataset of a name, in `folder` or a folder directly in it, for which `predicate` holds; else None.

    `classes` names those of a `folder` without a classes.txt. Files are listed, and none is read.
    """
    return next(filter(predicate, _candidates(name, split, folder, classes)), None)


def _candidates(name: str, split: str, folder: Path, classes: Sequence[str]) -> Iterator[SegmentationDataset]:
    for root in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        try:
            yield build_dataset(name, root, split, classes=classes)
        except DeepLabZooError:  # another dataset, which is no reason to stop
            continue


# Splits: by a list of names, by a fraction that depends on the names alone, or written as parts of other splits.


VAL_FRACTION = 0.2
"""Fraction that becomes `val` where a folder has neither split folders nor lists."""


def read_list(file: Path) -> list[str]:
    """Return the names in a text file, one a line, suffixes and empty lines dropped; DataError for repeats or an empty list."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(f"The list '{file}' cannot be read: {reason}; expected one image name a line.") from None
    names = [_stem(line.strip()) for line in lines if line.strip()]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise DataError(f"'{file}' lists '{repeated[0]}' more than once ({len(repeated)} such names); list each image once.")
    if not names:
        raise DataError(f"'{file}' is empty; expected one image name a line.")
    return names


def hold_out(names: Iterable[str], fraction: float = VAL_FRACTION, seed: int = 0) -> frozenset[str]:
    """Choose `fraction` of the names, rounded, at least one and never all: a function of names and seed, not of their order.

    The names with the smallest hashes are taken, so adding an image to a dataset moves at most one other across the line, and
    two machines agree without exchanging a list. Raises UsageError for a fraction outside (0, 1) or fewer than two names.
    """
    by_hash = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    if not 0 < fraction < 1:
        raise UsageError(f"The held-out fraction must lie between 0 and 1, not {fraction!r}.")
    if len(by_hash) < 2:
        raise UsageError(f"Holding out a fraction needs two images or more, but there is {len(by_hash)}.")
    count = min(max(1, math.floor(len(by_hash) * fraction + 0.5)), len(by_hash) - 1)
    return frozenset(by_hash[:count])


def split_hash(names: Iterable[str]) -> str:
    """Return the SHA-256 of the sorted names, one a line: the fact by which a manifest row says what a model was trained on."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


class Subset:
    """Some samples of a dataset, in the order of `names`, under another split name; DataError for names that it lacks."""

    def __init__(self, data: SegmentationDataset, names: Sequence[str], split: str) -> None:
        position = {name: index for index, name in enumerate(data.names)}
        for name in names:
            if name not in position:
                near = did_you_mean(name, position)
                raise DataError(f"Split '{split}' lists '{name}', but {data.name} {data.split} has no such image.{near}")
        if not names:
            raise DataError(f"Split '{split}' of {data.name} would be empty; list at least one image.")
        self._data = data
        self._indices = [position[name] for name in names]
        self.name: str = data.name
        self.split = split
        self.classes: tuple[str, ...] = data.classes
        self.palette: Palette = data.palette
        self.ignore_index: int = data.ignore_index
        self.names: tuple[str, ...] = tuple(names)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._data[self._indices[index]]

    def read_labels(self, index: int) -> Labels:
        """Read the labels alone."""
        return self._data.read_labels(self._indices[index])


class JoinedDataset:
    """Several splits of one dataset, one after the other; DataError where their classes differ or they share an image."""

    def __init__(self, parts: Sequence[SegmentationDataset], split: str) -> None:
        first = parts[0]
        if any((part.classes, part.ignore_index) != (first.classes, first.ignore_index) for part in parts):
            raise DataError(
                f"The parts of split '{split}' of {first.name} have different classes; join splits with the same classes."
            )
        self._samples = [(part, index) for part in parts for index in range(len(part))]
        self.name: str = first.name
        self.split = split
        self.classes: tuple[str, ...] = first.classes
        self.palette: Palette = first.palette
        self.ignore_index: int = first.ignore_index
        self.names: tuple[str, ...] = tuple(name for part in parts for name in part.names)
        repeated = sorted(name for name, count in Counter(self.names).items() if count > 1)
        if repeated:
            raise DataError(
                f"Split '{split}' holds {len(repeated)} images in more than one of its parts, such as '{repeated[0]}'; "
                "write parts that do not overlap."
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        part, position = self._samples[index]
        return part[position]

    def read_labels(self, index: int) -> Labels:
        """Read the labels alone."""
        part, position = self._samples[index]
        return part.read_labels(position)


def select_part(data: SegmentationDataset, part: str) -> Subset:
    """Return a part of a dataset.

    Frames of one video are nearly alike, so that a pattern which holds out a whole sequence measures more than a percentage.

    Args:
        data: The dataset.
        part: `20%` (held out by the hashes of names), a shell pattern of names, or `!` and either of them for the rest.

    Raises:
        UsageError: The percentage is outside (0, 100).
        DataError: The part would be empty.

    >>> from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
    >>> [len(select_part(SyntheticShapes("train", (64, 80), 10), part)) for part in ("20%", "!20%")]
    [2, 8]
    """
    selection = part.removeprefix("!")
    percentage = re.fullmatch(r"(\d+(?:\.\d+)?)%", selection)
    if percentage:
        selected = hold_out(data.names, float(percentage[1]) / 100)
    else:
        selected = frozenset(name for name in data.names if fnmatch.fnmatchcase(name, selection))
    names = [name for name in data.names if (name in selected) != part.startswith("!")]
    return Subset(data, names, f"{data.split}[{part}]")


def _open_parts(split: str, open_split: Callable[[str], SegmentationDataset]) -> SegmentationDataset:
    """Open a split that is written in parts, each by its plain name."""
    parts = [_open_part(text.strip(), open_split) for text in split.split("+")]
    return parts[0] if len(parts) == 1 else JoinedDataset(parts, split)


def _open_part(text: str, open_split: Callable[[str], SegmentationDataset]) -> SegmentationDataset:
    found = re.fullmatch(r"([^\[\]]+)(?:\[(.+)\])?", text)
    if found is None:
        raise UsageError(
            f"The split '{text}' cannot be read; expected NAME, NAME[20%], NAME[PATTERN], NAME[!20%] or NAME[!PATTERN]."
        )
    data = open_split(found[1])
    return data if found[2] is None else select_part(data, found[2])


def _stem(name: str) -> str:
    """Drop an image's suffix, but not what follows a dot inside a name such as `frame.0001`."""
    path = Path(name)
    return path.stem if path.suffix.lower() in _SUFFIXES else path.name


_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
