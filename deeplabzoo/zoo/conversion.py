"""A network written as a file of ours, and proven by reading the file back: same tensors, same logits."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.errors import OutputError, WeightsError
from deeplabzoo.models.checkpoint import read_checkpoint
from deeplabzoo.models.deeplab import DeepLab

_PROOF_HW = (129, 193)
"""Odd, and several cells wide at every output stride."""


@dataclass(frozen=True)
class Proof:
    """What a file gave when it was read back, on one fixed input, against the network that was written."""

    largest_error: float
    """Largest difference of the logits, as a part of their standard deviation; 0 for identical ones."""
    same_labels: float
    """Share of the pixels with the same label, 0...1."""

    def __str__(self) -> str:
        if self.largest_error == 0:
            return "read back: every tensor and every logit is the same"
        return (
            f"read back: logits differ by at most {self.largest_error:.2g} of their spread, "
            f"{100 * self.same_labels:.2f} % of the labels are the same"
        )


def write_own(
    net: DeepLab, path: Path, *, extra: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[DeepLab, Proof]:
    """Write `net` to `path` and return the network that the file holds, with the proof that it is the one written.

    The file gets its name once it is proven. Raises OutputError where it cannot be written, and WeightsError where `dtype` is
    too small for a tensor's values or the file came out different; what stood under that name is then as it was.
    """
    expected = {name: _narrowed(name, tensor, dtype) for name, tensor in net.state_dict().items()}
    target = Path(os.path.realpath(path))
    trial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.unproven")
    try:
        net.save(trial, dtype=dtype, extra=extra)
        written = read_checkpoint(trial, dtype=None)
        require_identical(expected, written.state_dict, path)
        back = DeepLab.from_weights(
            written.config,
            {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in written.state_dict.items()},
            classes=written.classes,
            palette=written.palette,
            preprocessing=written.preprocessing,
        )
        proof = compare(net, back)
        if dtype is torch.float32 and proof.largest_error:
            raise WeightsError(f"'{path}' would give other logits than what was written into it, so it was not kept.")
        os.replace(trial, target)
    except OSError as error:
        raise OutputError(f"Cannot write '{path}': {error.strerror or error}.") from None
    finally:
        trial.unlink(missing_ok=True)
    return back, proof


def require_identical(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise WeightsError unless both have the same names, kinds, shapes and bytes."""
    wrong = sorted(expected.keys() ^ found.keys()) + [
        name for name in expected.keys() & found.keys() if _facts(expected[name]) != _facts(found[name])
    ]
    if wrong:
        raise WeightsError(
            f"'{path}' came out different from what was written into it ({wrong[0]}), so it was not kept; check the disk."
        )


def compare(net: DeepLab, other: DeepLab) -> Proof:
    """Return how far the logits of two networks in eval mode are apart on one fixed input."""
    image_BCHW = torch.randn(1, net.config.in_chans, *_PROOF_HW, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, others = net(image_BCHW), other(image_BCHW)
    if torch.equal(logits, others):
        return Proof(0.0, 1.0)
    error = float((logits - others).abs().max() / logits.std())
    return Proof(error, float((logits.argmax(1) == others.argmax(1)).float().mean()))


def _facts(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.detach().cpu().contiguous().numpy().tobytes()


def _narrowed(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    narrow = tensor.to(dtype)
    if bool((narrow.isinf() & ~tensor.isinf()).any()):
        limit = torch.finfo(dtype).max
        raise WeightsError(f"'{name}' holds values above {limit:g}, which {dtype} cannot hold; write float32 instead.")
    return narrow
