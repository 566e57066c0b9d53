"""Finding a data set among folders: the one whose split has the pictures that are asked for."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deeplabzoo.data.base import SegmentationData, open_data
from deeplabzoo.errors import DeepLabZooError


def find_data(
    name: str, split: str, folder: Path, classes: Sequence[str], wanted: Callable[[SegmentationData], bool]
) -> SegmentationData | None:
    """Return the first data set of a name, in `folder` or a folder directly in it, whose split is `wanted`; None without one.

    `classes` names those of a `folder` without a classes.txt. Files are listed, and none is read.
    """
    return next(filter(wanted, _opened(name, split, folder, classes)), None)


def _opened(name: str, split: str, folder: Path, classes: Sequence[str]) -> Iterator[SegmentationData]:
    for root in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        try:
            yield open_data(name, root, split, classes=classes)
        except DeepLabZooError:  # another data set, which is no reason to stop
            continue
