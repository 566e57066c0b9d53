"""Several processes, one run (`torchrun`): sums over all of them, exact shares of an evaluation, batch norms that see it all.

The promise is that N processes train on the loss and gradient of one process with the same global batch. Losses divide by
sums over the whole batch, so gradients are *added*: DDP averages, hence each process scales its loss by their number.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deeplabzoo.errors import TrainingError, UsageError
from deeplabzoo.inference.device import choose_device
from deeplabzoo.say import logger
from deeplabzoo.train.sync_norms import SynchronisedNorms

_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others: longer than the largest difference between two shards of an evaluation."""

_LOST = ("connection", "closed by peer", "gloo", "nccl", "timed out", "timeout", "broken pipe", "socket")


@dataclass(frozen=True)
class Processes:
    """One process and its place among those of the run; a run without torchrun is one of one."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, logs and talks."""
        return self.rank == 0

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes, on the tensor's own device."""
        if self.count == 1:
            return values
        shared = values.detach().to(self.device, copy=True)
        dist.all_reduce(shared)
        return shared.to(values.device)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier()

    def share(self, count: int) -> range:
        """Return this process's part of `count` items: disjoint, complete, none twice (asks.md theme E: padded shards)."""
        return range(self.rank, count, self.count)

    def align_buffers(self, net: nn.Module) -> None:
        """Give every process the first one's buffers: running statistics differ where norms are not synchronised."""
        if self.count > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, src=0)

    def parallel(self, net: nn.Module) -> nn.Module:
        """Return the module whose backward pass adds up gradients; the bare `net` is still what is evaluated and saved."""
        if self.count == 1:
            return net
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids=devices, broadcast_buffers=False)

    def norms(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which batch norms use the statistics of all processes together."""
        return SynchronisedNorms() if wanted and self.count > 1 else contextlib.nullcontext()


def without_sync(net: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which gradients only pile up locally (all pieces of an accumulated batch but the last)."""
    return net.no_sync() if wanted and isinstance(net, DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did; turn a lost connection into a sentence.

    Raises UsageError for an unusable device, TrainingError where another process of the run is gone.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if count == 1:
        yield Processes(0, 1, choose_device(device))
        return
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
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
        yield Processes(rank, count, chosen)
        dist.barrier()
    except (RuntimeError, dist.DistError) as error:
        if not any(word in str(error).lower() for word in _LOST):
            raise
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"Process {rank} of {count} lost the others: one of them stopped or was killed ({reason}). "
            "Look at its own message, then start all of them again with --resume."
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
