"""Counts the work that torch does on real memory: a promise about speed as a number that is the same on a busy machine."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_FORWARD = ("aten.convolution", "aten.addmm", "aten.mm", "aten.bmm", "aten.native_batch_norm", "aten._native_batch_norm_legit")


class TensorWork(TorchDispatchMode):
    """Within `with TensorWork() as work:` counts operations whose result has memory; the meta device costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = 0
        """Numbers in the tensors that `torch.empty`, where every parameter begins, returned."""
        self.drawn = 0
        """Numbers drawn at random."""
        self.forwards = 0
        """Convolutions, matrix products and batch norms."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, torch.Tensor) and first.device.type != "meta":
            self.allocated += first.numel() if func is torch.ops.aten.empty.memory_format else 0
            self.drawn += first.numel() if torch.Tag.nondeterministic_seeded in func.tags else 0
            self.forwards += str(func).startswith(_FORWARD)
        return out


def require_work_of_one_model(work: TensorWork, model: torch.nn.Module) -> None:
    """Require the work of one model: its memory taken once, each weight drawn by torch and by timm, no image run through it."""
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    assert numbers <= work.allocated < 1.1 * numbers  # the tenth is timm's classifier, which is dropped
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1) <= work.drawn < 2 * numbers
    assert work.forwards == 0
