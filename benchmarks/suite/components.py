"""Parts of the pipeline measured alone: labels from small logits, tiles, the confusion matrix, pictures for training."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.suite.confusion_matrix import confusion_rows, label_pairs
from benchmarks.suite.tile_seams import mosaic_rows, seam_rows
from benchmarks.suite.upsample_argmax import head_logits, label_rows
from deeplabzoo.benchmark import library
from deeplabzoo.benchmark.record import Row
from deeplabzoo.hub.factory import load_named_model


def bench_upsample_argmax(
    models: Sequence[str], images: Sequence[Path], sizes: Sequence[tuple[int, int]], pairs: int
) -> Iterator[list[Row]]:
    """Yield rows of upsampling and arg-max alone for each model (trained weights) and size; raises what loading them raises."""
    for name in models:
        net = load_named_model(name, None)
        for size in sizes:
            logits = head_logits(net, images, size)
            height, width = logits[0].shape[-2:]
            title = f"{name} {height}x{width} -> {size[0]}x{size[1]}"
            yield label_rows(logits, size, align_corners=net.config.align_corners, name=title, pairs=pairs)


def bench_tile_seams(
    models: Sequence[str], images: Sequence[Path], mosaics: tuple[str, str] | None, note: str
) -> Iterator[list[Row]]:
    """Yield rows of tiles against the whole for each model (trained weights): photo by photo, then mosaics of (data, root)."""
    for name in models:
        net = load_named_model(name, None)
        yield from seam_rows(net, name, images, note=note)
        if mosaics:
            yield mosaic_rows(net, name, mosaics[0], Path(mosaics[1]), note=note)


def bench_confusion_matrix(masks: Sequence[Path], pairs: int) -> list[Row]:
    """Return rows of counting a picture of 1024 x 2048 in 19 classes; raises UsageError where torchmetrics is missing."""
    library("torchmetrics")
    return confusion_rows(label_pairs(masks), pairs=pairs)
