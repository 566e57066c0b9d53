"""Distributed training under `torchrun`: all-reduce, shards of an evaluation, synchronized batch norm on any device.

N processes train on the loss and gradient of one process with the same global batch. Losses are divided by sums over the whole
batch, so gradients have to be *summed*: DDP averages, hence each process multiplies its loss by the world size.
"""

import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from deeplabzoo.device import choose_device
from deeplabzoo.errors import TrainingError, UsageError
from deeplabzoo.log import logger

# Synchronized batch norm on any device, for any module that normalizes with `F.batch_norm`. torch's own SyncBatchNorm is for
# GPUs alone and replaces modules, which loses what a subclass adds (timm's contain their activation). Here a TorchFunctionMode
# replaces the function itself during the forward pass.


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes; every process's loss depends on it, so the backward pass sums gradients."""

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


def _all_reduce_sum(values: Tensor) -> Tensor:
    total: Tensor = _AllReduceSum.apply(values)
    return total


def sync_batch_norm(
    x_BCHW: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalize with mean and variance over the batches of all processes; arguments and running statistics as in torch."""
    x = x_BCHW if x_BCHW.dtype is torch.float64 else x_BCHW.float()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    count = x.numel() // x.shape[1]
    sums = _all_reduce_sum(torch.cat([x.sum(axes), x.new_tensor([float(count)])]))
    total = float(sums[-1].detach())
    mean = sums[:-1] / total
    centred = x - mean.view(shape)
    variance = _all_reduce_sum(centred.square().sum(axes)) / total
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


class SyncBatchNormMode(TorchFunctionMode):
    """Context in which batch norms in training mode use the statistics of all processes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `batch_norm` in training mode; pass every other function through."""
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        call = _bind_arguments(*args, **kwargs)
        return func(*args, **kwargs) if call is None else sync_batch_norm(*call)


def _bind_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, float] | None:
    """Return the arguments of `F.batch_norm` by position, or None outside training."""
    return (input, running_mean, running_var, weight, bias, momentum, eps) if training else None


_TIMEOUT = timedelta(minutes=30)
"""Timeout of collective operations: longer than the largest difference between two shards of an evaluation."""

_CONNECTION_ERRORS = ("connection", "closed by peer", "gloo", "nccl", "timed out", "timeout", "broken pipe", "socket")


@dataclass(frozen=True)
class DistributedContext:
    """Rank and device of one process, and the world size; a run without torchrun has a world size of 1."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes and logs."""
        return self.rank == 0

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes, on the tensor's own device."""
        if self.world_size == 1:
            return values
        shared = values.detach().to(self.device, copy=True)
        dist.all_reduce(shared)
        return shared.to(values.device)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def shard(self, count: int) -> range:
        """Return this rank's indices of `count` items: shards are disjoint and complete, without padding."""
        return range(self.rank, count, self.world_size)

    def sync_buffers(self, net: nn.Module) -> None:
        """Broadcast rank 0's buffers: running statistics differ where batch norms are not synchronized."""
        if self.world_size > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, src=0)

    def wrap_ddp(self, net: nn.Module) -> nn.Module:
        """Return the DistributedDataParallel wrapper for the train step; the bare `net` is evaluated and saved."""
        if self.world_size == 1:
            return net
        devices = [self.device.index] if self.device.type == "cuda" else None
        # torch 2.14 renamed broadcast_buffers and warns about the old name
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_sync: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return DistributedDataParallel(net, device_ids=devices, **no_sync)

    def sync_batchnorm(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which batch norms use the statistics of all processes together."""
        return SyncBatchNormMode() if wanted and self.world_size > 1 else contextlib.nullcontext()


def no_grad_sync(net: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context without gradient synchronization, for all pieces of an accumulated batch but the last."""
    return net.no_sync() if wanted and isinstance(net, DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def init_distributed(device: str) -> Iterator[DistributedContext]:
    """Join the process group that torchrun describes, if there is one.

    Args:
        device: The recipe's device.

    Raises:
        UsageError: The device cannot be used, or there are fewer GPUs than processes.
        TrainingError: Another process of the run stopped or was killed.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if count == 1:
        yield DistributedContext(0, 1, choose_device(device))
        return
    level = logger.level
    if rank:
        logger.setLevel("WARNING")
    chosen = choose_device(device)
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UsageError(f"Process {rank} has no GPU of its own: {torch.cuda.device_count()} here; lower --nproc-per-node.")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
        yield DistributedContext(rank, count, chosen)
        dist.barrier()
    except (RuntimeError, dist.DistError) as error:
        if not any(word in str(error).lower() for word in _CONNECTION_ERRORS):
            raise
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"Process {rank} of {count} lost the others: one of them stopped or was killed ({reason}). "
            "Look at its own message, then start all of them again with --resume."
        ) from error
    finally:
        logger.setLevel(level)
        if dist.is_initialized():
            dist.destroy_process_group()
