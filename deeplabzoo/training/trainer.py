"""The trainer: model, optimizer, EMA and counters of a run, and the train step that changes them."""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deeplabzoo.checkpoints.native import save_checkpoint
from deeplabzoo.data.transforms import normalize_images
from deeplabzoo.errors import UsageError
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.cpu_runtime import keep_freed_memory
from deeplabzoo.training.dataloader import Batch, BatchDataset, Splits, class_weights_from_data, iterate_batches, step_seed
from deeplabzoo.training.distributed import DistributedContext, no_grad_sync
from deeplabzoo.training.initialization import estimate_batch_norm_stats, model_from_state
from deeplabzoo.training.losses import TrainingLoss
from deeplabzoo.training.optim import (
    flat_state,
    freeze,
    load_flat_state,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
    train_mode,
)
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.run_dir import TrainingState
from deeplabzoo.training.signals import StopRequest


class ModelEma:
    """Exponential moving average of the weights, batch norm statistics included: ema = d x ema + (1 - d) x weights.

    d rises as (1 + step) / (10 + step) up to `decay`, so that the first weights are forgotten; a function of the step alone.

    Args:
        net: The model, which is copied.
        decay: Upper limit of d, in [0, 1).
    """

    def __init__(self, net: DeepLab, decay: float) -> None:
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, net: DeepLab, step: int) -> None:
        """Update the average with the weights after `step`, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for mine, its in zip(self.net.state_dict().values(), net.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(its.to(mine), weight)
            else:
                mine.copy_(its)


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type of the forward pass on this device, or None for plain float32.

    Args:
        amp: `off`, `bf16`, `fp16`, or `auto`: bf16 on GPUs that compute it natively, fp16 on older ones, off on CPUs and Apple
            GPUs. bf16 on a CPU is several times slower than float32 without special instructions, and logged.
        device: Where the run computes.

    Raises:
        UsageError: fp16 on a CPU.
    """
    if amp == "off" or (amp == "auto" and device.type != "cuda"):
        return None
    if amp == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and amp == "fp16":
        raise UsageError("fp16 trains on GPUs only; on this CPU use amp=off.")
    if device.type == "cpu":
        logger.warning("amp: bf16 on a CPU; without AMX or AVX512-BF16 it is slower than amp=off")
    return torch.bfloat16 if amp == "bf16" else torch.float16


