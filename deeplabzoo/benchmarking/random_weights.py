"""Weights and pictures made from a seed, for a speed that can be measured where no checkpoint is at hand.

Speed hardly depends on the values, as long as no signal dies on its way: then logits are flat, labels are decided by rounding,
and processors crawl through denormals. So the norms' statistics are estimated anew from made pictures, as training would.
"""

import torch
from torch import nn

_ESTIMATE_FROM = 6
_ESTIMATE_SIDE = 96


def made_pictures(count: int, size: tuple[int, int], seed: int, channels: int = 3) -> torch.Tensor:
    """Return normalised `count` x `channels` x H x W images with large and small structures, each of its own brightness."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 5, 7, generator=generator)
    shapes = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    grain = torch.randn(count, channels, *size, generator=generator)
    light = torch.randn(count, channels, 1, 1, generator=generator)
    return shapes + 0.3 * grain + 0.5 * light


def estimate_norms(net: nn.Module, seed: int, channels: int = 3) -> nn.Module:
    """Give every batch norm the statistics of a few made pictures and return the network in eval mode.

    Each layer then hands on a signal of variance near one, whatever its convolutions were initialised with.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        net.train()(made_pictures(_ESTIMATE_FROM, (_ESTIMATE_SIDE, _ESTIMATE_SIDE), seed, channels))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()
