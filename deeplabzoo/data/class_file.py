"""Class files: names of classes, and how mask files encode them (numbers in order, ids, or colours)."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deeplabzoo.data.classes import Colour, Palette, default_palette
from deeplabzoo.data.image_io import Labels, read_image
from deeplabzoo.data.image_mask_dataset import UnknownLabelValuesError, default_label_map
from deeplabzoo.errors import DataError

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
