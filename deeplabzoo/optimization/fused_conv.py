"""Fused convolution (batch norm folded into the weights, then bias, addition and activation) and fused residual blocks.

Batch norm in eval mode is a scale and a shift per channel, so it can be folded into weight and bias. `FusedConv.forward` uses
public torch operations only and runs on every device; `onednn.PackedConv` is the same layer with a faster forward for CPUs.
"""

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import activations as timm_activations
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from deeplabzoo.models.encoder_surgery import SingleSampleBatchNormAct2d, TrailingPadConv2d
from deeplabzoo.models.layers import Classifier, Conv2d, SingleSampleBatchNorm2d

Padding = Literal["fixed", "same", "trailing"]

PADDINGS: dict[type[nn.Conv2d], Padding] = {
    nn.Conv2d: "fixed",
    Conv2d: "fixed",
    Classifier: "fixed",
    Conv2dSame: "same",
    TrailingPadConv2d: "trailing",
}
"""Convolution -> how it pads. Matched by exact type, since a subclass may change the weights (e.g. weight standardization)."""

BATCH_NORMS = (nn.BatchNorm2d, SingleSampleBatchNorm2d, BatchNormAct2d, SingleSampleBatchNormAct2d)
"""Batch norms that are a scale and a shift per channel in eval mode, by exact type."""


@dataclass(frozen=True)
class Activation:
    """An activation function in the form that torch's oneDNN operations expect."""

    name: str
    """Name in oneDNN's operations, e.g. `relu`, `hardtanh`, `swish`."""
    scalars: tuple[float, ...] = ()
    """Parameters, e.g. the limits of `hardtanh`."""
    algorithm: str = ""
    """Approximation of `gelu`: `none` or `tanh`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation with public torch operations; any shape."""
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


def get_activation(module: nn.Module) -> Activation | None:
    """Return the activation that a module computes, by its exact type; None if the type is not known."""
    if type(module) is nn.LeakyReLU:
        return Activation("leaky_relu", (module.negative_slope,))
    if type(module) is nn.GELU:
        return Activation("gelu", (), module.approximate)
    return _PLAIN_ACTIVATIONS.get(type(module))


