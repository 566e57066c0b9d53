"""A folder of one's own looked at before training: every pair opened, every label counted, no picture in two splits."""

from pathlib import Path

from deeplabzoo.data.base import open_data
from deeplabzoo.data.folder import splits_in
from deeplabzoo.data.scan import scan_labels
from deeplabzoo.errors import DataError


def folder_check(root: Path) -> str:
    """Read every picture and mask of a `folder` and return what is there, a table for each split.

    Training would find the same faults, but the size of a picture only when it comes to it. Raises DataError or ImageError with
    the first fault: a missing partner, a mask of another size, labels outside the classes, a picture in two splits, no train
    or no val.
    """
    splits = splits_in(root)
    for needed in ("train", "val"):
        if needed not in splits:
            raise DataError(f"'{root}' has no split '{needed}' to train with; splits there: {', '.join(splits) or 'none'}.")
    tables: list[str] = []
    home: dict[str, str] = {}
    for split in splits:
        data = open_data("folder", root, split)
        counts = scan_labels(data)
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
