"""What parity tests of origins share: another library's network with random weights and norms, and how two outputs compare."""

import torch
from torch import nn

LARGEST_ERROR = 1e-4
"""Of the logits' standard deviation."""


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Return the network in eval mode with every norm's scale, shift and running statistics random, and no dead activations."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.empty_like(like).uniform_(low, high, generator=generator)

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.weight.data = uniform(module.weight, 0.7, 1.3)
            module.bias.data = uniform(module.bias, -0.3, 0.3)
            module.running_mean.copy_(uniform(module.running_mean, -0.3, 0.3))
            module.running_var.copy_(uniform(module.running_var, 0.6, 1.6))
    return net.eval()


def require_same_logits(ours_BCHW: torch.Tensor, theirs_BCHW: torch.Tensor) -> None:
    """Fail unless logits agree within LARGEST_ERROR of their spread, and labels on 99.99 % of the pixels."""
    assert ours_BCHW.shape == theirs_BCHW.shape
    spread = float(theirs_BCHW.std())
    assert spread > 0
    assert float((ours_BCHW - theirs_BCHW).abs().max()) / spread <= LARGEST_ERROR
    assert float((ours_BCHW.argmax(1) == theirs_BCHW.argmax(1)).float().mean()) >= 0.9999
