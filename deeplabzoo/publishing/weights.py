"""The released weights file: one safetensors that rebuilds its network, in half precision where that changes nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from deeplabzoo.errors import WeightsError
from deeplabzoo.models.checkpoint import save_checkpoint
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.say import say

Precision = Literal["fp16", "fp32"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}

_LARGEST_DIFFERENCE = 0.05
_LARGEST_LOSS = 2.0**-9
"""Of a variance, relative: twice the rounding of normal half-precision numbers; below 6e-5 they lose digits, then vanish."""


def write_weights(net: DeepLab, path: Path, precision: Precision, source: Mapping[str, Any]) -> None:
    """Write `net` to `path` with what is needed to rebuild it; `source` says where it comes from.

    Tensors that half precision cannot hold stay in float32, and are named in one line. Raises WeightsError for weights that
    are no numbers, OutputError.
    """
    broken = [name for name, tensor in net.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"{len(broken)} tensors hold values that are no finite numbers ({broken[0]}), so nothing is released."
        )
    kept = beyond_half(net) if precision == "fp16" else []
    if kept:
        shown = f"{', '.join(kept[:3])}{' …' if len(kept) > 3 else ''}"
        say(f"precision: {len(kept)} tensors stay in fp32, as fp16 cannot hold their values ({shown})")
    save_checkpoint(net, path, extra=source, dtype=DTYPES[precision], kept=kept)


def require_same_answer(difference: float, precision: Precision) -> None:
    """Say by how much the file's logits differ from the run's own weights; raises WeightsError where that is too much."""
    say(f"precision: logits of the {precision} file differ from the run's own by {difference:.1e} of their range")
    if not difference <= _LARGEST_DIFFERENCE:
        raise WeightsError(f"{precision} changes the logits by {100 * difference:.1f} %; publish with --precision fp32.")


def beyond_half(net: DeepLab) -> list[str]:
    """Return the names of tensors that float16 cannot hold: values that overflow, variances that lose digits or vanish.

    A variance is divided by, so its relative error counts; a weight is added up, so a small one may be rounded coarsely.
    """
    return [name for name, tensor in net.state_dict().items() if tensor.is_floating_point() and _is_beyond_half(name, tensor)]


def _is_beyond_half(name: str, tensor: torch.Tensor) -> bool:
    half = tensor.half().to(tensor.dtype)
    if not torch.isfinite(half).all():
        return True
    if not name.endswith("running_var"):
        return False
    return bool(((half - tensor).abs() > _LARGEST_LOSS * tensor.abs()).any())
