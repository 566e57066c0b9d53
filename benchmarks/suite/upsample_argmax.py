"""Upsampling and arg-max alone: labels from a real network's small logits, against torch in both memory layouts.

How much is gained depends on how much of a picture is boundary, so the logits come from trained weights on photos that the
caller names; noise would be all boundary, and a constant none.
"""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from deeplabzoo.benchmark.record import Row
from deeplabzoo.benchmark.timing import interleave
from deeplabzoo.data.image_io import read_image
from deeplabzoo.device import eval_mode
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.processing.postprocessing import compile_postprocessing, upsample_argmax
from deeplabzoo.processing.preprocessing import prepare

TASK = "upsample + arg-max alone"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
"""What torch may be given; ours reads either, and gets the same memory as the side it is compared with."""


def head_logits(
    net: DeepLab, images: Sequence[str | os.PathLike[str]], size_hw: tuple[int, int] | None = None
) -> list[torch.Tensor]:
    """Return the network's low-resolution logits of every photo, 1 x classes x h x w on the CPU.

    Photos are prepared as the weights expect and then, with `size_hw`, stretched to that input, so that 256 x 512 logits come
    from 1024 x 2048 pixels whatever the photos' shape. Raises ImageError for what is no photo.
    """
    device = next(net.parameters()).device
    found = []
    for image in images:
        prepared = prepare(read_image(image), net.preprocessing)
        image_1CHW = prepared.tensor_1CHW
        if size_hw is not None:
            valid_1CHW = image_1CHW[:, :, : prepared.valid_hw[0], : prepared.valid_hw[1]]
            image_1CHW = F.interpolate(valid_1CHW, size=size_hw, mode="bilinear", antialias=True, align_corners=False)
        with eval_mode(net):
            found.append(net.forward_low_resolution(image_1CHW.to(device)).float().cpu())
    return found


def label_rows(
    logits: Sequence[torch.Tensor], size_hw: tuple[int, int], *, align_corners: bool, name: str, pairs: int = 7
) -> list[Row]:
    """Time `upsample_argmax` against interpolate and arg-max on the same logits, all photos a turn; one row for each layout.

    Times are milliseconds a photo.
    """
    compiled = compile_postprocessing()
    rows = []
    for layout, memory_format in LAYOUTS.items():
        maps = [low.contiguous(memory_format=memory_format) for low in logits]

        def ours(maps: list[torch.Tensor] = maps) -> list[torch.Tensor]:
            return [upsample_argmax(low, size_hw, align_corners=align_corners) for low in maps]

        def theirs(maps: list[torch.Tensor] = maps) -> list[torch.Tensor]:
            return [
                F.interpolate(low, size=size_hw, mode="bilinear", align_corners=align_corners).argmax(dim=1) for low in maps
            ]

        with torch.inference_mode():
            same = sum(int((a == b).sum()) for a, b in zip(ours(), theirs(), strict=True))
            times = interleave({"deeplabzoo": ours, f"torch {layout}": theirs}, pairs, name=name)
        rows.append(
            Row.paired(
                [one / len(maps) for one in times["deeplabzoo"]],
                [one / len(maps) for one in times[f"torch {layout}"]],
                name=name,
                task=TASK,
                side="deeplabzoo, " + ("compiled cells" if compiled else "torch"),
                threads=torch.get_num_threads(),
                peer=f"torch interpolate + argmax, {layout} logits",
                size=size_hw,
                agreement=same / (len(maps) * size_hw[0] * size_hw[1]),
                figures={"boundary_fraction": boundary_fraction(logits)},
                note=f"{len(maps)} photos, {logits[0].shape[2]} x {logits[0].shape[3]} logits, {logits[0].shape[1]} classes",
            )
        )
    return rows


def boundary_fraction(logits: Sequence[torch.Tensor]) -> float:
    """Return the share of cells between four neighbouring logits whose corners have different winners."""
    different = total = 0
    for low_1CHW in logits:
        winners_hw = low_1CHW.argmax(dim=1)[0]
        first = winners_hw[:-1, :-1]
        others = (winners_hw[:-1, 1:], winners_hw[1:, :-1], winners_hw[1:, 1:])
        different += int(torch.stack([first != other for other in others]).any(dim=0).sum())
        total += first.numel()
    return different / max(total, 1)
