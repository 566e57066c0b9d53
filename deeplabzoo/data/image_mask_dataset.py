"""Pictures and masks in two folders that belong together by stem: matching them, and reading a pair with every check."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.image_io import Labels, read_image, read_mask
from deeplabzoo.data.palettes import Colour, Palette, default_palette
from deeplabzoo.errors import DataError

_NOT_DATA = {"thumbs.db", "desktop.ini"}
_SHOWN = 5


def default_label_map(num_classes: int, void: Iterable[int] = (255,), ignore_index: int = 255) -> dict[int, int]:
    """Return the usual coding of mask files: class i stands as i, and each of `void` becomes `ignore_index`."""
    return {**{label: label for label in range(num_classes)}, **dict.fromkeys(void, ignore_index)}


@dataclass(frozen=True, eq=False)
class ImageMaskDataset:
    """A data set of image and mask files; see SegmentationDataset for the meaning of its fields."""

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
        image = read_image(image_path)
        labels = self.read_labels(index)
        if labels.shape != image.shape[:2]:
            raise DataError(
                f"The mask '{mask_path}' is {labels.shape[1]} x {labels.shape[0]} pixels but its image '{image_path}' is "
                f"{image.shape[1]} x {image.shape[0]} (width x height, upright); they must be of one size."
            )
        return Sample(image=image, labels=labels, name=name)

    def read_labels(self, index: int) -> Labels:
        """Read one mask; raises ImageError, or UnknownLabelValuesError when it has values outside the classes."""
        _, mask_path = self.files[self.names[index]]
        return map_labels(self.read_values(mask_path), self.label_map, mask_path)


class UnknownLabelValuesError(DataError):  # noqa: N818 - a DataError to whoever reads it; the scan over a data set counts the values
    """A mask holds `values` (numbers, or colours as #rrggbb) that are no label.

    They have a default because loader workers rebuild errors from the sentence.
    """

    def __init__(self, message: str, values: Sequence[int | str] = ()) -> None:
        super().__init__(message)
        self.values = tuple(values)


def map_labels(values_HW: Labels, label_map: Mapping[int, int], path: Path) -> Labels:
    """Turn the values of a mask file into labels; raises UnknownLabelValuesError naming the file and each value not in `label_map`."""
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
        names = sorted(one.name for one in entries if one.is_file() or _is_broken_link(one))
    for name in names:
        if name.startswith(".") or name.lower() in _NOT_DATA:
            continue
        path = folder / name
        if path.stem in found:
            raise DataError(f"'{found[path.stem]}' and '{path}' have the same stem; keep one, since masks are found by stem.")
        found[path.stem] = path
    return found


def _is_broken_link(entry: os.DirEntry[str]) -> bool:
    """Whether a link leads nowhere: such a file counts, so that reading names it instead of training without it."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def pair_folders(images: Path, masks: Path) -> dict[str, tuple[Path, Path]]:
    """Return stem -> (image, mask) for two folders that must hold the same stems, whatever their suffixes.

    Raises DataError naming the files that stand alone, or an empty folder.
    """
    image_files, mask_files = files_by_stem(images), files_by_stem(masks)
    if not image_files and not mask_files:
        raise DataError(f"The folders '{images}' and '{masks}' are empty.")
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


def pair_listed(stems: Sequence[str], images: Path, masks: Path, list_file: Path) -> dict[str, tuple[Path, Path]]:
    """Return stem -> (image, mask) for the stems of a list; raises DataError if one is listed twice or has a file missing."""
    image_files, mask_files = files_by_stem(images), files_by_stem(masks)
    repeated = sorted(stem for stem, count in Counter(stems).items() if count > 1)
    if repeated:
        raise DataError(f"'{list_file}' lists {_abbreviated(repeated)} more than once; every picture counts once.")
    for kind, files, folder in (("image", image_files, images), ("mask", mask_files, masks)):
        missing = [stem for stem in stems if stem not in files]
        if missing:
            raise DataError(
                f"{len(missing)} of the {len(stems)} pictures in '{list_file}' have no {kind} in '{folder}': {_abbreviated(missing)}; "
                "complete the data, or list the pictures that are there."
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


# classes.txt: the names of one's own classes, and how the mask files write them (numbers in order, ids, or colours).


_VOID_NAMES = {"void", "ignore", "unlabelled", "unlabeled"}
_IGNORE = 255
_MAX_ID = 65535
_MAX_BYTES = 1 << 20
_SHOWN_NAMES = 5
_LINE = re.compile(
    r"(?P<name>.*?)(?:\s+(?:id=(?P<id>[0-9]{1,5})|#(?P<hex>[0-9a-fA-F]{6})"
    r"|(?P<rgb>[0-9]{1,3}\s*,\s*[0-9]{1,3}\s*,\s*[0-9]{1,3})))?\s*"
)
_MAX_LINE_LENGTH = 200
_CONTROL = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories of what is no text: control codes, half characters, separators of lines and paragraphs."""


@dataclass(frozen=True)
class ClassFile:
    """What a classes.txt says; label i is `classes[i]`."""

    classes: tuple[str, ...]
    palette: Palette
    label_map: Mapping[int, int]
    """Value in a mask of numbers -> label."""
    colours: Mapping[Colour, int] | None
    """Colour in a mask of colours -> label; None where the file gives no colours."""


def read_class_file(file: Path) -> ClassFile:
    """Read one class a line, label 0 first: `NAME`, `NAME #rrggbb`, `NAME r,g,b` or `NAME id=VALUE`.

    Colours say how RGB masks are coded, and how results are drawn; ids say which values stand in masks of numbers whose ids
    have gaps. A line named `void` gives a colour or id that is not scored (255 never is). Raises DataError for a file that is
    empty or not UTF-8, gives a name, id or colour twice, or gives some of its classes an id or a colour and others none.
    """
    if file.exists() and not file.is_file():
        raise DataError(f"'{file}' is no file; expected one class name a line.")
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_BYTES + 1)
        lines = [line.strip() for line in data.decode("utf-8-sig").replace("\r", "\n").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"'{file}' is not UTF-8 text; expected one class name a line.") from None
    except OSError as error:
        raise DataError(f"'{file}' cannot be read: {error.strerror or error}.") from None
    if len(data) > _MAX_BYTES:
        raise DataError(f"'{file}' has more than {_MAX_BYTES >> 20} MiB; expected one class name a line.")
    names: list[str] = []
    ids: dict[int, int] = {}
    colours: dict[Colour, int] = {}
    for line in lines:
        name, label_id, colour = _parse_line(line, file)
        if name.lower() in _VOID_NAMES and (label_id is not None or colour is not None):
            label = _IGNORE
        else:
            label = len(names)
            names.append(name)
        if label_id in ids or colour in colours:
            raise DataError(f"'{file}' gives the id or colour of '{line}' to another class, too; each line needs its own.")
        if label_id is not None:
            ids[label_id] = label
        if colour is not None:
            colours[colour] = label
    _check(names, ids, colours, file)
    drawn = {label: colour for colour, label in colours.items()}
    palette = tuple(drawn[label] for label in range(len(names))) if drawn else default_palette(len(names))
    label_map = {_IGNORE: _IGNORE, **ids} if ids else default_label_map(len(names))
    return ClassFile(tuple(names), palette, label_map, colours or None)


def read_colour_mask(path: Path, colours: Mapping[Colour, int]) -> Labels:
    """Return the labels (uint8, H x W) of a mask that is painted in colours; UnknownLabelValuesError names colours that are no class."""
    pixels = read_image(path).astype(np.uint32)
    packed_HW = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    labels_by_colour = sorted((_packed(colour), label) for colour, label in colours.items())
    known = np.array([colour for colour, _ in labels_by_colour], np.uint32)
    position_HW = np.minimum(np.searchsorted(known, packed_HW), len(known) - 1)
    outside = packed_HW[known[position_HW] != packed_HW]
    if outside.size:
        found, counts = np.unique(outside, return_counts=True)
        shown = [
            f"#{found[i]:06x} in {counts[i]} pixel{'s' if counts[i] > 1 else ''}" for i in np.argsort(-counts)[:_SHOWN_NAMES]
        ]
        hint = "; JPEG blurs colours, save masks as PNG" if path.suffix.lower() in (".jpg", ".jpeg") else ""
        more = f" and {len(found) - _SHOWN_NAMES} colours more" if len(found) > _SHOWN_NAMES else ""
        message = f"The mask '{path}' has colour {', '.join(shown)}{more}, which classes.txt gives to no class{hint}."
        raise UnknownLabelValuesError(message, [f"#{colour:06x}" for colour in found.tolist()])
    return np.array([label for _, label in labels_by_colour], np.uint8)[position_HW]


def _parse_line(line: str, file: Path) -> tuple[str, int | None, Colour | None]:
    if len(line) > _MAX_LINE_LENGTH:
        raise DataError(f"'{file}' has a line of {len(line)} characters; expected a class name of at most {_MAX_LINE_LENGTH}.")
    if any(unicodedata.category(one) in _CONTROL for one in line.replace("\t", " ")):
        raise DataError(f"'{file}' has control codes in the line '{line}'; expected a class name in plain text.")
    match = _LINE.fullmatch(line)
    if match is None or not match["name"]:
        raise DataError(f"'{file}' has the line '{line}'; expected NAME, NAME #rrggbb, NAME r,g,b or NAME id=VALUE.")
    colour = None
    if match["hex"]:
        red, green, blue = bytes.fromhex(match["hex"])
        colour = (red, green, blue)
    elif match["rgb"]:
        red, green, blue = (int(part) for part in match["rgb"].split(","))
        if max(red, green, blue) > 255:
            raise DataError(f"'{file}' has the line '{line}'; a colour is three numbers from 0 to 255.")
        colour = (red, green, blue)
    label_id = int(match["id"]) if match["id"] else None
    if label_id is not None and label_id > _MAX_ID:
        raise DataError(f"'{file}' has the line '{line}'; an id is a value of a mask, from 0 to {_MAX_ID}.")
    return match["name"].replace("\t", " "), label_id, colour


def _check(names: list[str], ids: Mapping[int, int], colours: Mapping[Colour, int], file: Path) -> None:
    if not names:
        raise DataError(f"'{file}' is empty; expected one class name a line, label 0 first.")
    if len(names) > _IGNORE:
        raise DataError(f"'{file}' names {len(names)} classes; at most {_IGNORE} are possible beside the ignored label.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"'{file}' names '{repeated[0]}' twice; each class needs a name of its own.")
    for kind, given in (("an id", ids), ("a colour", colours)):
        without = [name for label, name in enumerate(names) if label not in given.values()]
        if given and without:
            raise DataError(f"'{file}' gives some lines {kind} but not '{without[0]}'; give it to every class or to none.")


def _packed(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]
