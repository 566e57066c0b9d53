"""The few layers whose forward pass computes sizes in Python, written so that a trace keeps the sizes open.

A trace follows tensors. Where a layer decides by a Python number (how many patches a map has, how large a window may be) the
trace would keep the number of the picture that it was made with, and the file would be wrong for all others.
"""

import copy
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.mobilevit import MobileVitBlock, MobileVitV2Block
from torch import nn

from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.heads import ASPP


class TraceableMobileVitBlock(MobileVitBlock):
    """timm's MobileViT block; the resize to whole patches is always in the graph (of a map that has them, it is a copy)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x C x H x W to the same shape."""
        shortcut = x
        x = self.conv_1x1(self.conv_kxk(x))
        height, width = x.shape[-2:]
        rows, columns = _patches(height, self.patch_size[0]), _patches(width, self.patch_size[1])
        x = _to_patches(_resized(x, rows, columns, self.patch_size, align_corners=False), rows, columns, self.patch_size)
        batch, channels, area, count = x.shape
        x = self.norm(self.transformer(x.permute(0, 2, 3, 1).reshape(-1, count, self.conv_1x1.out_channels)))
        x = x.reshape(batch, area, count, channels).permute(0, 3, 1, 2)
        x = _from_patches(x, rows, columns, self.patch_size)
        x = self.conv_proj(F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False))
        if self.conv_fusion is not None:
            x = self.conv_fusion(torch.cat((shortcut, x), dim=1))
        return x


class TraceableMobileVitV2Block(MobileVitV2Block):
    """timm's MobileViT-v2 block, in the same way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x C x H x W to B x C x H' x W', which are whole patches."""
        rows, columns = (_patches(side, patch) for side, patch in zip(x.shape[-2:], self.patch_size, strict=True))
        x = self.conv_1x1(self.conv_kxk(_resized(x, rows, columns, self.patch_size, align_corners=True)))
        x = self.norm(self.transformer(_to_patches(x, rows, columns, self.patch_size)))
        folded: torch.Tensor = self.conv_proj(_from_patches(x, rows, columns, self.patch_size))
        return folded


class TraceableASPP(ASPP):
    """ASPP with a pooling window that is never larger than the map, as differences of running sums."""

    def _pool_windows(self, x: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
        size = x.shape[-2:]
        pooled = self.pool(_window_mean(_window_mean(x, 2, cells[0]), 3, cells[1]))
        return F.interpolate(pooled, size=size, mode="bilinear", align_corners=self.align_corners)


def traceable(net: DeepLab) -> DeepLab:
    """Return a copy of the network, in eval mode on the CPU, that a trace follows for every batch and size; same numbers."""
    twin = copy.deepcopy(net).cpu().float().eval()
    twin.aux_head = None
    for module in twin.modules():
        traced = _TRACEABLE.get(type(module))
        if traced is not None and not (isinstance(module, ASPP) and module.pooling_cells is None):
            module.__class__ = traced  # the same layer and state; only its forward differs
    return twin


_TRACEABLE: dict[type[nn.Module], type[nn.Module]] = {
    MobileVitBlock: TraceableMobileVitBlock,
    MobileVitV2Block: TraceableMobileVitV2Block,
    ASPP: TraceableASPP,
}


def _patches(side: int, patch: int) -> int:
    return (side + patch - 1) // patch


def _resized(x: torch.Tensor, rows: int, columns: int, patch_size: tuple[int, int], *, align_corners: bool) -> torch.Tensor:
    size = (rows * patch_size[0], columns * patch_size[1])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def _to_patches(x: torch.Tensor, rows: int, columns: int, patch_size: tuple[int, int]) -> torch.Tensor:
    """B x C x H x W -> B x C x cells of a patch x patches."""
    height, width = patch_size
    batch, channels = x.shape[:2]
    x = x.reshape(batch, channels, rows, height, columns, width).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels, height * width, rows * columns)


def _from_patches(x: torch.Tensor, rows: int, columns: int, patch_size: tuple[int, int]) -> torch.Tensor:
    """B x C x cells of a patch x patches -> B x C x H x W."""
    height, width = patch_size
    batch, channels = x.shape[:2]
    x = x.reshape(batch, channels, height, width, rows, columns).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels, rows * height, columns * width)


def _window_mean(x: torch.Tensor, dim: int, cells: int) -> torch.Tensor:
    """Mean over a sliding window of `cells` along `dim`, or over all of it where that is shorter."""
    length = torch._shape_as_tensor(x)[dim]
    window = torch.minimum(length, torch.tensor(cells))
    first = torch.zeros_like(x.narrow(dim, 0, 1))
    sums = torch.cat((first, x.cumsum(dim)), dim)
    places = torch.arange(cast(int, length - window + 1))  # a tensor, so that the trace computes it
    return (sums.index_select(dim, places + window) - sums.index_select(dim, places)) / window
