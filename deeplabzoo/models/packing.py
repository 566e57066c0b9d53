"""The inference form's convolutions with weights in oneDNN's own order, for float32 and bfloat16 on processors.

Plain convolutions bring their weights into that order at every call, and write their output before an activation or an
addition reads it again. The operations used here are those that torch's own compiler writes for x86; a torch without them, or a
convolution that they refuse, keeps the plain form.
"""

from typing import Any

import torch
from torch import nn

from deeplabzoo.models.fused_conv import Activation, FusedConv


def packing_available() -> bool:
    """Whether this torch has oneDNN and its fused convolutions."""
    present = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[no-untyped-call]
    return bool(present and hasattr(torch.ops.mkldnn, "_convolution_pointwise"))


class PackedConv(FusedConv):
    """A FusedConv that brings its weights into oneDNN's order at its first call, for the size that it sees then.

    Other sizes give the same answer; oneDNN then reorders where it prefers another order.
    """

    packed: torch.Tensor | None = None

    def forward(
        self,
        x: torch.Tensor,
        plus: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | None = None,
        activation: Activation | None = None,
    ) -> torch.Tensor:
        """Do what FusedConv does in one pass over the output."""
        activation = activation or self.activation
        x, padding = self.padded(x)
        x = x.contiguous(memory_format=torch.channels_last)
        shape: list[Any] = [list(padding), list(self.stride), list(self.dilation), self.groups]
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *shape, list(x.shape))
            self.weight = self.weight.new_empty(0)
        bias = self.bias if bias is None else bias
        name, scalars, algorithm = ("none", (), "") if activation is None else (activation.name, *_numbers(activation))
        if plus is None:
            out: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.packed, bias, *shape, name, list(scalars), algorithm
            )
            return out
        plus = plus.contiguous(memory_format=torch.channels_last)
        fused = activation is None or activation.name == "relu"
        unary = "relu" if fused and activation is not None else None
        out = torch.ops.mkldnn._convolution_pointwise.binary(x, plus, self.packed, bias, *shape, "add", 1.0, unary, [], None)
        return out if fused or activation is None else activation(out)


def pack(form: nn.Module) -> None:
    """Let every convolution of an inference form on the CPU be a PackedConv; nothing changes where torch has none."""
    if packing_available():
        for module in form.modules():
            if type(module) is FusedConv:
                module.__class__ = PackedConv


def _numbers(activation: Activation) -> tuple[tuple[float, ...], str]:
    return activation.scalars, activation.algorithm