def gradient_scaler(dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler that keeps small fp16 gradients from underflow; disabled for other types."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


if TYPE_CHECKING:
    _Conv2d = nn.Conv2d
else:
    _Conv2d = object


class _Float32Conv(_Conv2d):
    """Mixin of a convolution that computes in float32 under autocast as well."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve in float32."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def _float32_class(conv_type: type[nn.Conv2d]) -> type[nn.Conv2d]:
    return type(conv_type.__name__, (_Float32Conv, conv_type), {})


def exclude_dilated_depthwise_from_bf16(net: nn.Module, dtype: torch.dtype | None, device: torch.device) -> int:
    """Make dilated depthwise convolutions compute in float32 where a CPU trains in bf16.

    In channels_last, on feature maps wider than 28, part of oneDNN's bf16 gradient of such a weight is uninitialized memory
    (oneDNN 3.12). Its forward pass, the gradient of the input, the contiguous layout, and kernels that are dense or not dilated
    are correct. The loss curve does not show the error, since the other layers train around it; some gradients reach 1e30.

    Args:
        net: The model, changed in place.
        dtype: Autocast type of the forward pass, or None.
        device: Where the run computes.

    Returns:
        The number of layers that were changed; 0 in other types and on other devices.
    """
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return 0
    found = [
        conv
        for conv in net.modules()
        if isinstance(conv, nn.Conv2d) and not isinstance(conv, _Float32Conv) and conv.groups > 1 and max(conv.dilation) > 1
    ]
    for conv in found:
        conv.__class__ = _float32_class(type(conv))  # the same layer and parameters, so that optimizer and hooks keep working
    return len(found)


@dataclass(frozen=True)
class StepResult:
    """The outcome of one train step; equal in all processes."""

    step: int
    loss: float
    lr: float
    gradient_norm: float
    stopping: bool
    """Whether any process of the run received a stop signal before this step ended."""
    skipped: tuple[str, ...] = ()
    """Names of training images that could not be read for it, in all processes."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Trainer:
    """Model, optimizer, EMA and counters of one process of a run.

    Args:
        recipe: The recipe, with its length in steps.
        data: The opened splits.
        net: The model; it is moved to the process's device.
        distributed: This process among those of the run.
        state: What to continue from; None starts at step 0.

    Raises:
        UsageError: Settings of the recipe do not fit each other, the device or the data.
        DataError: A mask has labels outside the classes.
    """

    def __init__(
        self, recipe: Recipe, data: Splits, net: DeepLab, distributed: DistributedContext, state: TrainingState | None
    ) -> None:
        assert recipe.steps is not None
        self.recipe, self.data, self.distributed, self.steps = recipe, data, distributed, recipe.steps
        device = distributed.device
        keep_freed_memory()
        self.net = net.to(device)
        if recipe.channels_last:
            to_channels_last(self.net)
        if state is None:
            estimate_batch_norm_stats(self.net, recipe, data.train)
        freeze(self.net, stages=recipe.freeze_stages, batch_norms=recipe.freeze_norms)
        groups = parameter_groups(
            self.net,
            weight_decay=recipe.weight_decay,
            encoder_lr_factor=recipe.encoder_lr_factor,
            head_lr_factor=recipe.head_lr_factor,
        )
        self.optimizer = make_optimizer(recipe.optimizer, groups, momentum=recipe.momentum)
        self.lr_schedule = recipe.lr_schedule
        self.dtype = autocast_dtype(recipe.amp, device)
        exclude_dilated_depthwise_from_bf16(self.net, self.dtype, device)
        self.scaler = gradient_scaler(self.dtype, device)
        self.ema = ModelEma(self.net, recipe.ema) if recipe.ema else None
        self.step, self.best, self.seconds = 0, {"step": 0, "miou": -1.0}, 0.0
        self.evaluation_done = True
        """Whether the evaluation that is due at the present step, if any, has been made."""
        self.class_weights = state.facts["class_weights"] if state else class_weights_from_data(recipe, data, distributed)
        if state is not None:
            self._restore(state)
        self.loss = TrainingLoss(recipe, data.train.ignore_index, self.class_weights, self.net, device, self.dtype)
        self.parallel = _compiled(distributed.wrap_ddp(self.net), recipe, distributed)

    @property
    def eval_model(self) -> DeepLab:
        """The model that is evaluated and saved: the EMA where there is one."""
        return self.ema.net if self.ema else self.net

    def batches(self) -> Iterator[Batch]:
        """Yield this process's batches from the current step to the end."""
        ranks = self.distributed
        dataset = BatchDataset(
            self.data.train, self.recipe, self.net.preprocessing, rank=ranks.rank, world_size=ranks.world_size
        )
        return iterate_batches(dataset, self.step, self.steps, workers=self.recipe.workers, pin=ranks.device.type == "cuda")

    def train_step(self, batch: Batch, *, stop: StopRequest | None = None) -> StepResult:
        """Take one optimizer step on the gradients of one global batch, summed over accumulated pieces and processes.

        A non-finite loss or gradient changes nothing: the result is not `finite`, and the weights are those before it. With
        fp16 the scaler skips such gradients while it searches for its scale.

        Args:
            batch: This process's slice of the batch.
            stop: Stop signals received so far, shared with all processes at the end of the step.
        """
        started, recipe, ranks, device = time.perf_counter(), self.recipe, self.distributed, self.distributed.device
        lr = self.lr_schedule(self.step)
        set_learning_rate(self.optimizer, lr)
        torch.manual_seed(step_seed(recipe.seed, self.step, ranks.rank))
        train_mode(self.net)
        images = batch.image_BCHW.to(device, non_blocking=True).chunk(recipe.accumulate)
        all_labels_BHW = batch.labels_BHW.to(device, non_blocking=True).long()
        labels = all_labels_BHW.chunk(recipe.accumulate)
        divisors = ranks.all_reduce_sum(self.loss.divisors(all_labels_BHW))
        total = torch.zeros((), device=device)
        for piece, (image_BCHW, labels_BHW) in enumerate(zip(images, labels, strict=True)):
            x_BCHW = normalize_images(image_BCHW, self.net.preprocessing)
            if not recipe.channels_last:
                x_BCHW = x_BCHW.contiguous()
            with no_grad_sync(self.parallel, piece < recipe.accumulate - 1):
                with (
                    torch.autocast(device.type, self.dtype, enabled=self.dtype is not None),
                    ranks.sync_batchnorm(recipe.sync_norms),
                ):
                    output = self.parallel(x_BCHW)
                partial = self.loss.partial_loss(output, x_BCHW, labels_BHW, divisors)
                self.scaler.scale(partial * ranks.world_size).backward()  # type: ignore[no-untyped-call]
            total += partial.detach()
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm or math.inf))
        stopping = stop is not None and stop.signal is not None  # read at the end, so that a signal waits for this step only
        shared = ranks.all_reduce_sum(torch.tensor([float(total), float(stopping), len(batch.skipped)], dtype=torch.float64))
        if self.scaler.is_enabled() and math.isfinite(float(shared[0])) and not math.isfinite(norm):
            norm = 0.0  # the scaler skips this step and lowers its scale
        skipped = self._skipped_names(batch.skipped) if shared[2] else ()
        step_result = StepResult(self.step, float(shared[0]), lr, norm, bool(shared[1]), skipped)
        if step_result.finite:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema:
                self.ema.update(self.net, self.step)
            self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - started
        return step_result

    def _skipped_names(self, skipped: torch.Tensor) -> tuple[str, ...]:
        """Return the names of the images with these indices, here and in all other processes."""
        times = self.distributed.all_reduce_sum(torch.bincount(skipped, minlength=len(self.data.train)))
        return tuple(name for name, count in zip(self.data.train.names, times.tolist(), strict=True) for _ in range(count))

    def first_nonfinite_tensor(self) -> str | None:
        """Return the name of a tensor of model or optimizer with non-finite values, or None."""
        state = {**self.net.state_dict(), **flat_state(self.optimizer)}
        return next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)

    def update_best(self, miou: float) -> bool:
        """Record a score of the current step, 0...1; returns whether it is the best so far."""
        score = miou if math.isfinite(miou) else 0.0
        if score <= self.best["miou"]:
            return False
        self.best = {"step": self.step, "miou": score}
        return True

    def save_weights(self, path: Path) -> None:
        """Write the model that is evaluated, with the recipe's name and digest in its source, flushed to the disk."""
        save_checkpoint(self.eval_model, path, extra=self._source(self.step, self.recipe.digest()), durable=True)

    def restore_weights(self, path: Path, state: TrainingState) -> None:
        """Write the weights file of a state again, equal to the bit to the one that was written with it."""
        net = model_from_state(state, self.data.train, state.eval_tensors)
        source = self._source(state.step, str(state.facts["recipe_sha256"]))
        save_checkpoint(net, path, extra=source, durable=True)

    def _source(self, step: int, recipe_sha256: str) -> dict[str, Any]:
        return {"recipe": self.recipe.name, "recipe_sha256": recipe_sha256, "step": step, "seed": self.recipe.seed}

    def state(self) -> TrainingState:
        """Return everything that a resumed run needs."""
        tensors: dict[str, Any] = {"net": self.net.state_dict(), "optimizer": flat_state(self.optimizer)}
        if self.ema:
            tensors["average"] = self.ema.net.state_dict()
        facts = {
            "recipe_sha256": self.recipe.digest(),
            "recipe": self.recipe.to_dict(),
            **self.data.facts,
            "network": {"config": self.net.config.to_dict(), "preprocessing": self.net.preprocessing.to_dict()},
            "best": self.best,
            "measured": self.evaluation_done,
            "seconds": self.seconds,
            "scaler": self.scaler.state_dict(),
            "class_weights": self.class_weights,
        }
        return TrainingState(self.step, tensors, facts)

    def _restore(self, state: TrainingState) -> None:
        load_flat_state(self.optimizer, dict(state.tensors["optimizer"]))
        if self.ema:
            self.ema.net.load_state_dict(dict(state.eval_tensors))
        if self.scaler.is_enabled() and state.facts["scaler"]:
            self.scaler.load_state_dict(state.facts["scaler"])
        self.step, self.best, self.seconds = state.step, dict(state.facts["best"]), float(state.facts["seconds"])
        self.evaluation_done = bool(state.facts["measured"])

    def facts(self) -> dict[str, Any]:
        """Return how this run is computed, for log and report."""
        return {
            "best": self.best,
            "seconds": round(self.seconds, 1),
            "processes": self.distributed.world_size,
            "amp": str(self.dtype or torch.float32).removeprefix("torch."),
            "recipe_sha256": self.recipe.digest(),
            "data_sha256": self.data.sha256,
            "class_weights": self.class_weights,
        }


def _compiled(module: torch.nn.Module, recipe: Recipe, distributed: DistributedContext) -> torch.nn.Module:
    if not recipe.compile:
        return module
    if recipe.sync_norms and distributed.world_size > 1:
        raise UsageError(
            "compile=true and sync_norms=true do not go together with several processes; set one of them to false."
        )
    compiled: torch.nn.Module = torch.compile(module)  # type: ignore[assignment]
    return compiled


def to_channels_last(net: torch.nn.Module) -> None:
    """Convert four-dimensional weights to the channels_last memory layout.

    torch's own `net.to(memory_format=…)` raises where a model also has five-dimensional weights, as timm's lambda layers do.
    """
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.ndim == 4:  # `.data`: the Parameter objects stay the same, and optimizers keep working
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
