"""Which pictures train and which are held out: by a list of names, or by a fraction that depends on the names alone."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from deeplabzoo.data.dataset import Sample, SegmentationDataset
from deeplabzoo.data.image_io import Labels
from deeplabzoo.data.palettes import Palette
from deeplabzoo.errors import DataError, UsageError, did_you_mean

VAL_FRACTION = 0.2
"""Fraction that becomes `val` where a folder has neither split folders nor lists."""


def read_list(file: Path) -> list[str]:
    """Return the names in a text file, one a line, suffixes and empty lines dropped; DataError for repeats or an empty list."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        told = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(f"The list '{file}' cannot be read: {told}; expected one picture name a line.") from None
    names = [_stem(line.strip()) for line in lines if line.strip()]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise DataError(f"'{file}' lists '{repeated[0]}' more than once ({len(repeated)} such names); list each picture once.")
    if not names:
        raise DataError(f"'{file}' is empty; expected one picture name a line.")
    return names


def hold_out(names: Iterable[str], fraction: float = VAL_FRACTION, seed: int = 0) -> frozenset[str]:
    """Choose `fraction` of the names, rounded, at least one and never all: a function of names and seed, not of their order.

    The names with the smallest hashes are taken, so adding a picture to a data set moves at most one other across the line, and
    two machines agree without exchanging a list. Raises UsageError for a fraction outside (0, 1) or fewer than two names.
    """
    by_hash = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    if not 0 < fraction < 1:
        raise UsageError(f"The held-out fraction must lie between 0 and 1, not {fraction!r}.")
    if len(by_hash) < 2:
        raise UsageError(f"Holding out a fraction needs two pictures or more, but there is {len(by_hash)}.")
    count = min(max(1, math.floor(len(by_hash) * fraction + 0.5)), len(by_hash) - 1)
    return frozenset(by_hash[:count])


def split_hash(names: Iterable[str]) -> str:
    """Return the SHA-256 of the sorted names, one a line: the fact by which a manifest row says what a model was trained on."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


class Subset:
    """Some samples of a data set, in the order of `names`, under another split name; DataError for names that it lacks."""

    def __init__(self, data: SegmentationDataset, names: Sequence[str], split: str) -> None:
        position = {name: index for index, name in enumerate(data.names)}
        for name in names:
            if name not in position:
                near = did_you_mean(name, position)
                raise DataError(f"Split '{split}' lists '{name}', but {data.name} {data.split} has no such picture.{near}")
        if not names:
            raise DataError(f"Split '{split}' of {data.name} would be empty; list at least one picture.")
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


def _stem(name: str) -> str:
    """Drop a picture's suffix, but not what follows a dot inside a name such as `frame.0001`."""
    path = Path(name)
    return path.stem if path.suffix.lower() in _SUFFIXES else path.name


_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
