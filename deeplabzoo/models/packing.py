"""The inference form's convolutions with weights in oneDNN's own order, for float32 and bfloat16 on processors.

Plain convolutions bring their weights into that order at every call, and write their output before an activation or an
addition reads it again. The operations used here are those that torch's own compiler writes for x86; a torch without them, or a
convolution that they refuse, keeps the plain form.
"""

import threading
from typing import Any

import torch
from torch import nn

from deeplabzoo.models.fused_conv import Activation, FusedConv
from deeplabzoo.models.wide_depthwise import convolve_by_taps, goes_by_taps

_packing = threading.Lock()


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
        plus_is_spent: bool = False,
        bias: torch.Tensor | None = None,
        activation: Activation | None = None,
    ) -> torch.Tensor:
        """Do what FusedConv does in one pass over the output."""
        if self.by_taps and plus is None and activation is None and bias is None:
            return self._by_taps(x)
        activation = activation or self.activation
        x, padding = self.padded(x)
        x = x.contiguous(memory_format=torch.channels_last)
        shape: list[Any] = [list(padding), list(self.stride), list(self.dilation), self.groups]
        if self.packed is None:
            self._pack(shape, x)
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
        rest = (self.packed, bias, *shape, "add", 1.0, unary, [], None)
        if plus_is_spent:
            out = torch.ops.mkldnn._convolution_pointwise_.binary(plus, x, *rest)
        else:
            out = torch.ops.mkldnn._convolution_pointwise.binary(x, plus, *rest)
        return out if fused or activation is None else activation(out)

    def _pack(self, shape: list[Any], x: torch.Tensor) -> None:
        """Bring the weights into oneDNN's order: once, though several threads may make their first call together."""
        with _packing:
            if self.packed is None:
                self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *shape, list(x.shape))
                self.weight = self.weight.new_empty(0)

    @property
    def by_taps(self) -> bool:
        """Whether this is a depthwise convolution that oneDNN is slow at."""
        channels = self.groups
        return (
            channels > 1
            and self.padding_kind == "fixed"
            and self.padding == self.dilation
            and goes_by_taps(channels, self.kernel_size, self.stride, self.dilation)
        )

    def _by_taps(self, x: torch.Tensor) -> torch.Tensor:
        out = convolve_by_taps(x, self.weight, self.bias, self.dilation[0])
        return out if self.activation is None else self.activation(out)


class PackedLinear(nn.Module):
    """A linear layer as a 1x1 convolution over its rows: torch hands plain ones to MKL, which is slow on AMD's processors."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        shape = nn.Conv2d(linear.in_features, linear.out_features, 1, device="meta")
        self.conv = FusedConv(shape, linear.weight[:, :, None, None], linear.bias)
        self.conv.__class__ = PackedConv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map … x in to … x out."""
        rows_BCHW = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
        out: torch.Tensor = self.conv(rows_BCHW).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
        return out


def pack(form: nn.Module) -> None:
    """Let the convolutions and linear layers of an inference form run on oneDNN; nothing changes where torch has none."""
    if packing_available():
        for name, module in list(form.named_modules()):
            if type(module) is FusedConv:
                module.__class__ = PackedConv
            elif type(module) is nn.Linear:
                form.set_submodule(name, PackedLinear(module))


def _numbers(activation: Activation) -> tuple[tuple[float, ...], str]:
    return activation.scalars, activation.algorithm
