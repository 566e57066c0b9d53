"""What parity tests of origins share: another library's network with random weights and norms, and how two outputs compare."""

import torch
from torch import nn

LARGEST_ERROR = 1e-4
"""Of the logits' standard deviation."""


def random_images(count: int, side_or_hw: int | tuple[int, int], seed: int = 0, channels: int = 3) -> torch.Tensor:
    """Return normalize_images B x C x H x W images with large and small structures, each of its own brightness and contrast."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (side_or_hw, side_or_hw) if isinstance(side_or_hw, int) else side_or_hw
    coarse = torch.randn(count, channels, 5, 7, generator=generator)
    shapes = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    grain = torch.randn(count, channels, height, width, generator=generator)
    light = torch.randn(count, channels, 1, 1, generator=generator)
    return shapes + 0.3 * grain + 0.5 * light


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Return the network in eval mode with random scales, shifts and running statistics in every batch norm.

    The statistics are those of a few random pictures, disturbed: with statistics out of thin air the signal dies on its way
    through a deep network, and then logits are flat and agree whatever is wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.data.uniform_(0.7, 1.3, generator=generator)
        norm.bias.data.uniform_(-0.3, 0.3, generator=generator)
    stem = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        net.train()(random_images(6, 96, seed, stem.in_channels))
    for norm, momentum in zip(norms, momenta, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.momentum = momentum
        spread = norm.running_var.sqrt()
        norm.running_mean += spread * torch.empty_like(spread).uniform_(-0.2, 0.2, generator=generator)
        norm.running_var *= torch.empty_like(spread).uniform_(0.7, 1.4, generator=generator)
    return net.eval()


def require_same_logits(ours_BCHW: torch.Tensor, theirs_BCHW: torch.Tensor) -> None:
    """Fail unless logits agree within LARGEST_ERROR of their spread, and labels on 99.99 % of the pixels."""
    assert ours_BCHW.shape == theirs_BCHW.shape
    spread = float(theirs_BCHW.std())
    assert float(theirs_BCHW.std(dim=(2, 3)).mean()) > 0.1 * spread, "these logits are flat, so they prove nothing"
    assert float((ours_BCHW - theirs_BCHW).abs().max()) / spread <= LARGEST_ERROR
    assert float((ours_BCHW.argmax(1) == theirs_BCHW.argmax(1)).float().mean()) >= 0.9999
