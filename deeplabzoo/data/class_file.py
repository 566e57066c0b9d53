"""Class files (classes.txt and what annotation tools write) and the reader of masks that they describe."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from deeplabzoo.data.classes import Colour, Palette, default_palette
from deeplabzoo.data.image_io import Labels, MaskFile, read_mask, read_mask_file, warn_once_per_folder
from deeplabzoo.data.image_mask_dataset import UnknownLabelValuesError, map_labels
from deeplabzoo.errors import DataError

CLASS_FILES = (
    "classes.txt",
    "labelmap.txt",
    "class_names.txt",
    "labels.txt",
    "_classes.csv",
    "class_dict.csv",
    "label_colors.txt",
)
"""Names of class files, the first that exists is read: ours, CVAT's, LabelMe's two, Roboflow's, and two of CamVid."""

_VOID_NAMES = {"void", "ignore", "ignored", "unlabelled", "unlabeled"}
_LABELME_IGNORE, _LABELME_BACKGROUND = "__ignore__", "_background_"
_IGNORE = 255
_MAX_ID = 65535
_MAX_BYTES = 1 << 20
_SHOWN = 5
_MAX_LINE_LENGTH = 200
_CONTROL = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories of what is no text: control codes, half characters, separators of lines and paragraphs."""

_NUMBER = r"[0-9]{1,3}"
_RGB = rf"{_NUMBER}\s*[,\s]\s*{_NUMBER}\s*[,\s]\s*{_NUMBER}"
_LINE = re.compile(
    rf"(?P<name>.*?)(?:\s+(?:id=(?P<id>[0-9]{{1,5}})|#(?P<hex>[0-9a-fA-F]{{6}}))|(?:\s+|\s*,\s*)(?P<rgb>{_RGB}))?\s*"
)
_FORMS = (
    re.compile(rf"(?P<name>[^:]+):(?P<rgb>{_RGB})(?::[^:]*){{0,2}}"),  # CVAT: label:color_rgb:parts:actions
    re.compile(rf"(?P<rgb>{_RGB})[\s,]+(?P<name>.*[^\W\d_].*)"),  # CamVid's label_colors.txt
    re.compile(r"(?P<id>[0-9]{1,5})\s*[,:;\s]\s*(?P<name>.*[^\W\d_].*)"),  # Roboflow: Pixel Value, Class; `0 background`
)
"""Forms of other tools, taken where every line of a file has the same one."""
_HEADER = re.compile(
    r"(pixel[ _]?value|id|index|value|name|class)\s*[,;\t]\s*(class|name|label|r\s*,\s*g\s*,\s*b)\w*"
    r"|(class|label|category)?[ _]?names?|class|label|category",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"\s+#\s.*")
_HEX_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_STRUCTURE = re.compile(r"[{}\[\]<\"]|- |(names|nc|classes|categories)\s*:|[0-9.]+([\s,]+[0-9.]+)+$")
"""How lines of JSON, YAML and XML begin, and lines of several numbers without a name."""


@dataclass(frozen=True)
class ClassFile:
    """The content of a class file; label i is `classes[i]`."""

    classes: tuple[str, ...]
    palette: Palette
    label_map: Mapping[int, int]
    """Number in a mask -> label."""
    colours: Mapping[Colour, int] | None
    """Colour in a mask -> label; None where the file gives no colours."""
    has_ids: bool = False
    """Whether the numbers are given, and not those of the lines."""


def read_class_file(file: Path) -> ClassFile:
    """Read one class a line, label 0 first: `NAME`, `NAME #rrggbb`, `NAME r,g,b` or `NAME id=VALUE`.

    Colours are those of RGB and palette masks and those in which results are drawn; ids are the values in masks of numbers with
    gaps. A line named `void` (or ignore, unlabeled) is not scored, nor is 255. Lines that begin with `#` are comments. Files of
    CVAT (labelmap.txt), Roboflow (_classes.csv), LabelMe (labels.txt, class_names.txt) and CamVid are read as well.

    Args:
        file: The class file.

    Returns:
        Its classes, colours and numbers.

    Raises:
        DataError: The file is empty or not UTF-8, is JSON or YAML, gives a name, id or colour twice, or gives some of its
            classes an id or a colour and others none.
    """
    names: list[str] = []
    ids: dict[int, int] = {}
    colours: dict[Colour, int] = {}
    by_position: dict[int, int] = {}
    bare_void = ""
    for name, label_id, colour, line in _parse(_read_lines(file), file):
        if name == _LABELME_IGNORE and label_id is None:
            continue  # LabelMe numbers it -1
        is_void = name.lower() in _VOID_NAMES
        label = _IGNORE if is_void else len(names)
        if not is_void:
            names.append("background" if name == _LABELME_BACKGROUND else name)
        by_position[len(by_position)] = label
        if label_id in ids or colour in colours:
            raise DataError(f"'{file}' gives the id or colour of '{line}' to another class, too; each line needs its own.")
        if label_id is not None:
            ids[label_id] = label
        if colour is not None:
            colours[colour] = label
        if is_void and label_id is None and colour is None:
            bare_void = name
    if bare_void and (ids or colours):
        raise DataError(
            f"'{file}' gives some lines an id or a colour but not '{bare_void}'; give it to every class or to none."
        )
    _check(names, ids, colours, file)
    drawn = {label: colour for colour, label in colours.items()}
    palette = tuple(drawn[label] for label in range(len(names))) if drawn else default_palette(len(names))
    return ClassFile(tuple(names), palette, {_IGNORE: _IGNORE, **(ids or by_position)}, colours or None, bool(ids))


def _read_lines(file: Path) -> list[str]:
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
    for line in lines:
        if len(line) > _MAX_LINE_LENGTH:
            raise DataError(
                f"'{file}' has a line of {len(line)} characters; expected a class name of at most {_MAX_LINE_LENGTH}."
            )
        if any(unicodedata.category(one) in _CONTROL for one in line.replace("\t", " ")):
            raise DataError(f"'{file}' has control codes in the line '{line}'; expected a class name in plain text.")
        if _STRUCTURE.match(line):
            raise DataError(
                f"'{file}' has the line '{line}', as JSON, YAML or a table of numbers has; expected one class name a line."
            )
    return lines


def _parse(lines: Sequence[str], file: Path) -> list[tuple[str, int | None, Colour | None, str]]:
    """Return (name, id, colour, line) of each line that is neither a comment nor a header."""
    lines = [_COMMENT.sub("", line) for line in lines if not line.startswith("#") or _HEX_COLOUR.fullmatch(line)]
    if lines and _HEADER.fullmatch(lines[0]):
        lines = lines[1:]
    form = next((one for one in _FORMS if lines and all(map(one.fullmatch, lines))), _LINE)
    return [_parse_line(line, form, file) for line in lines]


def _parse_line(line: str, form: re.Pattern[str], file: Path) -> tuple[str, int | None, Colour | None, str]:
    match = form.fullmatch(line)
    found = {"id": None, "hex": None, "rgb": None, **(match.groupdict() if match else {})}
    name = (found.get("name") or "").strip().replace("\t", " ")
    if not name:
        raise DataError(f"'{file}' has the line '{line}'; expected NAME, NAME #rrggbb, NAME r,g,b or NAME id=VALUE.")
    numbers = tuple(bytes.fromhex(found["hex"] or "")) or tuple(map(int, re.findall("[0-9]+", found["rgb"] or "")))
    if max(numbers, default=0) > 255:
        raise DataError(f"'{file}' has the line '{line}'; a colour is three numbers from 0 to 255.")
    label_id = int(found["id"]) if found["id"] else None
    if label_id is not None and label_id > _MAX_ID:
        raise DataError(f"'{file}' has the line '{line}'; an id is a value of a mask, from 0 to {_MAX_ID}.")
    return name, label_id, (numbers[0], numbers[1], numbers[2]) if numbers else None, line


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
    nameless = next((name for name in names if _HEX_COLOUR.fullmatch(name)), None)
    if nameless is not None:
        raise DataError(f"'{file}' has the line '{nameless}', a colour without a class name; expected NAME #rrggbb.")


# Reading masks: whether numbers or colours encode the classes is decided for each file.

_MIN_SPACING = 48
"""Levels between two classes (in the channel that differs most) from which blurred values are separated."""
_MAX_AMBIGUOUS = 0.2
"""Fraction of a mask's pixels that may lie in the middle between two classes: outlines do, a photograph does everywhere."""

