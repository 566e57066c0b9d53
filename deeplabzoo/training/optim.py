"""Optimizers, parameter groups, learning rate schedules, and freezing of layers."""

from typing import Any, Literal

import torch
from torch import nn

from deeplabzoo.errors import UsageError
from deeplabzoo.models.deeplab import DeepLab

OptimizerKind = Literal["sgd", "adam", "adamw"]
OPTIMIZERS: tuple[OptimizerKind, ...] = ("sgd", "adam", "adamw")


def parameter_groups(
    net: nn.Module, *, weight_decay: float, encoder_lr_factor: float = 1.0, head_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Return optimizer groups: encoder and head with their lr factors, each split into decayed weights and the rest.

    Parameters of one dimension (scales and shifts of batch norms, biases) never decay. Whatever is not under `encoder.` counts
    as head. Frozen parameters are in no group. Every group has its parameters' `names`, so that a saved state can be matched by
    name.

    Args:
        net: The model.
        weight_decay: Of weights with more than one dimension.
        encoder_lr_factor: Multiplies the learning rate of the encoder.
        head_lr_factor: Multiplies the learning rate of everything else.

    Raises:
        UsageError: Every parameter is frozen.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        in_encoder, decayed = name.startswith("encoder."), parameter.ndim > 1
        group = groups.setdefault(
            (in_encoder, decayed),
            {
                "params": [],
                "names": [],
                "lr_factor": encoder_lr_factor if in_encoder else head_lr_factor,
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise UsageError("Every parameter is frozen, so there is nothing to train; lower freeze_stages.")
    return list(groups.values())


def make_optimizer(
    kind: str, groups: list[dict[str, Any]], *, momentum: float = 0.9, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """Return an optimizer; `set_learning_rate` sets its learning rate before every step.

    Args:
        kind: `sgd` (with Polyak momentum), `adam` (decay through the gradient) or `adamw` (decoupled decay).
        groups: From `parameter_groups`.
        momentum: Of SGD.
        betas: Of Adam and AdamW.

    Raises:
        UsageError: There is no such optimizer.
    """
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    if kind == "adam":
        return torch.optim.Adam(groups, lr=0.0, betas=betas)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas)
    raise UsageError(f"Unknown optimizer {kind!r}; expected one of {', '.join(OPTIMIZERS)}.")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times its lr factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors as `<parameter name>/<quantity>`, e.g. `head.classifier.weight/exp_avg`."""
    return {
        f"{name}/{quantity}": torch.as_tensor(value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for quantity, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def load_flat_state(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load what `flat_state` returned; a parameter without an entry starts with an empty state.

    `step` counters stay on the CPU, as torch keeps them; everything else goes to its parameter's device.
    """
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = {
                key.rpartition("/")[2]: value if key.endswith("/step") else value.to(parameter.device)
                for key, value in tensors.items()
                if key.rpartition("/")[0] == name
            }
            if state:
                optimizer.state[parameter] = state


# Frozen layers: early stages of the encoder, and batch norms.

_PROBE_SIZE = 64
BATCH_NORM_TYPES = (nn.modules.batchnorm._BatchNorm,)
"""Modules with running statistics: torch's private base class, also of timm's batch norms, which contain their activation."""


def freeze(net: DeepLab, *, stages: int = 0, batch_norms: str = "none") -> None:
    """Set `requires_grad = False` for the first stages of the encoder and for batch norms.

    Which parameters belong to a stage is found by autograd from its features, so it holds for any encoder.

    Args:
        net: The model, changed in place.
        stages: Number of encoder features, from the stem on, whose parameters are frozen.
        batch_norms: `none`, `encoder` or `all`.

    Raises:
        UsageError: The encoder has fewer stages.
    """
    if stages:
        for parameter in _upstream_parameters(net, stages):
            parameter.requires_grad_(False)
    if batch_norms != "none":
        for module in (net.encoder if batch_norms == "encoder" else net).modules():
            if isinstance(module, BATCH_NORM_TYPES):
                module.requires_grad_(False)


def train_mode(net: DeepLab) -> None:
    """Put the model into training mode, except batch norms whose parameters are frozen: their statistics stay, too."""
    net.train()
    for module in net.modules():
        if isinstance(module, BATCH_NORM_TYPES) and module.weight is not None and not module.weight.requires_grad:
            module.eval()


def _upstream_parameters(net: DeepLab, stages: int) -> list[nn.Parameter]:
    """Return the parameters that the first `stages` features are computed from."""
    available = len(net.feature_plan.channels)
    if stages > available:
        raise UsageError(f"freeze_stages is {stages}, but this encoder yields {available} features; use 0 to {available}.")
    training = net.training
    parameters = list(net.encoder.parameters())
    first = parameters[0]
    net.eval()
    with torch.enable_grad():
        features = net.encoder(
            torch.zeros(1, net.config.in_chans, _PROBE_SIZE, _PROBE_SIZE, device=first.device, dtype=first.dtype)
        )
        reached = torch.autograd.grad(sum(feature.sum() for feature in features[:stages]), parameters, allow_unused=True)
    net.train(training)
    return [parameter for parameter, gradient in zip(parameters, reached, strict=True) if gradient is not None]
