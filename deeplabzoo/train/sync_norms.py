"""Batch norm over the global batch of several processes, on any device, for any module that normalises with torch's function.

torch's own SyncBatchNorm is for GPUs alone and replaces modules, which loses what a subclass adds (timm's carry their
activation). Here the one function that all of them call is answered differently while a forward pass runs.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Sum(torch.autograd.Function):
    """The sum over processes; every process's loss depends on it, so gradients are summed on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        total: Tensor = gradients[0].clone().contiguous()
        dist.all_reduce(total)
        return total


def _summed(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)
    return total


def synchronised_batch_norm(
    x_BCHW: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalise with mean and variance over the batches of all processes; updates the running statistics as torch does."""
    x = x_BCHW if x_BCHW.dtype is torch.float64 else x_BCHW.float()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    count = x.numel() // x.shape[1]
    sums = _summed(torch.cat([x.sum(axes), x.new_tensor([float(count)])]))
    total = float(sums[-1].detach())
    mean = sums[:-1] / total
    centred = x - mean.view(shape)
    variance = _summed(centred.square().sum(axes)) / total
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.detach(), momentum)
            running_var.lerp_(variance.detach() * (total / max(total - 1, 1)), momentum)
    out = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    return out.to(x_BCHW.dtype)


class SynchronisedNorms(TorchFunctionMode):
    """While this holds, batch norms in training mode use the statistics of all processes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer `batch_norm` in training mode; pass everything else through."""
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        call = _bound(*args, **kwargs)
        return func(*args, **kwargs) if call is None else synchronised_batch_norm(*call)


def _bound(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, float] | None:
    """Return the arguments of a call of torch's batch_norm, under its own names, or None outside training."""
    return (input, running_mean, running_var, weight, bias, momentum, eps) if training else None
