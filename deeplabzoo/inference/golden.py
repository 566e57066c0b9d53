"""Golden logits: what a network answers to one fixed tensor, kept in a small file, so that drift shows as a number.

The input is arithmetic, not random numbers, whose generators change between versions; it is fed as it is, without any photo's
preprocessing, and the answer is the head's own, before anything is enlarged.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as serialise

from deeplabzoo.errors import WeightsError
from deeplabzoo.inference.device import evaluating
from deeplabzoo.models.checkpoint import read_safetensors
from deeplabzoo.output import write_atomically

if TYPE_CHECKING:
    from deeplabzoo.models.deeplab import DeepLab

GOLDEN_HW = (97, 129)
"""Odd sides of the form stride x n + 1, at which feature grids are nested."""
ROUNDING = 1e-4
"""Of the largest logit: how much float32 arithmetic of other machines and libraries moves logits at most.

A product or sum rounds by u = 2^-24 = 6e-8, a sum of n products by about sqrt(n) u, 8e-6 for the longest (n = 18432), and a
hundred layers, whose errors are independent, by sqrt(100) times that."""
_FORMAT = "deeplabzoo golden logits"


def golden_input(in_chans: int = 3, size: tuple[int, int] = GOLDEN_HW) -> torch.Tensor:
    """Return the fixed tensor, 1 x in_chans x H x W float32 in -2...2: smooth ramps with a fine pattern on top.

    >>> golden_input()[0, :, 0, 1].tolist()
    [-1.703125, -1.046875, -0.390625]
    """
    height, width = size
    channel_C11 = torch.arange(in_chans, dtype=torch.int64)[:, None, None]
    row_H1, column_W = torch.arange(height, dtype=torch.int64)[:, None], torch.arange(width, dtype=torch.int64)
    ramp_CHW = (2 * row_H1 + 3 * column_W + 41 * channel_C11) % 193
    fine_CHW = (7 * row_H1 * column_W + 16 * column_W + row_H1 + channel_C11) % 64
    return ((ramp_CHW + fine_CHW - 128).to(torch.float32) / 64)[None]


def save_golden(net: "DeepLab", path: str | Path) -> None:
    """Write the network's low-resolution float32 logits of `golden_input` to `path`; raises OutputError."""
    metadata = {"format": _FORMAT, "input": f"{GOLDEN_HW[0]}x{GOLDEN_HW[1]}", "output_stride": str(net.output_stride)}
    content = serialise({"logits": _answer(net, GOLDEN_HW).cpu().contiguous()}, metadata)
    write_atomically(Path(path), lambda file: file.write(content))


def golden_difference(net: "DeepLab", file: str | Path) -> float:
    """Return the largest difference between the network's logits and the golden ones, as a share of the largest golden logit.

    The same weights differ by rounding alone, float16 ones from those they were made of by a little more. Raises WeightsError
    for a file that is none of ours, or of a network with other classes or another output stride.
    """
    metadata, tensors = read_safetensors(Path(file))
    try:
        if metadata["format"] != _FORMAT:
            raise ValueError
        height, width = (int(side) for side in metadata["input"].split("x"))
        golden, output_stride = tensors["logits"], int(metadata["output_stride"])
    except (KeyError, ValueError):
        raise WeightsError(f"'{file}' does not hold golden logits; `python -m deeplabzoo.publish` writes such files.") from None
    if net.output_stride != output_stride:
        raise WeightsError(f"'{file}' was written at output stride {output_stride}, the network runs at {net.output_stride}.")
    logits = _answer(net, (height, width)).cpu()
    if logits.shape != golden.shape:
        raise WeightsError(f"'{file}' holds logits of shape {tuple(golden.shape)}, the network gives {tuple(logits.shape)}.")
    return float((logits - golden).abs().max() / golden.abs().max().clamp(min=1e-12))


def _answer(net: "DeepLab", size: tuple[int, int]) -> torch.Tensor:
    with evaluating(net):
        image_1CHW = golden_input(net.config.in_chans, size).to(next(net.parameters()).device)
        return net.forward_low_resolution(image_1CHW).float()
