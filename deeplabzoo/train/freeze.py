"""Parts of a network that do not learn: early stages of the encoder, and batch norms."""

import torch
from torch import nn

from deeplabzoo.errors import UsageError
from deeplabzoo.models.deeplab import DeepLab

_SIDE = 64
NORMS = (nn.modules.batchnorm._BatchNorm,)
"""Modules with running statistics; timm's, which carry their activation, are subclasses."""


def freeze(net: DeepLab, *, stages: int = 0, norms: str = "none") -> None:
    """Mark what does not learn with `requires_grad = False`: the first `stages` features of the encoder, and batch norms.

    What belongs to a stage is found by asking which parameters its features depend on, so it holds for any encoder. `norms`
    is none, encoder or all. Raises UsageError for more stages than the encoder has.
    """
    if stages:
        for parameter in _behind(net, stages):
            parameter.requires_grad_(False)
    if norms != "none":
        for module in (net.encoder if norms == "encoder" else net).modules():
            if isinstance(module, NORMS):
                module.requires_grad_(False)


def train_mode(net: DeepLab) -> None:
    """Put the network into training mode, except batch norms whose parameters are frozen: their statistics stay too."""
    net.train()
    for module in net.modules():
        if isinstance(module, NORMS) and module.weight is not None and not module.weight.requires_grad:
            module.eval()


def _behind(net: DeepLab, stages: int) -> list[nn.Parameter]:
    """Return the parameters that the first `stages` features are computed from."""
    available = len(net.feature_plan.channels)
    if stages > available:
        raise UsageError(f"freeze_stages is {stages}, but this encoder yields {available} features; use 0 to {available}.")
    training = net.training
    parameters = list(net.encoder.parameters())
    first = parameters[0]
    net.eval()
    with torch.enable_grad():
        features = net.encoder(torch.zeros(1, net.config.in_chans, _SIDE, _SIDE, device=first.device, dtype=first.dtype))
        reached = torch.autograd.grad(sum(feature.sum() for feature in features[:stages]), parameters, allow_unused=True)
    net.train(training)
    return [parameter for parameter, gradient in zip(parameters, reached, strict=True) if gradient is not None]
