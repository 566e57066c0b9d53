"""Checks of labels and splits before training.

On a GPU a wrong label is an assertion without a file name. The class counts also show how unbalanced the classes are, the most
common reason for predictions of a single class.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deeplabzoo.data.dataset import SegmentationDataset, build_dataset
from deeplabzoo.data.datasets.folder import list_splits
from deeplabzoo.data.image_io import Labels
from deeplabzoo.data.image_mask_dataset import UnknownLabelValuesError
from deeplabzoo.errors import DataError, ImageError, printable
from deeplabzoo.log import logger

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
        names = [printable(name) for name in self.classes]  # those of a checkpoint may hold control characters
        width = max(len(name) for name in (*names, "ignored"))
        lines = [f"{'class':<{width}}  {'pixels':>7}  images"]
        lines += [
            f"{name:<{width}}  {pixels / total:>7.2%}  {images:>6}{'  never occurs' if not images else ''}"
            for name, pixels, images in zip(names, self.pixels, self.present_images, strict=True)
        ]
        fraction = self.ignored_pixels / max(1, total + self.ignored_pixels)
        return "\n".join([*lines, f"{'ignored':<{width}}  {fraction:>7.2%}  of all pixels"])


def count_labels(
    data: SegmentationDataset,
    *,
    progress: Callable[[int], object] | None = None,
    skipped: Callable[[ImageError], object] | None = None,
) -> LabelCounts:
    """Read every mask of a dataset and count its labels; `progress` is called with the number read so far.

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
        f"({values}).{_explain_values({one for one in in_files if isinstance(one, int)}, len(data.classes))} {listed}{more}"
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
        return " Did you mean a palette PNG (label numbers), and these are grey levels of a coloured or antialiased image?"
    return " Are there more classes than were named?"


# Checks of whole datasets before training.


def check_splits_differ(first: SegmentationDataset, second: SegmentationDataset) -> None:
    """Raise DataError where two splits have other classes, or an image of one is in the other: same name, same content.

    Equal names with different content are two images. Equal content under two names is logged as a warning.
    """
    if first.classes != second.classes:
        raise DataError(
            f"'{first.split}' has the classes {', '.join(first.classes)}, '{second.split}' has {', '.join(second.classes)}; "
            "expected the same in the same order: the label of a class is its position."
        )
    files = [_image_paths(data) for data in (first, second)]
    if not all(files):  # not a dataset of files: only names can be compared
        both = set(first.names) & set(second.names)
        if both:
            raise DataError(f"{len(both)} images are in both '{first.split}' and '{second.split}', such as '{min(both)}'.")
        return
    contents = _contents([list(one.values()) for one in files])
    for name in sorted(set(files[0]) & set(files[1])):
        image, other = files[0][name], files[1][name]
        if contents[0].get(image, image) == contents[1].get(other, other):
            raise DataError(
                f"The image '{name}' is in '{first.split}' and in '{second.split}' ('{image}', '{other}'); remove one of them, "
                "since scores on images of the training split say nothing about new ones."
            )
    originals = {content: image for image, content in contents[0].items()}
    copies = [(originals[content], other) for other, content in contents[1].items() if content in originals]
    if copies:
        logger.warning(
            f"{second.split} has {len(copies)} image{'s' if len(copies) > 1 else ''} of {first.split} by another name, such as "
            f"'{copies[0][1]}' and '{copies[0][0]}' (equal bytes): scores on them say nothing about new images."
        )


def _image_paths(data: SegmentationDataset) -> dict[str, Path]:
    """Return name -> image file; empty for a dataset that is not made of files."""
    pairs: Mapping[str, tuple[Path, Path]] = getattr(data, "files", {})
    return {name: image for name, (image, _) in pairs.items()} or dict(getattr(data, "image_paths", {}))


def _contents(groups: Sequence[Sequence[Path]]) -> list[dict[Path, str]]:
    """Return the SHA-256 of each file whose size occurs in both groups; the others are not read."""
    sizes: list[dict[Path, int]] = []
    for group in groups:
        sizes.append({})
        for path in group:
            with contextlib.suppress(OSError):  # named when it is read
                sizes[-1][path] = path.stat().st_size
    common = set(sizes[0].values()) & set(sizes[1].values())
    return [{path: digest for path, size in one.items() if size in common and (digest := _sha256(path))} for one in sizes]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def check_folder(root: Path) -> str:
    """Read every image and mask of a `folder` and return a report with a table for each split.

    Training would find the same faults, but the size of an image only when it reads it.

    Args:
        root: The folder, as `build_dataset("folder", root)` takes it.

    Returns:
        The number and sizes of images of each split, and the fraction of pixels of each class.

    Raises:
        DataError: The first fault: a missing counterpart, a mask of another size, labels outside the classes, an image in two
            splits, no train or no val.
        ImageError: A file that cannot be read.
    """
    splits = list_splits(root)
    for needed in ("train", "val"):
        if not splits:
            build_dataset("folder", root, needed)  # raises the error that names the layouts
        if needed not in splits:
            raise DataError(f"'{root}' has no split '{needed}' to train with; splits there: {', '.join(splits) or 'none'}.")
    tables: list[str] = []
    earlier: list[SegmentationDataset] = []
    for split in splits:
        data = build_dataset("folder", root, split)
        counts = count_labels(data)
        for other in earlier:
            check_splits_differ(other, data)
        earlier.append(data)
        sizes = [data[index].labels.shape for index in range(len(data))]  # a pair of two sizes is an error of its own
        low, high = (pick(sizes, key=lambda hw: hw[0] * hw[1]) for pick in (min, max))
        between = f"{low[1]} x {low[0]}" + (f" to {high[1]} x {high[0]}" if high != low else "")
        tables.append(f"{printable(split)}: {len(data)} images of {between} pixels\n{counts.table()}")
    return "\n\n".join(tables)