_MAX_FLAT = 0.05
"""Fraction of the pixels of a lossless mask that may have one colour that is no class."""
_MAX_FLAT_INTERIOR = 0.005
"""Fraction of the pixels that may have such a colour and eight neighbours of it: outlines have none of these."""
_JPEG_SUFFIXES = (".jpg", ".jpeg")
_LOSSY_SUFFIXES = (*_JPEG_SUFFIXES, ".webp")


@dataclass(frozen=True)
class MaskReader:
    """Reads a mask file into labels.

    A file whose colours all stand in the class file is read by colour, also where they are the palette of a palette image;
    else its numbers count. Values near those of the classes, as JPEG and antialiasing leave at outlines, become the nearest
    class, with a warning; where classes lie too close together for that, they are an error.
    """

    label_map: Mapping[int, int]
    """Number in a mask -> label."""
    colours: Mapping[Colour, int] | None = None
    """Colour in a mask -> label."""
    grey_is_colour: bool = False
    """Whether grey files that can be read in both ways are colours, since others of the dataset are coloured."""

    def __call__(self, path: Path) -> Labels:
        """Return the labels, uint8 or uint16, height x width; raises ImageError, or DataError for values that are no class."""
        mask = read_mask_file(path)
        values_HW = mask.values_HW
        if self.colours is None:
            if values_HW is not None:
                return self._by_number(values_HW, path)
            nearest = _nearest_class(_colours_of(mask), _grey_colours(self.label_map), path)
            return read_mask(path) if nearest is None else nearest  # read_mask raises the error that says what was expected
        colours_HW = _colours_of(mask)
        are_numbers = values_HW is not None and _has_only(values_HW, self.label_map)
        if not (are_numbers and self._looks_like_numbers(mask)):
            exact = _exact_colours(colours_HW, self.colours)
            if exact is not None:
                return exact
        if values_HW is not None and are_numbers and not self._is_misleading(mask):
            return self._by_number(values_HW, path)
        nearest = _nearest_class(colours_HW, self.colours, path)
        if nearest is None:
            raise _unknown_colours(colours_HW, self.colours, path)
        return nearest

    def _looks_like_numbers(self, mask: MaskFile) -> bool:
        """Whether a file has no colours of its own: grey values, in a dataset without coloured masks."""
        return mask.palette is None and mask.colours_HW is None and not self.grey_is_colour

    def _is_misleading(self, mask: MaskFile) -> bool:
        """Whether a palette gives two or more of its indices the colour of another class, so that they are no class numbers."""
        if mask.palette is None or mask.values_HW is None or self.colours is None:
            return False
        known = {_packed(colour): label for colour, label in self.colours.items()}
        used = np.flatnonzero(np.bincount(mask.values_HW.reshape(-1))).tolist()
        labels = {index: known.get(int(mask.palette[index])) for index in used if index < len(mask.palette)}
        listed = {index: label for index, label in labels.items() if label is not None}
        return len(listed) > 1 and any(self.label_map.get(index) != label for index, label in listed.items())

    def _by_number(self, values_HW: Labels, path: Path) -> Labels:
        try:
            labels_HW = map_labels(values_HW, self.label_map, path)
        except UnknownLabelValuesError as error:
            if set(error.values) == {1}:  # masks of 0 and 1 among masks of 0 and 255
                raise
            if values_HW.max() > _IGNORE:
                raise
            nearest = _nearest_class(values_HW.astype(np.uint32) * 0x010101, _grey_colours(self.label_map), path)
            if nearest is None:
                raise
            return nearest
        if path.suffix.lower() in _JPEG_SUFFIXES and np.ptp(values_HW) > 0 and not _are_apart(self.label_map):
            raise DataError(
                f"The mask '{path}' is a JPEG, which changes label numbers that lie close together; save it as PNG."
            )
        return labels_HW


