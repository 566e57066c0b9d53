"""The confusion matrix alone: counting real label maps, against torchmetrics' JaccardIndex as its users call it."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from deeplabzoo import numba_jit
from deeplabzoo.benchmark.record import Row
from deeplabzoo.benchmark.timing import interleave
from deeplabzoo.data.image_io import Labels, read_mask
from deeplabzoo.evaluation.metrics import ConfusionMatrix

TASK = "confusion matrix"
IGNORE = 255


def label_pairs(
    masks: Sequence[str | os.PathLike[str]], size_hw: tuple[int, int] = (1024, 2048), classes: int = 19
) -> list[tuple[Labels, Labels]]:
    """Return (predicted, true) uint8 labels from mask files, enlarged by nearest neighbour to `size_hw`.

    The prediction is the truth moved by seven pixels, void and foreign numbers become class 0: right inside, wrong along the
    edges, as a good network's. Numbers outside the classes are void in the truth. Raises ImageError, DataError.
    """
    pairs: list[tuple[Labels, Labels]] = []
    for path in masks:
        mask = read_mask(path).astype(np.uint8)
        size_wh = (size_hw[1], size_hw[0])
        enlarged = np.array(Image.fromarray(mask).resize(size_wh, Image.Resampling.NEAREST))
        true = np.where(enlarged < classes, enlarged, IGNORE).astype(np.uint8)
        moved = np.roll(true, 7, axis=1)
        pairs.append((np.where(moved == IGNORE, 0, moved).astype(np.uint8), true))
    return pairs


def confusion_rows(pairs_of_labels: Sequence[tuple[Labels, Labels]], classes: int = 19, *, pairs: int = 7) -> list[Row]:
    """Time `ConfusionMatrix.update` against torchmetrics, with its default checks and without them; milliseconds a picture.

    torchmetrics is given uint8 tensors of the same memory. Raises ImportError where it is not installed.
    """
    from torchmetrics.classification import MulticlassJaccardIndex

    rows = []
    for checks, said in ((True, "default"), (False, "validate_args=False")):
        ours = ConfusionMatrix(classes, IGNORE)
        theirs = MulticlassJaccardIndex(classes, ignore_index=IGNORE, validate_args=checks)
        tensors = [(torch.from_numpy(predicted), torch.from_numpy(true)) for predicted, true in pairs_of_labels]

        def count(matrix: ConfusionMatrix = ours) -> None:
            for predicted, true in pairs_of_labels:
                matrix.update(predicted, true)

        def update(metric: MulticlassJaccardIndex = theirs, tensors: list[tuple[torch.Tensor, torch.Tensor]] = tensors) -> None:
            for predicted, true in tensors:
                metric.update(predicted, true)

        count()
        update()
        alike = np.minimum(ours.counts, theirs.confmat.numpy()).sum() / ours.counts.sum()
        times = interleave({"deeplabzoo": count, "torchmetrics": update}, pairs, name="confusion matrix")
        number = len(pairs_of_labels)
        height, width = pairs_of_labels[0][1].shape
        rows.append(
            Row.paired(
                [one / number for one in times["deeplabzoo"]],
                [one / number for one in times["torchmetrics"]],
                name=f"{classes} classes, ignore {IGNORE}",
                task=TASK,
                side="deeplabzoo, " + ("compiled" if numba_jit.numba_available() else "numpy"),
                threads=torch.get_num_threads(),
                peer=f"torchmetrics JaccardIndex.update, {said}",
                size=(height, width),
                agreement=float(alike),
                note=f"{number} pictures; agreement is of the counts",
            )
        )
    return rows
