"""Everything that changes while a run goes on, and the one way in which it changes: an update."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.data.normalise import normalised
from deeplabzoo.errors import UsageError
from deeplabzoo.inference.allocator import keep_freed_memory
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.train.average import Average
from deeplabzoo.train.distributed import Processes, without_sync
from deeplabzoo.train.freeze import freeze, train_mode
from deeplabzoo.train.network import measure_norms
from deeplabzoo.train.objective import TrainingLoss
from deeplabzoo.train.optim import flat_state, load_flat_state, make_optimizer, parameter_groups, set_rate
from deeplabzoo.train.precision import autocast_dtype, gradient_scaler
from deeplabzoo.train.recipe import Recipe
from deeplabzoo.train.signals import StopRequest
from deeplabzoo.train.splits import Splits, class_weights_of
from deeplabzoo.train.state import State
from deeplabzoo.train.stream import Batch, Stream, batches, step_seed


@dataclass(frozen=True)
class Update:
    """What one step did; equal in all processes."""

    step: int
    loss: float
    lr: float
    gradient_norm: float
    stopping: bool
    """Whether any process of the run was asked to stop before this step ended."""
    skipped: tuple[str, ...] = ()
    """Names of training pictures that could not be read for it, in all processes."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Trainer:
    """Network, optimizer, average and counters of one process of a run."""

    def __init__(self, recipe: Recipe, data: Splits, net: DeepLab, processes: Processes, state: State | None) -> None:
        assert recipe.steps is not None
        self.recipe, self.data, self.processes, self.steps = recipe, data, processes, recipe.steps
        device = processes.device
        torch.use_deterministic_algorithms(recipe.deterministic)
        keep_freed_memory()
        self.net = net.to(device)
        if recipe.channels_last:
            into_channels_last(self.net)
        if recipe.recalibrate_norms and state is None:
            measure_norms(self.net, recipe, data.train)
        freeze(self.net, stages=recipe.freeze_stages, norms=recipe.freeze_norms)
        groups = parameter_groups(
            self.net,
            weight_decay=recipe.weight_decay,
            encoder_lr_factor=recipe.encoder_lr_factor,
            head_lr_factor=recipe.head_lr_factor,
        )
        self.optimizer = make_optimizer(recipe.optimizer, groups, momentum=recipe.momentum)
        self.rate = recipe.rate
        self.dtype = autocast_dtype(recipe.amp, device)
        self.scaler = gradient_scaler(self.dtype, device)
        self.average = Average(self.net, recipe.ema) if recipe.ema else None
        self.step, self.best, self.seconds = 0, {"step": 0, "miou": -1.0}, 0.0
        self.measured = True
        """Whether the evaluation that is due at the present step, if any, has been made."""
        self.class_weights = state.facts["class_weights"] if state else class_weights_of(recipe, data, processes)
        if state is not None:
            self._restore(state)
        self.loss = TrainingLoss(recipe, data.train.ignore_index, self.class_weights, self.net, device, self.dtype)
        self.parallel = _compiled(processes.parallel(self.net), recipe, processes)

    @property
    def evaluated(self) -> DeepLab:
        """The network that is measured and published: the average where there is one."""
        return self.average.net if self.average else self.net

    def batches(self) -> Iterator[Batch]:
        """Yield this process's batches from the present step to the end."""
        ranks = self.processes
        stream = Stream(self.data.train, self.recipe, self.net.preprocessing, rank=ranks.rank, processes=ranks.count)
        return batches(stream, self.step, self.steps, workers=self.recipe.workers, pin=ranks.device.type == "cuda")

    def update(self, batch: Batch, *, stop: StopRequest | None = None) -> Update:
        """Learn from one batch: gradients of all pieces and processes added up, one step of the optimizer.

        A loss or gradient that is no number changes nothing: the update says so, and the weights are those before it. With
        fp16 the scaler skips such gradients, which is its way of finding the scale.
        """
        started, recipe, ranks, device = time.perf_counter(), self.recipe, self.processes, self.processes.device
        lr = self.rate(self.step)
        set_rate(self.optimizer, lr)
        torch.manual_seed(step_seed(recipe.seed, self.step, ranks.rank))
        train_mode(self.net)
        images = batch.image_BCHW.to(device, non_blocking=True).chunk(recipe.accumulate)
        all_labels_BHW = batch.labels_BHW.to(device, non_blocking=True).long()
        labels = all_labels_BHW.chunk(recipe.accumulate)
        divisors = ranks.total(self.loss.divisors(all_labels_BHW))
        total = torch.zeros((), device=device)
        for piece, (image_BCHW, labels_BHW) in enumerate(zip(images, labels, strict=True)):
            x_BCHW = normalised(image_BCHW, self.net.preprocessing)
            if not recipe.channels_last:
                x_BCHW = x_BCHW.contiguous()
            with without_sync(self.parallel, piece < recipe.accumulate - 1):
                with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None), ranks.norms(recipe.sync_norms):
                    output = self.parallel(x_BCHW)
                share = self.loss.share(output, x_BCHW, labels_BHW, divisors)
                self.scaler.scale(share * ranks.count).backward()  # type: ignore[no-untyped-call]
            total += share.detach()
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm or math.inf))
        stopping = stop is not None and stop.signal is not None  # asked at the end: a signal costs this step and no other
        shared = ranks.total(torch.tensor([float(total), float(stopping), len(batch.skipped)], dtype=torch.float64))
        if self.scaler.is_enabled() and math.isfinite(float(shared[0])) and not math.isfinite(norm):
            norm = 0.0  # the scaler skips this step and lowers its scale
        skipped = self._names(batch.skipped) if shared[2] else ()
        update = Update(self.step, float(shared[0]), lr, norm, bool(shared[1]), skipped)
        if update.finite:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.average:
                self.average.follow(self.net, self.step)
            self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - started
        return update

    def _names(self, skipped: torch.Tensor) -> tuple[str, ...]:
        """Return the names of the pictures with these indices, here and in all other processes."""
        times = self.processes.total(torch.bincount(skipped, minlength=len(self.data.train)))
        return tuple(name for name, count in zip(self.data.train.names, times.tolist(), strict=True) for _ in range(count))

    def broken(self) -> str | None:
        """Return the name of a tensor that holds values that are no finite numbers, or None."""
        state = {**self.net.state_dict(), **flat_state(self.optimizer)}
        return next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)

    def take_score(self, miou: float) -> bool:
        """Note a score of the present step; returns whether it is the best so far."""
        score = miou if math.isfinite(miou) else 0.0
        if score <= self.best["miou"]:
            return False
        self.best = {"step": self.step, "miou": score}
        return True

    def save_weights(self, path: Path) -> None:
        """Write the network that is evaluated, with the recipe's name and digest in its source."""
        source = {
            "recipe": self.recipe.name,
            "recipe_sha256": self.recipe.digest(),
            "step": self.step,
            "seed": self.recipe.seed,
        }
        self.evaluated.save(path, extra=source)

    def state(self) -> State:
        """Return all that a resumed run needs."""
        tensors = {"net": self.net.state_dict(), "optimizer": flat_state(self.optimizer)}
        if self.average:
            tensors["average"] = self.average.net.state_dict()
        facts = {
            "recipe_sha256": self.recipe.digest(),
            "data_sha256": self.data.sha256,
            "network": {"config": self.net.config.to_dict(), "preprocessing": self.net.preprocessing.to_dict()},
            "best": self.best,
            "measured": self.measured,
            "seconds": self.seconds,
            "scaler": self.scaler.state_dict(),
            "class_weights": self.class_weights,
        }
        return State(self.step, tensors, facts)

    def _restore(self, state: State) -> None:
        load_flat_state(self.optimizer, dict(state.tensors["optimizer"]))
        if self.average:
            self.average.net.load_state_dict(state.tensors.get("average", state.tensors["net"]))
        if self.scaler.is_enabled() and state.facts["scaler"]:
            self.scaler.load_state_dict(state.facts["scaler"])
        self.step, self.best, self.seconds = state.step, dict(state.facts["best"]), float(state.facts["seconds"])
        self.measured = bool(state.facts["measured"])

    def facts(self) -> dict[str, Any]:
        """Return how this run is made, for log and report."""
        return {
            "best": self.best,
            "seconds": round(self.seconds, 1),
            "processes": self.processes.count,
            "amp": str(self.dtype or torch.float32).removeprefix("torch."),
            "recipe_sha256": self.recipe.digest(),
            "data_sha256": self.data.sha256,
            "class_weights": self.class_weights,
        }


def _compiled(module: torch.nn.Module, recipe: Recipe, processes: Processes) -> torch.nn.Module:
    if not recipe.compile:
        return module
    if recipe.sync_norms and processes.count > 1:
        raise UsageError(
            "compile=true and sync_norms=true do not go together with several processes; set one of them to false."
        )
    compiled: torch.nn.Module = torch.compile(module)  # type: ignore[assignment]
    return compiled


def into_channels_last(net: torch.nn.Module) -> None:
    """Give the kernels of a network the memory layout B x H x W x C; those of five dimensions, which have none, stay.

    torch's own `net.to(memory_format=…)` raises where a network has such a kernel, as timm's lambda layers do.
    """
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