def _are_apart(label_map: Mapping[int, int]) -> bool:
    """Return whether the numbers of the classes are so far apart that blurred values still tell them."""
    return all(after - before >= _MIN_SPACING for before, after in pairwise(sorted(label_map)))


def _grey_colours(label_map: Mapping[int, int]) -> dict[Colour, int]:
    return {(value, value, value): label for value, label in label_map.items() if value <= _IGNORE}


def _colours_of(mask: MaskFile) -> np.ndarray[Any, np.dtype[np.uint32]]:
    if mask.colours_HW is not None:
        return mask.colours_HW
    assert mask.values_HW is not None
    if mask.palette is not None and len(mask.palette):
        return np.asarray(mask.palette[np.minimum(mask.values_HW, len(mask.palette) - 1)], np.uint32)
    return np.asarray(mask.values_HW.astype(np.uint32) * 0x010101, np.uint32)


def _has_only(values_HW: Labels, label_map: Mapping[int, int]) -> bool:
    return all(value in label_map for value in np.flatnonzero(np.bincount(values_HW.reshape(-1))).tolist())


def _exact_colours(colours_HW: np.ndarray[Any, np.dtype[np.uint32]], colours: Mapping[Colour, int]) -> Labels | None:
    """Return the label of each pixel, or None where a colour is no class."""
    by_colour = sorted((_packed(colour), label) for colour, label in colours.items())
    known = np.array([colour for colour, _ in by_colour], np.uint32)
    position_HW = np.minimum(np.searchsorted(known, colours_HW), len(known) - 1)
    if not np.array_equal(known[position_HW], colours_HW):
        return None
    return np.array([label for _, label in by_colour], np.uint8)[position_HW]


