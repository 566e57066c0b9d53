"""What DeepLab puts on an encoder: atrous spatial pyramid pooling, the V3 head, the V3+ decoder, the auxiliary head.

Names in a state dict (what converters of foreign checkpoints map onto):
`aspp.branches.0` the 1x1, `aspp.branches.1…` the atrous ones in order of rate, `aspp.pool`, `aspp.project`;
V3: `refine` (absent with refine_conv=False), `classifier`; V3+: `refine` (only with decoder_refine_conv), `low_level`,
`decoder.0…`, `classifier`;
auxiliary: `block`, `classifier`.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.layers import Classifier, ConvNormAct, SeparableConvNormAct, aspp_rates


def resolve_atrous_rates(config: DeepLabConfig) -> tuple[int, ...]:
    """Return the ASPP rates that a configuration means: its own, or the papers' for its output stride."""
    return aspp_rates(config.output_stride) if config.atrous_rates is None else config.atrous_rates


def _conv3x3(
    config: DeepLabConfig, in_channels: int, out_channels: int, *, separable: bool, dilation: int = 1
) -> ConvNormAct | SeparableConvNormAct:
    norm, eps = config.norm, config.norm_eps
    if not separable:
        return ConvNormAct(in_channels, out_channels, 3, norm=norm, eps=eps, dilation=dilation)
    return SeparableConvNormAct(
        in_channels, out_channels, 3, norm=norm, eps=eps, dilation=dilation, depthwise_norm=config.depthwise_norm
    )


