"""Look at every mask before the first step: on a GPU a wrong label is an assertion without a file name.

The count also says how unbalanced the classes are, which is what a black prediction usually comes from.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deeplabzoo.data.dataset import SegmentationDataset, build_dataset
from deeplabzoo.data.datasets.folder import list_splits
from deeplabzoo.data.image_io import Labels
from deeplabzoo.data.image_mask_dataset import UnknownLabelValuesError
from deeplabzoo.errors import DataError, ImageError

_SHOWN = 5
_MAX_LISTED = 50
_THREADS = 4

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LabelCounts:
    """How often each class occurs in a split; arrays have one entry a class."""

    classes: tuple[str, ...]
    images: int
    pixels: Counts
    """Pixels of each class."""
    present_pixels: Counts
    """Labelled pixels of all images that hold the class: what median-frequency weights divide by."""
    present_images: Counts
    """Images that hold the class."""
    ignored_pixels: int

    def table(self) -> str:
        """Return a table, one class a line: share of the labelled pixels, number of images, and what is ignored."""
        total = max(1, int(self.pixels.sum()))
        width = max(len(name) for name in (*self.classes, "ignored"))
        lines = [f"{'class':<{width}}  {'pixels':>7}  images"]
        lines += [
            f"{name:<{width}}  {pixels / total:>7.2%}  {images:>6}{'  never occurs' if not images else ''}"
            for name, pixels, images in zip(self.classes, self.pixels, self.present_images, strict=True)
        ]
        fraction = self.ignored_pixels / max(1, total + self.ignored_pixels)
        return "\n".join([*lines, f"{'ignored':<{width}}  {fraction:>7.2%}  of all pixels"])


def count_labels(
    data: SegmentationDataset,
    *,
    progress: Callable[[int], object] | None = None,
    skipped: Callable[[ImageError], object] | None = None,
) -> LabelCounts:
    """Read every mask of a data set and count its labels; `progress` is called with the number read so far.

    A mask that cannot be read raises its ImageError; or else `skipped` is called with that, and the mask is not counted.

    Raises DataError that names the masks with values outside the classes (the first five with the values, 50 more by name) and
    says what such values usually mean; or that no pixel is labelled at all.
    """
    num_classes = len(data.classes)
    pixels, present_pixels, present_images = (np.zeros(num_classes, np.int64) for _ in range(3))
    ignored = unread = 0
    unknown: dict[str, UnknownLabelValuesError] = {}
    with ThreadPoolExecutor(_THREADS) as threads:  # decoding happens outside Python's lock
        for done, counts in enumerate(threads.map(lambda index: _count_file(data, index), range(len(data))), 1):
            if isinstance(counts, UnknownLabelValuesError):
                unknown[data.names[done - 1]] = counts
            elif isinstance(counts, ImageError):
                if skipped is None:
                    raise counts
                unread += 1
                skipped(counts)
            else:
                labelled, void = counts
                pixels += labelled
                present_pixels[labelled > 0] += labelled.sum()
                present_images += labelled > 0
                ignored += void
            if progress is not None:
                progress(done)
    if unknown:
        raise DataError(_error_message(unknown, data))
    if not pixels.any():
        raise DataError(f"No pixel of {data.name} {data.split} is labelled: every value is the ignored {data.ignore_index}.")
    return LabelCounts(data.classes, len(data) - unread, pixels, present_pixels, present_images, ignored)


def _count_file(data: SegmentationDataset, index: int) -> tuple[Counts, int] | UnknownLabelValuesError | ImageError:
    """Return (pixels of each class, ignored pixels) of one mask, or what is wrong with it."""
    try:
        labels = data.read_labels(index)
        return _count(labels, data, index)
    except (UnknownLabelValuesError, ImageError) as error:
        return error


def _count(labels_HW: Labels, data: SegmentationDataset, index: int) -> tuple[Counts, int]:
    num_classes = len(data.classes)
    counts = np.bincount(labels_HW.reshape(-1), minlength=num_classes)
    void = int(counts[data.ignore_index]) if data.ignore_index < len(counts) else 0
    outside = [int(value) for value in np.flatnonzero(counts[num_classes:]) + num_classes if value != data.ignore_index]
    if outside:
        raise UnknownLabelValuesError(
            f"'{data.names[index]}' has label value {', '.join(map(str, outside[:_SHOWN]))}.", outside
        )
    return counts[:num_classes].astype(np.int64), void


def _error_message(unknown: Mapping[str, UnknownLabelValuesError], data: SegmentationDataset) -> str:
    in_files = Counter(value for one in unknown.values() for value in one.values)
    values = ", ".join(f"{value} in {count} file{'s' if count > 1 else ''}" for value, count in in_files.most_common(_SHOWN))
    listed = " ".join(str(one) for one in list(unknown.values())[:_SHOWN])
    named = list(unknown)[_SHOWN : _SHOWN + _MAX_LISTED]
    unnamed = len(unknown) - _SHOWN - len(named)
    more = f" Likewise {', '.join(named)}{f' and {unnamed} more' if unnamed > 0 else ''}." if named else ""
    return (
        f"{len(unknown)} of {len(data)} masks of {data.name} {data.split} hold values outside the {len(data.classes)} classes "
        f"({values}).{_explain_values({value for value in in_files if isinstance(value, int)}, len(data.classes))} {listed}{more}"
    )


def _explain_values(values: set[int], num_classes: int) -> str:
    """Say what masks with such values usually are."""
    if not values:
        return ""
    if values == {num_classes}:
        return f" Are the labels numbered from 1, or is there a class more than the {num_classes} named ones?"
    if values == {255}:
        return " Did you mean a binary mask of 0 and 255? That is read as such where there are two classes."
    if num_classes == 2 and min(values) > 1:
        return " Did you mean a binary mask? Then save it with the two values 0 and 255, without antialiasing."
    if len(values) > 2 or max(values) > 2 * num_classes:
        return " Did you mean a palette PNG (label numbers), and these are grey levels of a coloured or antialiased picture?"
    return " Are there more classes than were named?"


# A folder of one's own looked at before training: every pair opened, every label counted, no picture in two splits.


def check_folder(root: Path) -> str:
    """Read every picture and mask of a `folder` and return what is there, a table for each split.

    Training would find the same faults, but the size of a picture only when it comes to it. Raises DataError or ImageError with
    the first fault: a missing partner, a mask of another size, labels outside the classes, a picture in two splits, no train
    or no val.
    """
    splits = list_splits(root)
    for needed in ("train", "val"):
        if needed not in splits:
            raise DataError(f"'{root}' has no split '{needed}' to train with; splits there: {', '.join(splits) or 'none'}.")
    tables: list[str] = []
    home: dict[str, str] = {}
    for split in splits:
        data = build_dataset("folder", root, split)
        counts = count_labels(data)
        twice = next((name for name in data.names if name in home), None)
        if twice is not None:
            raise DataError(
                f"The picture '{twice}' is in '{home[twice]}' and in '{split}'; what is trained on cannot be measured."
            )
        home |= dict.fromkeys(data.names, split)
        sizes = [data[index].labels.shape for index in range(len(data))]  # a pair of two sizes is an error of its own
        low, high = (pick(sizes, key=lambda hw: hw[0] * hw[1]) for pick in (min, max))
        between = f"{low[1]} x {low[0]}" + (f" to {high[1]} x {high[0]}" if high != low else "")
        tables.append(f"{split}: {len(data)} pictures of {between} pixels\n{counts.table()}")
    return "\n\n".join(tables)