def _nearest_class(
    colours_HW: np.ndarray[Any, np.dtype[np.uint32]], colours: Mapping[Colour, int], path: Path
) -> Labels | None:
    """Return the label of the nearest colour of each pixel; None where classes are too close, or most pixels are in between.

    With more than two classes a pixel in the middle between two is ignored: the blend of two colours may be a third class.
    """
    codes = np.array(list(colours), np.int16)
    labels = np.array(list(colours.values()), np.uint8)
    between = np.abs(codes[:, None] - codes[None]).max(axis=2) if len(codes) <= _IGNORE + 1 else np.zeros((1, 1))
    if len(codes) < 2 or between[~np.eye(len(codes), dtype=bool)].min() < _MIN_SPACING:
        return None
    found, inverse, counts = np.unique(colours_HW, return_inverse=True, return_counts=True)
    channels = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.int16)
    distances = np.stack([np.abs(channels - code).max(axis=1) for code in codes], axis=1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :2]
    first, second = (np.take_along_axis(distances, order[:, [one]], axis=1)[:, 0].astype(np.int32) for one in (0, 1))
    ambiguous = 3 * first > second
    # JPEG shifts the colours of areas a little, but not as far as the middle between two classes.
    is_lossy = path.suffix.lower() in _LOSSY_SUFFIXES
    if _has_flat_area(inverse.reshape(colours_HW.shape), ambiguous if is_lossy else first > 0):
        return None
    if counts[ambiguous].sum() > _MAX_AMBIGUOUS * colours_HW.size:
        return None
    of_found = labels[order[:, 0]]
    ignored = 0
    if len(set(labels.tolist())) > 2:
        of_found[ambiguous] = _IGNORE
        ignored = int(counts[ambiguous].sum())
    off = int(counts[first > 0].sum())
    warn_once_per_folder(
        path,
        "nearest class",
        f"The mask '{path}' has {off} of {colours_HW.size} pixels beside the values of its classes, as JPEG and antialiasing "
        f"leave them: the nearest class is taken{f', and {ignored} in the middle between two are ignored' if ignored else ''}.",
    )
    return np.asarray(of_found[inverse.reshape(colours_HW.shape)])


def _has_flat_area(indices_HW: np.ndarray[Any, np.dtype[np.intp]], is_off: np.ndarray[Any, np.dtype[np.bool_]]) -> bool:
    """Return whether one colour for which `is_off` is set fills an area: it is a class that is not listed, and no outline."""
    if not is_off.any():
        return False
    counts = np.bincount(indices_HW.reshape(-1), minlength=len(is_off))
    if counts[is_off].max() > _MAX_FLAT * indices_HW.size:
        return True
    centre_HW = indices_HW[1:-1, 1:-1]
    height, width = indices_HW.shape
    same_HW = is_off[centre_HW]
    for y in range(3):
        for x in range(3):
            same_HW &= indices_HW[y : height - 2 + y, x : width - 2 + x] == centre_HW
    interior = np.bincount(centre_HW[same_HW], minlength=1)
    return bool(interior.max() > _MAX_FLAT_INTERIOR * indices_HW.size)


def _unknown_colours(
    colours_HW: np.ndarray[Any, np.dtype[np.uint32]], colours: Mapping[Colour, int], path: Path
) -> UnknownLabelValuesError:
    found, counts = np.unique(colours_HW, return_counts=True)
    outside = ~np.isin(found, [_packed(colour) for colour in colours])
    found, counts = found[outside], counts[outside]
    shown = [f"#{found[i]:06x} in {counts[i]} pixel{'s' if counts[i] > 1 else ''}" for i in np.argsort(-counts)[:_SHOWN]]
    hint = "; JPEG blurs colours, save masks as PNG" if path.suffix.lower() in _LOSSY_SUFFIXES else ""
    more = f" and {len(found) - _SHOWN} colours more" if len(found) > _SHOWN else ""
    message = f"The mask '{path}' has colour {', '.join(shown)}{more}, which classes.txt gives to no class{hint}."
    return UnknownLabelValuesError(message, [f"#{colour:06x}" for colour in found.tolist()])


def _packed(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]
