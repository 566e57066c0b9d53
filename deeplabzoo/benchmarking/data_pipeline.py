"""How fast a core makes training input: from JPEG and mask to a normalised crop, against torchvision's reference transforms.

The references' recipe for segmentation resizes the whole picture by Pillow, mirrors, pads, crops, and makes a normalised float
tensor of it; it is written anew here, once on Pillow images and once on tensors. All sides are given the same draws, so their
outputs can be compared pixel by pixel, and all end with the same tensors: float32 images and int64 labels. Ours counts the
normalisation that the training step does, and the collation into a batch, which the others are spared.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from deeplabzoo.benchmarking.data_sides import (
    BATCH,
    NORMAL,
    OURS,
    OURS_CACHED,
    PIL_PEER,
    TENSOR_PEER,
    Made,
    Pipeline,
    SideProcess,
    exhaust,
)
from deeplabzoo.benchmarking.photos import write_photos
from deeplabzoo.benchmarking.record import Row, Spread
from deeplabzoo.benchmarking.turns import alternate
from deeplabzoo.data.normalise import normalised

TASK = "training input"


def measure_data(root: Path | None, *, pairs: int = 7, pictures: int = 32, crop: int = 513, seed: int = 0) -> list[Row]:
    """Return ours, and ours with the decoded cache, against both forms of the references; one thread, milliseconds a picture.

    `root` holds PASCAL VOC in its own layout, whose val split is read; without it, pictures of VOC's size are drawn. Raises
    DataError where the data cannot be read.
    """
    with ExitStack() as stack:
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_photos(root, train=1, val=pictures, seed=seed)
        stack.enter_context(_one_thread())
        given = (root, pictures, crop, seed)
        work = Pipeline.of_voc(*given)
        count, sides = len(work.indices), work.sides
        with ExitStack() as running:
            turns = {side: running.enter_context(SideProcess(side, given)).turn for side in sides}
            times = alternate(turns, pairs, name=TASK)
        ms = {name: [one / count for one in values] for name, values in times.items()}
        shares = _stages(work)
        rows = []
        for side in (OURS, OURS_CACHED):
            for peer in (PIL_PEER, TENSOR_PEER):
                grey, alike = _difference(sides[side](), sides[peer]())
                figures = {
                    "images_per_s": 1000 / Spread.of(ms[side]).median,
                    "peer_images_per_s": 1000 / Spread.of(ms[peer]).median,
                    "largest_grey_difference": grey,
                    **(shares if side == OURS else {}),
                }
                rows.append(
                    Row.paired(
                        ms[side],
                        ms[peer],
                        name="JPEG + mask -> normalised crop",
                        task=TASK,
                        side=side,
                        peer=peer,
                        threads=1,
                        size=(crop, crop),
                        agreement=alike,
                        figures=figures,
                        note=f"{count} pictures, scaled by 0.5-2, the same draws on every side",
                    )
                )
        return rows


def _difference(ours: Iterable[Made], theirs: Iterable[Made]) -> tuple[float, float]:
    """Return the largest difference of two sides' images, in grey levels, and the share of labels that are alike."""
    largest, alike, pixels = 0.0, 0, 0
    grey_C11 = 255 * torch.tensor(NORMAL.std).view(3, 1, 1)
    for (image, labels), (their_image, their_labels) in zip(ours, theirs, strict=True):
        largest = max(largest, float(((image - their_image).abs() * grey_C11).max()))
        alike += int((labels == their_labels).sum())
        pixels += labels.numel()
    return largest, alike / pixels


def _stages(work: Pipeline) -> dict[str, float]:
    """Return how our time is shared out: reading the files, making the crop, normalising."""
    started = time.perf_counter()
    samples = [work.data[index] for index in work.indices]
    read = time.perf_counter() - started
    started = time.perf_counter()
    exhaust(work.ours(work.cached))
    rest = time.perf_counter() - started
    batch = torch.zeros(min(BATCH, len(samples)), 3, work.crop, work.crop, dtype=torch.uint8)
    batch = batch.contiguous(memory_format=torch.channels_last)
    normalised(batch, NORMAL)
    started = time.perf_counter()
    normalised(batch, NORMAL)
    normalise = (time.perf_counter() - started) * len(samples) / len(batch)
    whole = read + rest
    return {
        "read_share": read / whole,
        "crop_share": (rest - normalise) / whole,
        "normalise_share": normalise / whole,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
