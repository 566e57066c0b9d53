"""The inference form's convolutions with weights in oneDNN's own order, for float32 and bfloat16 on processors.

Plain convolutions bring their weights into that order at every call, and write their output before an activation or an
addition reads it again. The operations used here are those that torch's own compiler writes for x86; a torch without them, or a
convolution that they refuse, keeps the plain form.
"""

import itertools
import threading
from typing import Any

import torch
from torch import nn

from deeplabzoo.optimization.fused_conv import Activation, FusedConv

# Depthwise 3x3 convolutions at large rates, tap by tap: oneDNN's fast kernel ends where the padding gets wide.
#
# At output stride 16 a map of a 512-pixel photo is 32 cells wide, so at rate 36 all taps but the centre one lie on padding, and
# at rate 12 four in nine products are with zeros. Each tap is one scaled addition over the cells where it lies on the map.


_MIN_DILATION = 12
_MIN_CHANNELS = 1024
"""Below either, oneDNN was as fast or faster on the processor where this was measured (AVX-512, 32 to 65 cells a side)."""


def is_wide_depthwise(channels: int, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether a depthwise convolution is one of those that are faster tap by tap."""
    return (
        kernel == (3, 3)
        and stride == (1, 1)
        and dilation[0] == dilation[1]
        and dilation[0] >= _MIN_DILATION
        and channels >= _MIN_CHANNELS
    )


def wide_depthwise_conv(
    x_BCHW: torch.Tensor, weight_C133: torch.Tensor, bias_C: torch.Tensor | None, dilation: int
) -> torch.Tensor:
    """Return the depthwise convolution with zeros around, of the input's size and type; summed in float32, channels_last."""
    x = x_BCHW.contiguous(memory_format=torch.channels_last).float()
    taps_33C11 = weight_C133.float().permute(2, 3, 0, 1)[..., None].contiguous()
    out = x * taps_33C11[1, 1]
    if bias_C is not None:
        out += bias_C.float()[:, None, None]
    for row, column in itertools.product(range(3), repeat=2):
        (into_rows, from_rows), (into_columns, from_columns) = (
            _overlap(size, dilation * (tap - 1)) for size, tap in zip(x.shape[-2:], (row, column), strict=True)
        )
        if (row, column) != (1, 1) and into_rows.stop > into_rows.start and into_columns.stop > into_columns.start:
            out[:, :, into_rows, into_columns].addcmul_(x[:, :, from_rows, from_columns], taps_33C11[row, column])
    return out.to(x_BCHW.dtype)


def _overlap(size: int, offset: int) -> tuple[slice, slice]:
    """Return the cells whose neighbour at `offset` lies on the map, and those neighbours."""
    start, stop = max(0, -offset), size - max(0, offset)
    return slice(start, stop), slice(start + offset, stop + offset)


_prepack_lock = threading.Lock()


def onednn_available() -> bool:
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
        addend: torch.Tensor | None = None,
        *,
        may_overwrite_addend: bool = False,
        bias: torch.Tensor | None = None,
        activation: Activation | None = None,
    ) -> torch.Tensor:
        """Do what FusedConv does in one pass over the output."""
        if self.is_slow_depthwise and addend is None and activation is None and bias is None:
            return self._forward_by_taps(x)
        activation = activation or self.activation
        x, padding = self.padded(x)
        x = x.contiguous(memory_format=torch.channels_last)
        shape: list[Any] = [list(padding), list(self.stride), list(self.dilation), self.groups]
        if self.packed is None:
            self._prepack_weight(shape, x)
        bias = self.bias if bias is None else bias
        name, scalars, algorithm = ("none", (), "") if activation is None else (activation.name, *_activation_args(activation))
        if addend is None:
            out: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.packed, bias, *shape, name, list(scalars), algorithm
            )
            return out
        addend = addend.contiguous(memory_format=torch.channels_last)
        fused = activation is None or activation.name == "relu"
        unary = "relu" if fused and activation is not None else None
        rest = (self.packed, bias, *shape, "add", 1.0, unary, [], None)
        if may_overwrite_addend:
            out = torch.ops.mkldnn._convolution_pointwise_.binary(addend, x, *rest)
        else:
            out = torch.ops.mkldnn._convolution_pointwise.binary(x, addend, *rest)
        return out if fused or activation is None else activation(out)

    def _prepack_weight(self, shape: list[Any], x: torch.Tensor) -> None:
        """Bring the weights into oneDNN's order: once, though several threads may make their first call together."""
        with _prepack_lock:
            if self.packed is None:
                self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *shape, list(x.shape))
                self.weight = self.weight.new_empty(0)

    @property
    def is_slow_depthwise(self) -> bool:
        """Whether this is a depthwise convolution that oneDNN is slow at."""
        channels = self.groups
        return (
            channels > 1
            and self.padding_kind == "fixed"
            and self.padding == self.dilation
            and is_wide_depthwise(channels, self.kernel_size, self.stride, self.dilation)
        )

    def _forward_by_taps(self, x: torch.Tensor) -> torch.Tensor:
        out = wide_depthwise_conv(x, self.weight, self.bias, self.dilation[0])
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


def prepack(form: nn.Module) -> None:
    """Let the convolutions and linear layers of an inference form run on oneDNN; nothing changes where torch has none."""
    if onednn_available():
        for name, module in list(form.named_modules()):
            if type(module) is FusedConv:
                module.__class__ = PackedConv
            elif type(module) is nn.Linear:
                form.set_submodule(name, PackedLinear(module))


def _activation_args(activation: Activation) -> tuple[tuple[float, ...], str]:
    return activation.scalars, activation.algorithm
