"""The heads in the form for inference: the same sums in an order that needs no concatenation and no repeated map.

A 1x1 convolution over concatenated maps is the sum of 1x1 convolutions over each of them, by the slice of the weights that
reads it. So each branch of ASPP is projected and added up, and the pooled branch, constant over the map, is a bias of the
projection. The decoder's first convolution is split in the same way, and depthwise ones have nothing to add at all. Without
decoder convolutions the classifier runs before the upsampling: bilinear weights sum to 1, so both orders give the same.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from deeplabzoo.models.folding import shared_copy
from deeplabzoo.models.fused_conv import BATCH_NORMS, RELU, FusedConv, fold
from deeplabzoo.models.heads import ASPP, V3Head
from deeplabzoo.models.layers import ConvNormAct, SeparableConvNormAct


def fast_block(block: nn.Module) -> nn.Module:
    """Return a head's block with its norms folded; group norm, which depends on the image, stays a step of its own."""
    if isinstance(block, ConvNormAct) and (type(block.norm) in BATCH_NORMS or isinstance(block.norm, nn.Identity)):
        norm = block.norm if isinstance(block.norm, nn.BatchNorm2d) else None
        return fold(block.conv, norm, None if block.bare else RELU)
    if isinstance(block, ConvNormAct):
        return nn.Sequential(fold(block.conv, None, None), _NormRelu(block.norm))
    if isinstance(block, SeparableConvNormAct):
        return nn.Sequential(fast_block(block.depthwise), fast_block(block.pointwise))
    return shared_copy(block)


class _NormRelu(nn.Module):
    """What follows a convolution whose norm could not be folded."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = shared_copy(norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and activate."""
        return F.relu(self.norm(x))


class SlicedConv(nn.Module):
    """A convolution over maps that would be concatenated: each map by its own slice of the weights, added up."""

    bias: torch.Tensor | None

    def __init__(self, block: nn.Module, widths: Sequence[int]) -> None:
        """`block` is a ConvNormAct or a bare convolution; `widths` are the channels of the maps in order of concatenation."""
        super().__init__()
        self.finish: nn.Module = nn.Identity()
        if isinstance(block, ConvNormAct) and type(block.norm) in BATCH_NORMS:
            assert isinstance(block.norm, nn.BatchNorm2d)
            whole, activation = fold(block.conv, block.norm, None), RELU
        elif isinstance(block, ConvNormAct):
            whole, activation = fold(block.conv, None, None), None
            self.finish = _NormRelu(block.norm)
        else:
            assert isinstance(block, nn.Conv2d)
            whole, activation = fold(block, None, None), None
        ends = list(itertools.accumulate(widths))
        places = [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]
        self.parts = nn.ModuleList(whole.part(place) for place in places)
        self.activation = activation
        self.register_buffer("bias", whole.bias)

    def part(self, index: int) -> FusedConv:
        """Return the convolution of one map, without bias and activation."""
        part = self.parts[index]
        assert isinstance(part, FusedConv)
        return part

    def forward(self, maps: Sequence[tuple[int, torch.Tensor]], constant_BC11: torch.Tensor | None = None) -> torch.Tensor:
        """Return the whole convolution's answer to maps given with their place in the concatenation.

        `constant_BC11` is the share of a map that is constant, or any map of the output's shape, already convolved.
        """
        bias, total = self.bias, None
        if constant_BC11 is not None and constant_BC11.shape[0] == constant_BC11.shape[2] == constant_BC11.shape[3] == 1:
            bias = constant_BC11.flatten() if bias is None else bias + constant_BC11.flatten()
        else:
            total = constant_BC11
        for number, (place, x) in enumerate(maps):
            out = self.part(place)
            last = self.activation if number == len(maps) - 1 else None
            own = bias if number == 0 else None
            if total is not None and total.shape[2:] == (1, 1) and x.shape[2:] != (1, 1):
                total = out(x, bias=own).add_(total)
                total = total if last is None else last(total)
            else:
                total = out(x, plus=total, plus_is_spent=True, bias=own, activation=last)
        assert total is not None
        finished: torch.Tensor = self.finish(total)
        return finished


class FastASPP(nn.Module):
    """Atrous spatial pyramid pooling whose branches are projected one by one."""

    def __init__(self, aspp: ASPP) -> None:
        super().__init__()
        self.branches = nn.ModuleList(fast_block(branch) for branch in aspp.branches)
        self.pool = fast_block(aspp.pool)
        channels = aspp.project.conv.in_channels // (len(self.branches) + 1)
        self.project = SlicedConv(aspp.project, (len(self.branches) + 1) * [channels])
        self.pool_place = 0 if aspp.pooling_first else len(self.branches)
        self.places = [place for place in range(len(self.branches) + 1) if place != self.pool_place]
        self.pointwise = aspp.project.conv.kernel_size == (1, 1)
        self.pooling_cells = aspp.pooling_cells
        self.align_corners = aspp.align_corners

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map encoder features B x C x h x w to B x head_channels x h x w."""
        maps = [(place, branch(x)) for place, branch in zip(self.places, self.branches, strict=True)]
        projected: torch.Tensor = self.project(maps, self._pooled(x))
        return projected

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Return the pooled branch's share of the projection: 1x1 cells where it is constant, else the whole map.

        A 3x3 projection pads the map with zeros, so its share of a constant is no constant at the border.
        """
        size, project = x.shape[-2:], self.project.part(self.pool_place)
        if self.pooling_cells is None:
            pooled = self.pool(x.mean((2, 3), keepdim=True))
            share: torch.Tensor = project(pooled if self.pointwise else pooled.expand(-1, -1, *size))
            return share
        height, width = self.pooling_cells
        pooled = self.pool(F.avg_pool2d(x, (min(height, size[0]), min(width, size[1])), stride=1))
        enlarged = project(pooled) if self.pointwise else pooled
        enlarged = F.interpolate(enlarged, size=size, mode="bilinear", align_corners=self.align_corners)
        return enlarged if self.pointwise else project(enlarged)


class FastV3Head(nn.Module):
    """The V3 head: logits at the encoder's output stride."""

    def __init__(self, head: V3Head) -> None:
        super().__init__()
        self.aspp = FastASPP(head.aspp)
        self.refine = fast_block(head.refine)
        self.classifier = fold(head.classifier, None, None)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Map the last encoder feature, [B x C x h x w], to logits B x num_classes x h x w; the list is emptied."""
        logits: torch.Tensor = self.classifier(self.refine(self.aspp(features.pop())))
        return logits
