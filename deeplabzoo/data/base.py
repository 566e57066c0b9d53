"""What a data set for segmentation is, and opening one by name."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deeplabzoo.data.images import Labels, Pixels
from deeplabzoo.data.palettes import Palette
from deeplabzoo.errors import DataError, UnknownNameError, did_you_mean

_READERS = {
    "voc": "deeplabzoo.data.voc",
    "cityscapes": "deeplabzoo.data.cityscapes",
    "coco": "deeplabzoo.data.coco",
    "ade20k": "deeplabzoo.data.ade20k",
    "camvid": "deeplabzoo.data.camvid",
    "folder": "deeplabzoo.data.folder",
}
"""Name -> module whose `open_split(root, split, classes)` reads it; imported on use, since each of them imports this one."""

DATA_NAMES = tuple(_READERS)


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture with its labels, both at the size in which they were published."""

    image: Pixels
    """uint8 RGB, height x width x 3."""
    labels: Labels
    """uint8 or uint16 class numbers, height x width; the data set's `ignore_index` where there is none."""
    name: str
    """The file's stem, unique within its split."""


class SegmentationData(Protocol):
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


def open_data(
    name: str, root: str | os.PathLike[str], split: str = "val", *, classes: Sequence[str] | None = None
) -> SegmentationData:
    """Open a data set on disk by one of DATA_NAMES; files are matched now and read later.

    `classes` names the classes of a `folder` that has no classes.txt of its own; the others know theirs and ignore it.
    Raises UnknownNameError for another name and DataError for a missing folder, an unknown split or an unpaired file.
    """
    if name not in _READERS:
        known = ", ".join(DATA_NAMES)
        raise UnknownNameError(f"No data set is called '{name}'; known are {known}.{did_you_mean(name, DATA_NAMES)}")
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"The data folder '{folder}' {'is a file' if folder.exists() else 'does not exist'}; check --root.")
    data: SegmentationData = importlib.import_module(_READERS[name]).open_split(folder, split, classes)
    return data
