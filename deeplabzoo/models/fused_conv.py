"""One convolution with everything that can be done while its output is written: bias, an addend, an activation.

Batch norm in eval mode is a scale and a shift per channel, so it disappears into weight and bias. The plain forward below is
made of torch's own operations and exports anywhere; `packing.py` gives the same module a faster one on x86 processors.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import activations as timm_activations
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from deeplabzoo.models.adapt_encoder import LoneSampleBatchNormAct2d, TrailingPadConv2d
from deeplabzoo.models.layers import Classifier, Conv2d, LoneSampleBatchNorm2d

Padding = Literal["fixed", "same", "trailing"]

PADDINGS: dict[type[nn.Conv2d], Padding] = {
    nn.Conv2d: "fixed",
    Conv2d: "fixed",
    Classifier: "fixed",
    Conv2dSame: "same",
    TrailingPadConv2d: "trailing",
}
"""Convolutions whose arithmetic is known here, by exact type: a subclass may standardise its weights, or do worse."""

BATCH_NORMS = (nn.BatchNorm2d, LoneSampleBatchNorm2d, BatchNormAct2d, LoneSampleBatchNormAct2d)
"""Norms that are a scale and a shift per channel in eval mode, by exact type."""


@dataclass(frozen=True)
class Activation:
    """An activation by the name that oneDNN knows it under, with its numbers."""

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str = ""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it with torch's own operations."""
        match self.name:
            case "relu":
                return F.relu(x)
            case "hardtanh":
                return F.hardtanh(x, min_val=self.scalars[0], max_val=self.scalars[1])
            case "hardswish":
                return F.hardswish(x)
            case "hardsigmoid":
                return F.hardsigmoid(x)
            case "swish":
                return F.silu(x)
            case "sigmoid":
                return x.sigmoid()
            case "leaky_relu":
                return F.leaky_relu(x, negative_slope=self.scalars[0])
            case _:
                return F.gelu(x, approximate=self.algorithm)


RELU = Activation("relu")

_PLAIN_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: RELU,
    nn.ReLU6: Activation("hardtanh", (0.0, 6.0)),
    nn.Hardswish: Activation("hardswish"),
    nn.Hardsigmoid: Activation("hardsigmoid"),
    nn.SiLU: Activation("swish"),
    nn.Sigmoid: Activation("sigmoid"),
    timm_activations.HardSwish: Activation("hardswish"),
    timm_activations.HardSigmoid: Activation("hardsigmoid"),
    timm_activations.Swish: Activation("swish"),
    timm_activations.Sigmoid: Activation("sigmoid"),
    timm_activations.GELU: Activation("gelu", (), "none"),
    timm_activations.GELUTanh: Activation("gelu", (), "tanh"),
}


def activation_of(module: nn.Module) -> Activation | None:
    """Return the activation that a module is, by its exact type, or None where it is none of those known here."""
    if type(module) is nn.LeakyReLU:
        return Activation("leaky_relu", (module.negative_slope,))
    if type(module) is nn.GELU:
        return Activation("gelu", (), module.approximate)
    return _PLAIN_ACTIVATIONS.get(type(module))


class FusedConv(nn.Module):
    """`activation(convolution(x) + bias + plus)`, with tensors of its own and no gradients."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        conv: nn.Conv2d,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: Activation | None = None,
    ) -> None:
        """Take strides, padding, dilation and groups from `conv`, whose type is one of `PADDINGS`."""
        super().__init__()
        self.register_buffer("weight", weight.detach().contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())
        self.padding_kind = PADDINGS[type(conv)]
        self.kernel_size, self.stride, self.dilation = _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.dilation)
        self.padding = _pair(conv.padding) if isinstance(conv.padding, tuple) else (0, 0)
        self.groups = self.weight.shape[0] if conv.groups == conv.in_channels == conv.out_channels else conv.groups
        self.activation = activation

    def forward(
        self,
        x: torch.Tensor,
        plus: torch.Tensor | None = None,
        *,
        plus_is_spent: bool = False,
        bias: torch.Tensor | None = None,
        activation: Activation | None = None,
    ) -> torch.Tensor:
        """Map B x in x H x W to B x out x H' x W'; `plus` has the output's shape.

        `bias` and `activation` take the place of the module's own. Where `plus_is_spent`, nobody needs `plus` afterwards, and
        the output may be written over it.
        """
        activation = activation or self.activation
        x, padding = self.padded(x)
        out = F.conv2d(x, self.weight, self.bias if bias is None else bias, self.stride, padding, self.dilation, self.groups)
        if plus is not None:
            out = out + plus
        return out if activation is None else activation(out)

    def padded(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the input, extended where its padding is uneven, and the even padding that the convolution is to add."""
        if self.padding_kind == "fixed":
            return x, self.padding
        reaches = [rate * (kernel - 1) for rate, kernel in zip(self.dilation, self.kernel_size, strict=True)]
        if self.padding_kind == "same":
            reaches = [
                max((-(-side // stride) - 1) * stride + reach + 1 - side, 0)
                for side, stride, reach in zip(x.shape[-2:], self.stride, reaches, strict=True)
            ]
            if all(reach % 2 == 0 for reach in reaches):
                return x, (reaches[0] // 2, reaches[1] // 2)
            (down, right), (up, left) = reaches, [reach // 2 for reach in reaches]
            return F.pad(x, (left, right - left, up, down - up)), (0, 0)
        return F.pad(x, (0, reaches[1], 0, reaches[0])), (0, 0)

    def part(self, channels: slice) -> "FusedConv":
        """Return the part that reads `channels` of the input alone.

        The parts of a dense convolution add up to the whole without its bias and activation, so they have neither; those of a
        depthwise one give the channels that they read, finished.
        """
        part = copy.copy(self)
        part._buffers = dict(self._buffers)
        if self.groups > 1:
            part.weight = self.weight[channels].contiguous(memory_format=torch.channels_last)
            part.bias = None if self.bias is None else self.bias[channels].contiguous()
            part.groups = part.weight.shape[0]
        else:
            part.weight = self.weight[:, channels].contiguous(memory_format=torch.channels_last)
            part.bias = part.activation = None
        return part


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: Activation | None) -> FusedConv:
    """Return the convolution with an eval-mode batch norm folded into it; the arithmetic is done in float64."""
    if norm is None:
        return FusedConv(conv, conv.weight, conv.bias, activation)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() if conv.bias is None else conv.bias.detach().double() - norm.running_mean.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    return FusedConv(conv, weight.to(conv.weight.dtype), shift.to(conv.weight.dtype), activation)


def _pair(sides: tuple[int, ...]) -> tuple[int, int]:
    height, width = sides
    return height, width
