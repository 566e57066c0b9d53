"""Convolution blocks and normalisation that the heads are made of, and that stay trainable on a batch of one.

Names in a state dict: a block is `.conv` + `.norm`; a separable one is `.depthwise.{conv,norm}` + `.pointwise.{conv,norm}`.
"""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from deeplabzoo.say import say

Norm = Literal["batch", "group"]


class Conv2d(nn.Conv2d):
    """A convolution that keeps the map's size at stride 1 and starts with the initialisation made for ReLU (He et al., 2015).

    Initialised once, where it is made: torch's own default first and another one on top doubles the cost of `create`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, rate: int = 1, groups: int = 1, bias: bool) -> None:
        reach = rate * (kernel - 1) // 2
        super().__init__(in_channels, out_channels, kernel, padding=reach, dilation=rate, groups=groups, bias=bias)

    def reset_parameters(self) -> None:
        """Fan-in mode, as it holds for depthwise convolutions too: their fan-out would count channels that never meet."""
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def set_rate(self, rate: int) -> None:
        """Change the atrous rate, and the padding with it so that the map's size stays."""
        reach = rate * (self.kernel_size[0] - 1) // 2
        self.dilation, self.padding = (rate, rate), (reach, reach)


class Classifier(nn.Conv2d):
    """The 1x1 convolution to class scores; starts near zero so that no class is favoured (standard deviation 0.01)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, 1)

    def reset_parameters(self) -> None:
        """Small normal weights, no bias: the TensorFlow DeepLab's initialisation of its logits layer."""
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class BearsLoneSample(nn.Module):
    """Mixed into a batch norm: in training it uses its running statistics where a channel has one single value.

    The pooled branch of a batch of one is such a case: no variance exists, and plain batch norm raises "Expected more than 1
    value per channel when training". Running statistics are the best estimate there is; they are not updated by that step.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise a map of shape B x C x H x W as the batch norm below would, in eval mode if it must be."""
        lone = self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1
        if lone:
            _say_lone_sample()
            self.training = False
        try:
            normalised: torch.Tensor = super().forward(x)
        finally:
            self.training = self.training or lone
        return normalised


class LoneSampleBatchNorm2d(BearsLoneSample, nn.BatchNorm2d):
    """Batch norm that bears a batch of one on a 1x1 map."""


@functools.cache
def _say_lone_sample() -> None:
    """Once per process: a training loop with such batches would otherwise repeat it at every step."""
    say("Batch of one: batch norm on pooled 1x1 maps uses its running statistics (said once).")


def group_count(channels: int) -> int:
    """Return how many groups GroupNorm makes of `channels`: at most 32, and never a lone channel to a group if avoidable.

    A group of one channel on a 1x1 map has no variance, which is the batch-norm problem again.

    >>> group_count(256), group_count(48), group_count(16)
    (32, 24, 8)
    """
    return next(count for count in range(min(32, max(1, channels // 2)), 0, -1) if channels % count == 0)


def make_norm(norm: Norm, channels: int, eps: float) -> nn.Module:
    """Return the normalisation layer of a head: `batch` (safe for a lone sample) or `group`."""
    if norm == "group":
        return nn.GroupNorm(group_count(channels), channels, eps=eps)
    return LoneSampleBatchNorm2d(channels, eps=eps)


class ConvNormAct(nn.Module):
    """Convolution, normalisation, ReLU; without normalisation (`norm=None`) the convolution has a bias instead.

    A `bare` one is the convolution alone, without bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        norm: Norm | None,
        eps: float,
        rate: int = 1,
        groups: int = 1,
        bare: bool = False,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel, rate=rate, groups=groups, bias=norm is None and not bare)
        self.norm = nn.Identity() if norm is None or bare else make_norm(norm, out_channels, eps)
        self.bare = bare

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x out x H x W."""
        out: torch.Tensor = self.norm(self.conv(x))
        return out if self.bare else F.relu(out)

    def set_rate(self, rate: int) -> None:
        """Change the atrous rate."""
        self.conv.set_rate(rate)


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
        rate: int = 1,
        depthwise_norm: bool = True,
    ) -> None:
        super().__init__()
        self.depthwise = ConvNormAct(
            in_channels, in_channels, kernel, norm=norm, eps=eps, rate=rate, groups=in_channels, bare=not depthwise_norm
        )
        self.pointwise = ConvNormAct(in_channels, out_channels, 1, norm=norm, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x out x H x W."""
        out: torch.Tensor = self.pointwise(self.depthwise(x))
        return out

    def set_rate(self, rate: int) -> None:
        """Change the atrous rate of the depthwise half."""
        self.depthwise.set_rate(rate)
