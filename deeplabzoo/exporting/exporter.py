"""One export from top to bottom: write beside the place, open, compare, measure, describe, move there."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from deeplabzoo.data.base import SegmentationData
from deeplabzoo.data.images import Pixels, read_image
from deeplabzoo.exporting.formats import add_facts, runner, write
from deeplabzoo.exporting.proof import Check, measure, preprocessing_for, require_same_answers
from deeplabzoo.exporting.wish import Wish
from deeplabzoo.inference.calibration import Calibration
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.output import write_atomically

_PHOTOS = 3
"""Real photos whose labels are compared before the file counts."""


def export(
    net: DeepLab,
    wish: Wish,
    *,
    check: SegmentationData | None = None,
    count: int = 0,
    tell: Callable[[str, str], None] = lambda what, text: None,
) -> Check | None:
    """Write `wish.out` and return what `check` measured on its first `count` pictures; None without `check`.

    `tell(what, text)` is called with each step's outcome. The file appears whole, after it gave the network's answers on random
    images and on photos of `check` or of the calibration folder, or not at all. Raises what the steps raise.
    """
    wish.check()
    net = net.cpu().eval()
    photos = _photos(net, wish, check)
    facts = {"preprocessing": json.dumps(preprocessing_for(net, wish.size).to_dict())}
    with tempfile.TemporaryDirectory(dir=wish.out.parent, prefix=".deeplabzoo-export-") as folder:
        file = Path(folder) / wish.out.name
        write(net, wish, file, facts)
        run = runner(wish.format, file)
        proof = require_same_answers(net, run, wish.output, wish.size, photos, int8=wish.calibrate is not None)
        tell("proof", proof)
        result = measure(net, run, wish.output, wish.size, check, count) if check is not None else None
        add_facts(wish.format, file, {"proof": proof, **({"check": json.dumps(dataclasses.asdict(result))} if result else {})})
        for part in sorted(Path(folder).iterdir()):  # .bin before .xml: the one that is opened comes last
            write_atomically(wish.out.parent / part.name, partial(_fill, part.read_bytes()))
    return result


def _photos(net: DeepLab, wish: Wish, check: SegmentationData | None) -> Sequence[Pixels]:
    if check is not None:
        return [check[index].image for index in range(min(_PHOTOS, len(check)))]
    if wish.calibrate is not None:
        paths = [image for image in Calibration(net, wish.calibrate).images if isinstance(image, Path)]
        return [read_image(path) for path in paths[:_PHOTOS]]
    return []


def _fill(content: bytes, file: BinaryIO) -> None:
    file.write(content)