class FusedConv(nn.Module):
    """`activation(convolution(x) + bias + addend)`, for inference: weight and bias are buffers without gradients.

    Args:
        conv: Source of stride, padding, dilation and groups; its type is one of `PADDINGS`.
        weight: out x in / groups x kernel height x kernel width.
        bias: out, or None.
        activation: Applied last; None for none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        conv: nn.Conv2d,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: Activation | None = None,
    ) -> None:
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
        addend: torch.Tensor | None = None,
        *,
        may_overwrite_addend: bool = False,
        bias: torch.Tensor | None = None,
        activation: Activation | None = None,
    ) -> torch.Tensor:
        """Run the convolution.

        Args:
            x: B x in x H x W.
            addend: Added before the activation; B x out x H' x W', the shape of the output.
            may_overwrite_addend: Whether the output may be written into the memory of `addend`.
            bias: Replaces the bias of the layer.
            activation: Replaces the activation of the layer.

        Returns:
            B x out x H' x W'.
        """
        activation = activation or self.activation
        x, padding = self.padded(x)
        out = F.conv2d(x, self.weight, self.bias if bias is None else bias, self.stride, padding, self.dilation, self.groups)
        if addend is not None:
            out = out + addend
        return out if activation is None else activation(out)

    def padded(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the input, zero-padded if its padding is asymmetric, and the symmetric padding left to the convolution."""
        if self.padding_kind == "fixed":
            return x, self.padding
        # total padding per axis (height, width) in pixels: what the dilated kernel covers beyond its own pixel
        reaches = [dilation * (kernel - 1) for dilation, kernel in zip(self.dilation, self.kernel_size, strict=True)]
        if self.padding_kind == "same":  # TensorFlow's rule: as much as ceil(side / stride) outputs need, the odd pixel last
            reaches = [
                max((-(-side // stride) - 1) * stride + padding + 1 - side, 0)
                for side, stride, padding in zip(x.shape[-2:], self.stride, reaches, strict=True)
            ]
            if all(padding % 2 == 0 for padding in reaches):
                return x, (reaches[0] // 2, reaches[1] // 2)
            (down, right), (up, left) = reaches, [padding // 2 for padding in reaches]
            return F.pad(x, (left, right - left, up, down - up)), (0, 0)
        return F.pad(x, (0, reaches[1], 0, reaches[0])), (0, 0)

    def part(self, channels: slice) -> "FusedConv":
        """Return the part of the convolution that reads only `channels` of the input.

        The outputs of the parts of a dense convolution add up to that of the whole, so they have no bias and no activation.
        The parts of a depthwise convolution return their own channels, with bias and activation.
        """
        part = copy.copy(self)
        part._buffers = dict(self._buffers)  # copy.copy shares this dictionary, so new weights would replace those of `self`
        if self.groups > 1:
            part.weight = self.weight[channels].contiguous(memory_format=torch.channels_last)
            part.bias = None if self.bias is None else self.bias[channels].contiguous()
            part.groups = part.weight.shape[0]
        else:
            part.weight = self.weight[:, channels].contiguous(memory_format=torch.channels_last)
            part.bias = part.activation = None
        return part


def fold_batchnorm(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: Activation | None) -> FusedConv:
    """Return a convolution with an eval-mode batch norm folded into it, computed in float64.

    Args:
        conv: Its type is one of `PADDINGS`; it is not changed.
        norm: The batch norm after it, with running statistics; None for none.
        activation: The activation after both; None for none.
    """
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


# Residual blocks: the shortcut is added, and the activation applied, by the last convolution.


class _BlockSpec(NamedTuple):
    """Names of the layers of a residual block, in the order in which the block runs them."""

    before: tuple[str, ...]
    last: str
    norm: str
    activation: str | None


_BLOCKS: dict[type[nn.Module], _BlockSpec] = {
    Bottleneck: _BlockSpec(("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa"), "conv3", "bn3", "act3"),
    BasicBlock: _BlockSpec(("conv1", "bn1", "drop_block", "act1", "aa"), "conv2", "bn2", "act2"),
    InvertedResidual: _BlockSpec(("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se"), "conv_pwl", "bn3", None),
    DepthwiseSeparableConv: _BlockSpec(("conv_dw", "bn1", "aa", "se"), "conv_pw", "bn2", None),
}
"""timm's residual blocks, by exact type: a subclass may compute something else. Layer names are those of timm 1.0."""


class FusedResidual(nn.Module):
    """`activation(last(before(x)) + shortcut(x))`, with addition and activation computed by the last convolution."""

    def __init__(self, before: nn.Module, last: FusedConv, shortcut: nn.Module | None, activation: Activation | None) -> None:
        super().__init__()
        self.before, self.last, self.shortcut, self.activation = before, last, shortcut, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x out x H' x W'."""
        addend = x if self.shortcut is None else self.shortcut(x)
        out: torch.Tensor = self.last(
            self.before(x), addend=addend, may_overwrite_addend=self.shortcut is not None, activation=self.activation
        )
        return out


def fuse_residuals(encoder: nn.Module) -> None:
    """Replace the residual blocks of an encoder with folded batch norms, in place; unknown variants are left as they are."""
    for name, block in list(encoder.named_modules()):
        fused = _fuse_block(block)
        if fused is not None:
            encoder.set_submodule(name, fused)


def _fuse_block(block: nn.Module) -> FusedResidual | None:
    parts = _BLOCKS.get(type(block))
    if parts is None or not getattr(block, "has_skip", True) or getattr(block, "conv_s2d", None) is not None:
        return None
    last, activation = getattr(block, parts.last), None
    if not isinstance(last, FusedConv) or last.activation is not None or _is_not_identity(getattr(block, parts.norm)):
        return None
    if _is_not_identity(block.drop_path) or ("se" not in parts.before and _is_not_identity(block.se)):
        return None
    if parts.activation is not None:
        activation = get_activation(getattr(block, parts.activation))
        if activation is None:
            return None
    before = nn.Sequential(*(one for one in (getattr(block, part) for part in parts.before) if _is_not_identity(one)))
    shortcut = getattr(block, "downsample", None)
    return FusedResidual(before, last, shortcut if _is_not_identity(shortcut) else None, activation)


def _is_not_identity(module: object) -> TypeGuard[nn.Module]:
    return isinstance(module, nn.Module) and not isinstance(module, nn.Identity)
