"""One export from top to bottom: write beside the place, open, compare, measure, describe, move there."""

import dataclasses
import datetime
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from deeplabzoo.data.base import SegmentationData
from deeplabzoo.data.images import read_image
from deeplabzoo.exporting.formats import add_facts, runner, write
from deeplabzoo.exporting.proof import measure, preprocessing_for, require_same_answers
from deeplabzoo.exporting.report import Export, Fitted, versions
from deeplabzoo.exporting.wish import Wish
from deeplabzoo.inference.calibration import Calibration
from deeplabzoo.inference.report import hardware, image_list_sha256
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import short_name
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
) -> Export:
    """Write `wish.out`, measure it on the first `count` pictures of `check`, and return what was made and seen.

    `tell(what, text)` is called with each step's outcome. The file appears whole, after it gave the network's answers on random
    images and on photos of `check` or of the calibration folder, or not at all. Raises what the steps raise.
    """
    wish.check()
    began = time.monotonic()
    net = net.cpu().eval()
    calibration = [] if wish.calibrate is None else _calibration_photos(net, wish.calibrate)
    photos = [check[index].image for index in range(min(_PHOTOS, len(check)))] if check is not None else []
    photos = photos or [read_image(path) for path in calibration[:_PHOTOS]]
    facts = {"preprocessing": json.dumps(preprocessing_for(net, wish.size).to_dict())}
    with tempfile.TemporaryDirectory(dir=wish.out.parent, prefix=".deeplabzoo-export-") as folder:
        file = Path(folder) / wish.out.name
        write(net, wish, file, facts)
        run = runner(wish.format, file)
        proof = require_same_answers(net, run, wish.output, wish.size, photos, int8=wish.calibrate is not None)
        tell("proof", proof)
        result = measure(net, run, wish.output, wish.size, check, count) if check is not None else None
        add_facts(wish.format, file, {"proof": proof, **({"check": json.dumps(dataclasses.asdict(result))} if result else {})})
        parts = sorted(Path(folder).iterdir())  # .bin before .xml: the one that is opened comes last
        size_bytes = sum(part.stat().st_size for part in parts)
        for part in parts:
            write_atomically(wish.out.parent / part.name, partial(_fill, part.read_bytes()))
    machine = hardware(torch.device("cpu"))
    return Export(
        model=_name(net),
        weights_sha256=net.weights_source.get("sha256"),
        format=wish.format,
        precision="fp32" if wish.calibrate is None else "int8",
        output=wish.output,
        size=wish.size,
        calibration=Fitted(images=len(calibration), list_sha256=image_list_sha256([path.name for path in calibration]))
        if calibration
        else None,
        proof=proof,
        check=result,
        bytes=size_bytes,
        seconds=round(time.monotonic() - began, 1),
        versions=versions(),
        cpu=machine["cpu"],
        threads=machine["threads"],
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _calibration_photos(net: DeepLab, calibrate: str) -> list[Path]:
    return [image for image in Calibration(net, calibrate).images if isinstance(image, Path)]


def _name(net: DeepLab) -> str:
    name, tag = net.weights_source.get("name"), net.weights_source.get("tag")
    return f"{name or net.config.architecture + '_' + short_name(net.config.encoder)}{f'.{tag}' if tag else ''}"


def _fill(content: bytes, file: BinaryIO) -> None:
    file.write(content)