def _pooling_cells(config: DeepLabConfig) -> tuple[int, int] | None:
    """Return the pooling window in cells of the encoder's last map."""
    if config.pooling_window is None:
        return None
    height, width = (max(1, side // config.output_stride) for side in config.pooling_window)
    return height, width


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with an image-level branch (DeepLabV3, section 3.3).

    The pooled branch is a mean over the map, which exports everywhere, and is repeated over the map: bilinear upsampling of
    a single value is a constant, whatever `align_corners` says. With `pooling_window` it is a mean over a window of that size
    at each place where one fits, upsampled to the map.
    """

    def __init__(self, config: DeepLabConfig, in_channels: int) -> None:
        super().__init__()
        channels, norm, eps = config.head_channels, config.norm, config.norm_eps
        separable = config.architecture == "deeplabv3plus" if config.aspp_separable is None else config.aspp_separable
        rates = resolve_atrous_rates(config)
        atrous = (_conv3x3(config, in_channels, channels, separable=separable, dilation=dilation) for dilation in rates)
        self.branches = nn.ModuleList([ConvNormAct(in_channels, channels, 1, norm=norm, eps=eps), *atrous])
        self.pool = ConvNormAct(in_channels, channels, 1, norm=norm if config.pooling_norm else None, eps=eps)
        self.project = ConvNormAct((len(rates) + 2) * channels, channels, config.aspp_project_kernel, norm=norm, eps=eps)
        self.dropout = nn.Dropout(config.dropout)
        self.pooling_first = config.pooling_first
        self.pooling_cells = _pooling_cells(config)
        self.align_corners = config.align_corners

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map encoder features B x C x h x w to B x head_channels x h x w."""
        branches = [branch(x) for branch in self.branches]
        if self.pooling_cells is None:
            pooled = self.pool(x.mean((2, 3), keepdim=True)).expand_as(branches[0])
        else:
            pooled = self._pool_windows(x, self.pooling_cells)
        branches.insert(0 if self.pooling_first else len(branches), pooled)
        out: torch.Tensor = self.dropout(self.project(torch.cat(branches, dim=1)))
        return out

    def _pool_windows(self, x: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
        size = x.shape[-2:]
        pooled = self.pool(F.avg_pool2d(x, (min(cells[0], size[0]), min(cells[1], size[1])), stride=1))
        return F.interpolate(pooled, size=size, mode="bilinear", align_corners=self.align_corners)

    def update_dilation(self, config: DeepLabConfig) -> None:
        """Take the rates of the atrous branches and the pooling window from another configuration; parameters stay."""
        rates, self.pooling_cells = resolve_atrous_rates(config), _pooling_cells(config)
        atrous = (branch for branch in list(self.branches)[1:] if isinstance(branch, ConvNormAct | SeparableConvNormAct))
        for branch, dilation in zip(atrous, rates, strict=True):
            branch.set_dilation(dilation)


class V3Head(nn.Module):
    """ASPP, optionally a 3x3 convolution, classifier; logits come at the encoder's output stride."""

    def __init__(self, config: DeepLabConfig, in_channels: int) -> None:
        super().__init__()
        self.aspp = ASPP(config, in_channels)
        channels = config.head_channels
        self.refine = _conv3x3(config, channels, channels, separable=False) if config.refine_conv else nn.Identity()
        self.classifier = Classifier(channels, config.num_classes)

    def forward(self, high: torch.Tensor) -> torch.Tensor:
        """Map the last encoder feature B x C x h x w to logits B x num_classes x h x w."""
        logits: torch.Tensor = self.classifier(self.refine(self.aspp(high)))
        return logits


class V3PlusHead(nn.Module):
    """ASPP and a decoder that adds detail from the encoder's stride-4 feature (DeepLabV3+, section 3.1 and table 1).

    48 channels for the low-level projection and two 3x3 convolutions of 256 are the paper's best; logits come at stride 4.
    """

    def __init__(self, config: DeepLabConfig, in_channels: int, low_level_channels: int) -> None:
        super().__init__()
        self.aspp = ASPP(config, in_channels)
        channels, low, width = config.head_channels, config.decoder_low_level_channels, config.decoder_channels
        separable, kernel = config.decoder_separable, config.decoder_kernel
        self.refine = _conv3x3(config, channels, channels, separable=separable) if config.decoder_refine_conv else nn.Identity()
        self.low_level = ConvNormAct(low_level_channels, low, 1, norm=config.norm, eps=config.norm_eps)
        widths = [channels + low] + config.decoder_convs * [width]
        pairs = itertools.pairwise(widths)
        if kernel == 1:
            blocks = [ConvNormAct(a, b, 1, norm=config.norm, eps=config.norm_eps) for a, b in pairs]
            self.decoder = nn.Sequential(*blocks)
        else:
            self.decoder = nn.Sequential(*(_conv3x3(config, a, b, separable=separable) for a, b in pairs))
        self.classifier = Classifier(widths[-1], config.num_classes)
        self.low_level_first = config.decoder_low_level_first
        self.align_corners = config.align_corners

    def forward(self, high: torch.Tensor, low_level: torch.Tensor) -> torch.Tensor:
        """Map B x C x h x w and the stride-4 feature B x C' x H x W to logits B x num_classes x H x W."""
        low = self.low_level(low_level)
        high = self.refine(self.aspp(high))
        high = F.interpolate(high, size=low.shape[-2:], mode="bilinear", align_corners=self.align_corners)
        both = (low, high) if self.low_level_first else (high, low)
        logits: torch.Tensor = self.classifier(self.decoder(torch.cat(both, dim=1)))
        return logits


class AuxiliaryHead(nn.Module):
    """A small fully convolutional head on the stage before the last: extra gradient in training, unused afterwards.

    A quarter of the channels and dropout 0.1 (or the head's, if that is less), as in PSPNet (1612.01105, section 3.3) and
    torchvision.
    """

    def __init__(self, config: DeepLabConfig, in_channels: int) -> None:
        super().__init__()
        channels = max(1, in_channels // 4)
        self.block = _conv3x3(config, in_channels, channels, separable=False)
        self.dropout = nn.Dropout(min(config.dropout, 0.1))
        self.classifier = Classifier(channels, config.num_classes)

    def forward(self, middle: torch.Tensor) -> torch.Tensor:
        """Map the encoder feature before the last, B x C x h x w, to logits B x num_classes x h x w."""
        logits: torch.Tensor = self.classifier(self.dropout(self.block(middle)))
        return logits
