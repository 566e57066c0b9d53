"""Convolutions and linear layers with prepacked oneDNN weights, for float32 and bfloat16 on CPUs.

`F.conv2d` reorders its weights into the memory layout of oneDNN at every call, and writes its output to memory before an
activation or an addition reads it again. The operations `torch.ops.mkldnn.*` used here take weights in that layout and apply
activation and addition in the same pass.

They are private: torch registers them for the code that torch.compile generates on CPUs, and does not document them. Where
torch lacks them (`onednn_available`), `prepack` leaves the layers as they are: the same results, slower.
"""

import itertools
import threading
from typing import Any

import torch
from torch import nn

from deeplabzoo.optimization.fused_conv import Activation, FusedConv

# Depthwise 3x3 convolutions at large dilation, tap by tap: oneDNN's fast depthwise kernel does not support wide padding.
#
# At output stride 16 the feature map of a 512-pixel image is 32 pixels wide, so at dilation 36 all taps but the centre read
# only padding, and at dilation 12 four of nine products are with zeros. Here each tap is one scaled addition over the pixels
# for which it lies inside the map.


_MIN_DILATION = 12
_MIN_CHANNELS = 1024
"""Below either, oneDNN was as fast or faster where this was measured (AVX-512, feature maps of 32 to 65 pixels a side)."""


def is_wide_depthwise(channels: int, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether a depthwise convolution is faster tap by tap."""
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
    """Return a depthwise 3x3 convolution, zero-padded to the input's size, computed tap by tap.

    Args:
        x_BCHW: Feature map, float32 or bfloat16.
        weight_C133: Weights, C x 1 x 3 x 3.
        bias_C: Bias, or None.
        dilation: Dilation in pixels of the map, equal to the padding.

    Returns:
        B x C x H x W in channels_last memory and the type of `x_BCHW`; summed in float32.
    """
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
    """Return the range of pixels whose neighbour at `offset` lies inside the map, and the range of those neighbours."""
    start, stop = max(0, -offset), size - max(0, offset)
    return slice(start, stop), slice(start + offset, stop + offset)


_prepack_lock = threading.Lock()


def onednn_available() -> bool:
    """Return whether this torch was built with oneDNN, has it enabled, and has its fused convolutions."""
    present = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[no-untyped-call]
    return bool(present and hasattr(torch.ops.mkldnn, "_convolution_pointwise"))


class PackedConv(FusedConv):
    """A FusedConv that packs its weights into oneDNN's layout at its first call, for the input size of that call.

    Other sizes give the same result; oneDNN reorders the weights again where it prefers another layout for them.
    """

    packed: torch.Tensor | None = None
    """An opaque mkldnn tensor: it can only be passed to oneDNN's operations, not read, sliced or saved."""

    def forward(
        self,
        x: torch.Tensor,
        addend: torch.Tensor | None = None,
        *,
        may_overwrite_addend: bool = False,
        bias: torch.Tensor | None = None,
        activation: Activation | None = None,
    ) -> torch.Tensor:
        """Run the convolution; arguments and result are those of `FusedConv.forward`."""
        if self.is_slow_depthwise and addend is None and activation is None and bias is None:
            return self._forward_by_taps(x)
        activation = activation or self.activation
        x, padding = self.padded(x)
        x = x.contiguous(memory_format=torch.channels_last)  # NHWC, for which the packed kernels are chosen
        shape: list[Any] = [list(padding), list(self.stride), list(self.dilation), self.groups]
        if self.packed is None:
            self._prepack_weight(shape, x)
        bias = self.bias if bias is None else bias
        name, scalars, algorithm = ("none", (), "") if activation is None else (activation.name, *_activation_args(activation))
        if addend is None:
            # private: (x, packed weight, bias, padding, stride, dilation, groups, activation, its scalars, its algorithm)
            out: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.packed, bias, *shape, name, list(scalars), algorithm
            )
            return out
        addend = addend.contiguous(memory_format=torch.channels_last)
        fused = activation is None or activation.name == "relu"  # after an addition, oneDNN's operation takes no other one
        unary = "relu" if fused and activation is not None else None
        rest = (self.packed, bias, *shape, "add", 1.0, unary, [], None)
        # variants with an addition: alpha 1.0 scales the addend; the trailing underscore writes the output into `addend`
        if may_overwrite_addend:
            out = torch.ops.mkldnn._convolution_pointwise_.binary(addend, x, *rest)
        else:
            out = torch.ops.mkldnn._convolution_pointwise.binary(x, addend, *rest)
        return out if fused or activation is None else activation(out)

    def _prepack_weight(self, shape: list[Any], x: torch.Tensor) -> None:
        """Pack the weights into oneDNN's layout, once, also if several threads make their first call together."""
        with _prepack_lock:
            if self.packed is None:
                # private operation; the layout is oneDNN's choice for this CPU and input shape, e.g. blocks of 16 channels
                self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *shape, list(x.shape))
                self.weight = self.weight.new_empty(0)  # frees the unpacked weights

    @property
    def is_slow_depthwise(self) -> bool:
        """Whether this is a depthwise convolution that is faster tap by tap than with oneDNN."""
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
    """A linear layer run by oneDNN as a 1x1 convolution: torch runs `nn.Linear` with MKL, which is slow on AMD CPUs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        shape = nn.Conv2d(linear.in_features, linear.out_features, 1, device="meta")
        self.conv = FusedConv(shape, linear.weight[:, :, None, None], linear.bias)
        self.conv.__class__ = PackedConv  # same state, other forward; see `prepack`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        rows_BCHW = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
        out: torch.Tensor = self.conv(rows_BCHW).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
        return out


def prepack(form: nn.Module) -> None:
    """Make the convolutions and linear layers of a fused model run on oneDNN, in place; does nothing where torch lacks it.

    Args:
        form: A model with FusedConv layers on the CPU, in float32 or bfloat16.
    """
    if onednn_available():
        for name, module in list(form.named_modules()):
            if type(module) is FusedConv:
                module.__class__ = PackedConv  # same state, other forward; a constructor would need the source convolution
            elif type(module) is nn.Linear:
                form.set_submodule(name, PackedLinear(module))


def _activation_args(activation: Activation) -> tuple[tuple[float, ...], str]:
    return activation.scalars, activation.algorithm
