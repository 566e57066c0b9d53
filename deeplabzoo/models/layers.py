"""Convolution blocks and normalisation that the heads are made of, and that stay trainable on a batch of one.

Names in a state dict: a block is `.conv` + `.norm`; a separable one is `.depthwise.{conv,norm}` + `.pointwise.{conv,norm}`.
"""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from deeplabzoo.errors import UsageError
from deeplabzoo.log import logger
from deeplabzoo.models.config import aspp_rates as aspp_rates
from deeplabzoo.models.config import scale_atrous_rates as scale_atrous_rates

Norm = Literal["batch", "group"]


class Conv2d(nn.Conv2d):
    """A convolution that keeps the map's size at stride 1 and starts with the initialisation made for ReLU (He et al., 2015).

    Initialised once, where it is made: torch's own default first and another one on top doubles the cost of `create`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, dilation: int = 1, groups: int = 1, bias: bool
    ) -> None:
        padding = dilation * (kernel - 1) // 2
        super().__init__(in_channels, out_channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias)

    def reset_parameters(self) -> None:
        """Fan-in mode, as it holds for depthwise convolutions too: their fan-out would count channels that never meet."""
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def set_dilation(self, dilation: int) -> None:
        """Change the atrous rate, and the padding with it so that the map's size stays."""
        padding = dilation * (self.kernel_size[0] - 1) // 2
        self.dilation, self.padding = (dilation, dilation), (padding, padding)


class Classifier(nn.Conv2d):
    """The 1x1 convolution to class scores; starts near zero so that no class is favoured (standard deviation 0.01)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, 1)

    def reset_parameters(self) -> None:
        """Small normal weights, no bias: the TensorFlow DeepLab's initialisation of its logits layer."""
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SingleSampleBatchNormMixin(nn.Module):
    """Mixed into a batch norm: in training it uses its running statistics where a channel has one single value.

    The pooled branch of a batch of one is such a case: no variance exists, and plain batch norm raises "Expected more than 1
    value per channel when training". Running statistics are the best estimate there is; they are not updated by that step.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise a map of shape B x C x H x W as the batch norm below would, in eval mode if it must be."""
        is_single_sample = self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1
        if is_single_sample:
            _warn_single_sample()
            self.training = False
        try:
            normalized: torch.Tensor = super().forward(x)
        finally:
            self.training = self.training or is_single_sample
        return normalized


class SingleSampleBatchNorm2d(SingleSampleBatchNormMixin, nn.BatchNorm2d):
    """Batch norm that bears a batch of one on a 1x1 map."""


@functools.cache
def _warn_single_sample() -> None:
    """Once per process: a training loop with such batches would otherwise repeat it at every step."""
    logger.info("Batch of one: batch norm on pooled 1x1 maps uses its running statistics (said once).")


def num_norm_groups(channels: int) -> int:
    """Return how many groups GroupNorm makes of `channels`: at most 32, and never a lone channel to a group if avoidable.

    A group of one channel on a 1x1 map has no variance, which is the batch-norm problem again.

    >>> num_norm_groups(256), num_norm_groups(48), num_norm_groups(16)
    (32, 24, 8)
    """
    return next(count for count in range(min(32, max(1, channels // 2)), 0, -1) if channels % count == 0)


def make_norm(norm: Norm, channels: int, eps: float) -> nn.Module:
    """Return the normalisation layer of a head: `batch` (safe for a lone sample) or `group`."""
    if norm == "group":
        return nn.GroupNorm(num_norm_groups(channels), channels, eps=eps)
    return SingleSampleBatchNorm2d(channels, eps=eps)


class ConvNormAct(nn.Module):
    """Convolution, normalisation, ReLU; without normalisation (`norm=None`) the convolution has a bias instead.

    A `conv_only` one is the convolution alone, without bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        norm: Norm | None,
        eps: float,
        dilation: int = 1,
        groups: int = 1,
        conv_only: bool = False,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_channels, out_channels, kernel, dilation=dilation, groups=groups, bias=norm is None and not conv_only
        )
        self.norm = nn.Identity() if norm is None or conv_only else make_norm(norm, out_channels, eps)
        self.conv_only = conv_only

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x out x H x W."""
        out: torch.Tensor = self.norm(self.conv(x))
        return out if self.conv_only else F.relu(out)

    def set_dilation(self, dilation: int) -> None:
        """Change the atrous rate."""
        self.conv.set_dilation(dilation)


class SeparableConvNormAct(nn.Module):
    """A depthwise atrous convolution, then a pointwise one, with normalisation and ReLU after *both*.

    So do the TensorFlow models (DeepLabV3+, section 3.1); leaving them out after the depthwise half is a common deviation,
    which `depthwise_norm=False` reproduces.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        norm: Norm,
        eps: float,
        dilation: int = 1,
        depthwise_norm: bool = True,
    ) -> None:
        super().__init__()
        self.depthwise = ConvNormAct(
            in_channels,
            in_channels,
            kernel,
            norm=norm,
            eps=eps,
            dilation=dilation,
            groups=in_channels,
            conv_only=not depthwise_norm,
        )
        self.pointwise = ConvNormAct(in_channels, out_channels, 1, norm=norm, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x out x H x W."""
        out: torch.Tensor = self.pointwise(self.depthwise(x))
        return out

    def set_dilation(self, dilation: int) -> None:
        """Change the atrous rate of the depthwise half."""
        self.depthwise.set_dilation(dilation)


# The arithmetic of output strides and atrous rates, in plain integers.
#
# One rule holds everything together: a rate keeps its reach *in pixels of the image*. Halving the output stride doubles
# every rate, so a network trained at stride 16 sees the same surroundings when it is run at stride 8 (DeepLabV3, section 3.3).


def multi_grid_dilations(
    multi_grid: tuple[int, ...], output_stride: int, blocks: int, *, halved: bool = False
) -> tuple[int, ...]:
    """Return the dilation of every block of the last encoder stage: its unit rate times the stage's own dilation.

    The stage's own dilation is 32 / output_stride, as its stride was 32 before the network was made denser; unit rates
    repeat when the stage has more blocks than `multi_grid` has entries (DeepLabV3, section 3.2.1). `halved` takes half of it,
    as mmsegmentation's networks do; raises UsageError where that leaves a fraction.

    >>> multi_grid_dilations((1, 2, 4), 16, 3), multi_grid_dilations((1, 2, 4), 16, 3, halved=True)
    ((2, 4, 8), (1, 2, 4))
    """
    rates = tuple((32 // output_stride) * multi_grid[block % len(multi_grid)] for block in range(blocks))
    if halved and any(dilation % 2 for dilation in rates):
        raise UsageError(
            f"multi_grid {multi_grid} with multi_grid_halved has no whole dilations at output stride {output_stride}."
        )
    return tuple(dilation // 2 for dilation in rates) if halved else rates
