"""Names and colours of classes for a file that holds neither, and a phrase that says that they were assumed."""

from collections.abc import Sequence

from deeplabzoo.data.classes import class_list
from deeplabzoo.data.palettes import Palette, default_palette


def inferred_classes(num_classes: int, likely: Sequence[str] = ("voc",)) -> tuple[tuple[str, ...], Palette, tuple[str, ...]]:
    """Return names, colours and notes for so many outputs: those of the first `likely` class list of that length.

    >>> inferred_classes(2)[0]
    ('class_0', 'class_1')
    """
    for data in likely:
        known = class_list(data)
        if known.num_classes == num_classes:
            note = f"the file names no classes: {data.upper()}'s assumed, as there are {num_classes}"
            return known.classes, known.palette, (note,)
    names = tuple(f"class_{index}" for index in range(num_classes))
    return names, default_palette(num_classes), (f"the file names no classes: class_0 to class_{num_classes - 1} given",)
