"""Parts of the pipeline measured alone: labels from small logits, tiles, the confusion matrix, pictures for training."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from deeplabzoo.benchmarking.confusion_alone import confusion_rows, label_pairs
from deeplabzoo.benchmarking.data_pipeline import measure_data
from deeplabzoo.benchmarking.labels_alone import label_rows, small_logits
from deeplabzoo.benchmarking.libraries import library
from deeplabzoo.benchmarking.record import Row
from deeplabzoo.benchmarking.seams import mosaic_rows, photo_rows
from deeplabzoo.cli import named_network

MADE = "made"
"""Instead of a folder: pictures drawn from a seed."""


def labels_alone(
    models: Sequence[str], photos: Sequence[Path], sizes: Sequence[tuple[int, int]], pairs: int
) -> Iterator[list[Row]]:
    """Yield rows of upsampling and arg-max alone for each model (trained weights) and size; raises what loading them raises."""
    for name in models:
        net = named_network(name, None)
        for size in sizes:
            logits = small_logits(net, photos, size)
            height, width = logits[0].shape[-2:]
            title = f"{name} {height}x{width} -> {size[0]}x{size[1]}"
            yield label_rows(logits, size, align_corners=net.config.align_corners, name=title, pairs=pairs)


def seams_alone(
    models: Sequence[str], photos: Sequence[Path], mosaics: tuple[str, str] | None, note: str
) -> Iterator[list[Row]]:
    """Yield rows of tiles against the whole for each model (trained weights): photo by photo, then mosaics of (data, root)."""
    for name in models:
        net = named_network(name, None)
        yield from photo_rows(net, name, photos, note=note)
        if mosaics:
            yield mosaic_rows(net, name, mosaics[0], Path(mosaics[1]), note=note)


def confusion_alone(masks: Sequence[Path], pairs: int) -> list[Row]:
    """Return rows of counting a picture of 1024 x 2048 in 19 classes; raises UsageError where torchmetrics is missing."""
    library("torchmetrics")
    return confusion_rows(label_pairs(masks), pairs=pairs)


def data_alone(root: str, pairs: int, seed: int) -> list[Row]:
    """Return rows of the training pipeline on the VOC data in a folder, or on `made` pictures."""
    library("torchvision")
    return measure_data(None if root == MADE else Path(root), pairs=pairs, seed=seed)
