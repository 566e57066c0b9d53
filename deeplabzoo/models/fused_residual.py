"""Residual blocks whose shortcut is added, and activated, while their last convolution's output is written."""

from typing import NamedTuple, TypeGuard

import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from deeplabzoo.models.fused_conv import Activation, FusedConv, activation_of


class _Parts(NamedTuple):
    """A block's modules by name, in the order in which it runs them."""

    before: tuple[str, ...]
    last: str
    norm: str
    activation: str | None


_BLOCKS: dict[type[nn.Module], _Parts] = {
    Bottleneck: _Parts(("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa"), "conv3", "bn3", "act3"),
    BasicBlock: _Parts(("conv1", "bn1", "drop_block", "act1", "aa"), "conv2", "bn2", "act2"),
    InvertedResidual: _Parts(("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se"), "conv_pwl", "bn3", None),
    DepthwiseSeparableConv: _Parts(("conv_dw", "bn1", "aa", "se"), "conv_pw", "bn2", None),
}
"""Blocks whose arithmetic is known here, by exact type."""


class FusedResidual(nn.Module):
    """`activation(last(before(x)) + shortcut(x))` with the addition and the activation inside the last convolution."""

    def __init__(self, before: nn.Module, last: FusedConv, shortcut: nn.Module | None, activation: Activation | None) -> None:
        super().__init__()
        self.before, self.last, self.shortcut, self.activation = before, last, shortcut, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x out x H' x W'."""
        plus = x if self.shortcut is None else self.shortcut(x)
        out: torch.Tensor = self.last(
            self.before(x), plus=plus, plus_is_spent=self.shortcut is not None, activation=self.activation
        )
        return out


def fuse_residuals(network: nn.Module) -> None:
    """Replace the residual blocks of a folded encoder by FusedResiduals, in place; those that differ anywhere stay."""
    for name, block in list(network.named_modules()):
        fused = _fused(block)
        if fused is not None:
            network.set_submodule(name, fused)


def _fused(block: nn.Module) -> FusedResidual | None:
    parts = _BLOCKS.get(type(block))
    if parts is None or not getattr(block, "has_skip", True) or getattr(block, "conv_s2d", None) is not None:
        return None
    last, activation = getattr(block, parts.last), None
    if not isinstance(last, FusedConv) or last.activation is not None or _does_something(getattr(block, parts.norm)):
        return None
    if _does_something(block.drop_path) or ("se" not in parts.before and _does_something(block.se)):
        return None
    if parts.activation is not None:
        activation = activation_of(getattr(block, parts.activation))
        if activation is None:
            return None
    before = nn.Sequential(*(one for one in (getattr(block, part) for part in parts.before) if _does_something(one)))
    shortcut = getattr(block, "downsample", None)
    return FusedResidual(before, last, shortcut if _does_something(shortcut) else None, activation)


def _does_something(module: object) -> TypeGuard[nn.Module]:
    return isinstance(module, nn.Module) and not isinstance(module, nn.Identity)
