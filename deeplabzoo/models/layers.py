"""Convolution blocks and batch norms that the heads are made of.

Names in a state dict: a block is `.conv` + `.norm`; a separable one is `.depthwise.{conv,norm}` + `.pointwise.{conv,norm}`.
"""

import functools
from typing import Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from deeplabzoo.errors import UsageError
from deeplabzoo.log import logger
from deeplabzoo.models.config import aspp_rates as aspp_rates
from deeplabzoo.models.config import scale_atrous_rates as scale_atrous_rates

Norm = Literal["batch", "group"]


class Conv2d(nn.Conv2d):
    """A convolution that keeps the map's size at stride 1, initialized for ReLU (He et al., 2015).

    `reset_parameters` replaces torch's own initialization; a second one on top would double the cost of `create`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, dilation: int = 1, groups: int = 1, bias: bool
    ) -> None:
        padding = dilation * (kernel - 1) // 2
        super().__init__(in_channels, out_channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias)

    def reset_parameters(self) -> None:
        """Initialize in fan-in mode: the fan-out of a depthwise convolution would count channels that it never sums."""
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def set_dilation(self, dilation: int) -> None:
        """Change the dilation, and the padding with it, so that the map keeps its size."""
        padding = dilation * (self.kernel_size[0] - 1) // 2
        self.dilation, self.padding = (dilation, dilation), (padding, padding)


class Classifier(nn.Conv2d):
    """The 1x1 convolution to class logits, initialized near zero (standard deviation 0.01) so that no class is favoured."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, 1)

    def reset_parameters(self) -> None:
        """Initialize as the TensorFlow DeepLab does its logits layer: small normal weights, zero bias."""
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@torch.fx.wrap  # one call in a traced graph: its condition depends on the image's size
def single_sample_batch_norm(
    x_BCHW: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> torch.Tensor:
    """Compute torch's batch norm, in training with the running statistics where a channel has a single value.

    The pooled branch of a batch of one is such a case: no variance exists, and plain batch norm raises "Expected more than 1
    value per channel when training". Running statistics are the best estimate there is; that step does not update them.
    """
    if training and x_BCHW.shape[0] * x_BCHW.shape[2] * x_BCHW.shape[3] == 1:
        training = False
        if not torch.compiler.is_compiling():  # a log line would break the graph
            _warn_single_sample()
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        momentum = 1 / float(num_batches_tracked) if momentum is None else momentum  # None: a cumulative average
    use_batch = training or running_mean is None
    return F.batch_norm(x_BCHW, running_mean, running_var, weight, bias, use_batch, momentum or 0.0, eps)


class SingleSampleBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that accepts a batch of one on a 1x1 map in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize a map of shape B x C x H x W."""
        counter, training = self.num_batches_tracked, self.training
        return single_sample_batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, counter, training, self.momentum, self.eps
        )


@functools.cache
def _warn_single_sample() -> None:
    """Log once per process: a training loop with such batches would otherwise repeat it at every step."""
    logger.warning("Batch of one: batch norm on pooled 1x1 maps uses its running statistics (logged once).")


def num_norm_groups(channels: int) -> int:
    """Return the number of groups of a group norm: at most 32, with two channels or more in a group where possible.

    A group of one channel has no variance on a 1x1 map, as a batch norm has none for a batch of one.

    >>> num_norm_groups(256), num_norm_groups(48), num_norm_groups(16)
    (32, 24, 8)
    """
    return next(count for count in range(min(32, max(1, channels // 2)), 0, -1) if channels % count == 0)


def make_norm(norm: Norm, channels: int, eps: float) -> nn.Module:
    """Return the batch norm (which accepts a batch of one) or group norm of a head."""
    if norm == "group":
        return nn.GroupNorm(num_norm_groups(channels), channels, eps=eps)
    return SingleSampleBatchNorm2d(channels, eps=eps)


class ConvNormAct(nn.Module):
    """Convolution, batch or group norm, ReLU; with `norm=None` the convolution has a bias instead of the norm.

    With `conv_only` it is the convolution alone, without bias.
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
        """Change the dilation."""
        self.conv.set_dilation(dilation)


class SeparableConvNormAct(nn.Module):
    """A depthwise atrous convolution, then a pointwise one, with batch or group norm and ReLU after *both*.

    The TensorFlow models do so (DeepLabV3+, section 3.1). Leaving them out after the depthwise half is a common deviation,
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
        """Change the dilation of the depthwise half."""
        self.depthwise.set_dilation(dilation)


def multi_grid_dilations(
    multi_grid: tuple[int, ...], output_stride: int, blocks: int, *, halved: bool = False
) -> tuple[int, ...]:
    """Return the dilation of every block of the last encoder stage: its unit rate times the stage's own dilation.

    The stage's own dilation is 32 / output_stride, as its stride was 32 before strides were traded for dilation; unit rates
    repeat when the stage has more blocks than `multi_grid` has entries (DeepLabV3, section 3.2.1).

    Args:
        multi_grid: Unit rates of the blocks.
        output_stride: Pixels per cell of the stage: 8, 16 or 32.
        blocks: Number of blocks of the stage.
        halved: Unit rates count half of the stage's dilation, as in mmsegmentation's models.

    Raises:
        UsageError: Half of a dilation is a fraction.

    >>> multi_grid_dilations((1, 2, 4), 16, 3), multi_grid_dilations((1, 2, 4), 16, 3, halved=True)
    ((2, 4, 8), (1, 2, 4))
    """
    rates = tuple((32 // output_stride) * multi_grid[block % len(multi_grid)] for block in range(blocks))
    if halved and any(dilation % 2 for dilation in rates):
        raise UsageError(
            f"multi_grid {multi_grid} with multi_grid_halved has no whole dilations at output stride {output_stride}."
        )
    return tuple(dilation // 2 for dilation in rates) if halved else rates
