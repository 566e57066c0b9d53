"""Which parameter learns how fast and decays how much, and the optimizer that does it."""

from typing import Any, Literal

import torch
from torch import nn

from deeplabzoo.errors import UsageError

OptimizerKind = Literal["sgd", "adam", "adamw"]
OPTIMIZERS: tuple[OptimizerKind, ...] = ("sgd", "adam", "adamw")


def parameter_groups(
    net: nn.Module, *, weight_decay: float, encoder_lr_factor: float = 1.0, head_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Return optimizer groups: encoder and head with their lr factors, each split into decayed weights and the rest.

    Parameters of one dimension (norms' scales and shifts, biases) never decay: pulling them to zero regularises nothing.
    Whatever is not under `encoder.` counts as head. Frozen parameters are in no group. Every group holds the parameters'
    `names`, in the network's order, so that a saved state can be matched by name.
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
    """Return SGD (with Polyak momentum), Adam (decay through the gradient) or AdamW (decoupled decay).

    The rate is set before every step by `set_rate`. Raises UsageError for another kind.
    """
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    if kind == "adam":
        return torch.optim.Adam(groups, lr=0.0, betas=betas)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas)
    raise UsageError(f"Unknown optimizer {kind!r}; expected one of {', '.join(OPTIMIZERS)}.")


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the rate."""
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
    """Put back what `flat_state` returned; a parameter without an entry starts afresh.

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
