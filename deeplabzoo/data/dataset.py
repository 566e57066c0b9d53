"""What a data set for segmentation is, and opening one by name."""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.data.palettes import Palette
from deeplabzoo.errors import DataError, DeepLabZooError, UnknownNameError, did_you_mean

_READERS = {
    "voc": "deeplabzoo.data.datasets.voc",
    "cityscapes": "deeplabzoo.data.datasets.cityscapes",
    "coco": "deeplabzoo.data.datasets.coco",
    "ade20k": "deeplabzoo.data.datasets.ade20k",
    "camvid": "deeplabzoo.data.datasets.camvid",
    "folder": "deeplabzoo.data.datasets.folder",
}
"""Name -> module whose `build_split(root, split, classes)` reads it; imported on use, since each of them imports this one."""

DATASET_NAMES = tuple(_READERS)


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture with its labels, both at the size in which they were published."""

    image: Pixels
    """uint8 RGB, height x width x 3."""
    labels: Labels
    """uint8 or uint16 class numbers, height x width; the data set's `ignore_index` where there is none."""
    name: str
    """The file's stem, unique within its split."""


class SegmentationDataset(Protocol):
    """Pictures with one class number per pixel; `data[i]` reads from disk, so it can raise ImageError and DataError."""

    @property
    def name(self) -> str:
        """`voc`, `camvid`, `folder` ..."""

    @property
    def split(self) -> str:
        """Which part, in the data set's own word: `train`, `val` ..."""

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
        """Names of the pictures, in the order of their indices."""

    def __len__(self) -> int:
        """How many pictures there are."""

    def __getitem__(self, index: int) -> Sample:
        """Read one picture and its labels."""

    def read_labels(self, index: int) -> Labels:
        """Read the labels alone, which costs far less where the picture need not be decoded."""


def build_dataset(
    name: str, root: str | os.PathLike[str], split: str = "val", *, classes: Sequence[str] | None = None
) -> SegmentationDataset:
    """Open a data set on disk by one of DATASET_NAMES; files are matched now and read later.

    `classes` names the classes of a `folder` that has no classes.txt of its own; the others know theirs and ignore it.
    Raises UnknownNameError for another name and DataError for a missing folder, an unknown split or an unpaired file.
    """
    if name not in _READERS:
        known = ", ".join(DATASET_NAMES)
        raise UnknownNameError(f"No data set is called '{name}'; known are {known}.{did_you_mean(name, DATASET_NAMES)}")
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"The data folder '{folder}' {'is a file' if folder.exists() else 'does not exist'}; check --root.")
    data: SegmentationDataset = importlib.import_module(_READERS[name]).build_split(folder, split, classes)
    return data


# Finding a data set among folders: the one whose split has the pictures that are asked for.


def find_dataset(
    name: str, split: str, folder: Path, classes: Sequence[str], predicate: Callable[[SegmentationDataset], bool]
) -> SegmentationDataset | None:
    """Return the first data set of a name, in `folder` or a folder directly in it, whose split is `predicate`; None without one.

    `classes` names those of a `folder` without a classes.txt. Files are listed, and none is read.
    """
    return next(filter(predicate, _candidates(name, split, folder, classes)), None)


def _candidates(name: str, split: str, folder: Path, classes: Sequence[str]) -> Iterator[SegmentationDataset]:
    for root in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        try:
            yield build_dataset(name, root, split, classes=classes)
        except DeepLabZooError:  # another data set, which is no reason to stop
            continue
