"""The training loop: from a recipe and data to a folder with weights, log, curves and report."""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.data.dataset import SegmentationDataset
from deeplabzoo.errors import DeepLabZooError, ImageError, TrainingError
from deeplabzoo.evaluation.evaluate import evaluate
from deeplabzoo.git import current_commit
from deeplabzoo.hub.factory import load
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.dataloader import Batch, Splits, open_splits
from deeplabzoo.training.distributed import DistributedContext, init_distributed
from deeplabzoo.training.initialization import build_model, model_from_state
from deeplabzoo.training.logger import RunLog, draw_curves, read_log
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.run_dir import RunDir, TrainingState
from deeplabzoo.training.signals import ImmediateStop, StopRequest
from deeplabzoo.training.trainer import StepResult, Trainer
from deeplabzoo.training.validate import validate

_MAX_LISTED = 5


def write_report(net: DeepLab, recipe: Recipe, data: Splits, folder: RunDir, facts: dict[str, Any]) -> dict[str, Any]:
    """Evaluate best.safetensors on all of val, and once on test; write report.json and curves.png.

    Args:
        net: Any model of the run, on the device to evaluate on.
        recipe: The recipe.
        data: The splits.
        folder: The run's folder.
        facts: How the run was computed (`Trainer.facts`).

    Returns:
        What report.json holds.
    """
    device = next(net.parameters()).device
    best = load(folder.best).to(device)
    val = _evaluate_split(best, recipe, data.val, device)
    report = {
        "recipe": recipe.name,
        "model": recipe.model,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "miou": val["miou"],
        "val": val,
        "test": _evaluate_split(best, recipe, data.test, device) if data.test else None,
        "last": facts,
        "changed_after": _recipe_changes(folder),
        "skipped": _skipped(folder),
        "hours": round(facts["seconds"] / 3600, 3),
        "peak_memory_bytes": _peak_memory(device),
        "commit": current_commit(),
        "command": " ".join(["python -m deeplabzoo.train", *sys.argv[1:]]),
    }
    folder.write_json(folder.report, report)
    title = f"{recipe.name}: val mIoU {100 * val['miou']:.2f} %"
    draw_curves(folder.path, title)
    logger.info(f"{title} over {val['images']} images, best weights of step {facts['best']['step']}; {folder.report}")
    return report


def _recipe_changes(folder: RunDir) -> list[int]:
    """Return after which steps the run was resumed with another recipe: one command cannot reproduce such a run."""
    starts = [(record["step"], record["recipe_sha256"]) for record in read_log(folder.log) if record["kind"] == "start"]
    return [step for (_, before), (step, after) in itertools.pairwise(starts) if before != after]


def _skipped(folder: RunDir) -> dict[str, int]:
    """Return how often each training image was skipped because it could not be read, and log it."""
    times = Counter(name for record in read_log(folder.log) for name in record.get("skipped", ()))
    if times:
        shown = f"{', '.join(sorted(times)[:_MAX_LISTED])}{' …' if len(times) > _MAX_LISTED else ''}"
        logger.warning(f"{len(times)} training images could not be read and were skipped {times.total()} times: {shown}")
    return dict(sorted(times.items()))


def _evaluate_split(net: DeepLab, recipe: Recipe, data: SegmentationDataset, device: torch.device) -> dict[str, Any]:
    stride = recipe.evaluation_output_stride
    return evaluate(net, data, output_stride=stride, progress=False, device=device, model=recipe.model).to_dict()


def _peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def train(recipe: Recipe, root: Path | None, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train `recipe` and write a run's folder; the host program's random state and deterministic mode are restored.

    Under torchrun every process calls this; rank 0 writes.

    Args:
        recipe: What to train (`get_recipe`, `apply_overrides`).
        root: Folder of the recipe's dataset; None for `shapes`.
        out: Folder of the run; it is created, and locked while the run lasts.
        resume: Continue from the last state in `out`; on a CPU the weights then equal, bit for bit, those of a run that was
            never stopped.

    Returns:
        The report, as `out/report.json` holds it; empty on other ranks.

    Raises:
        UsageError: Settings do not fit each other, or `out` holds another run or is in use.
        DataError: The dataset cannot be used.
        TrainingError: The run cannot continue, e.g. because the loss is not finite; StoppedError after SIGTERM or Ctrl-C.
        OutputError: A file cannot be written.
    """
    with _host_state_restored(), init_distributed(recipe.device) as distributed, StopRequest() as stop, ExitStack() as locked:
        torch.use_deterministic_algorithms(recipe.deterministic)
        data = open_splits(recipe, root)
        recipe = recipe.with_total_steps(len(data.train))
        folder = RunDir(out)
        if distributed.is_main_process:
            locked.enter_context(folder.lock())
        state = _begin_or_resume(folder, recipe, data, distributed, resume)
        net = model_from_state(state, data.train) if state else build_model(recipe, data.train)
        trainer = Trainer(recipe, data, net, distributed, state)
        if state and distributed.is_main_process:
            _restore_damaged_weights(trainer, folder)
        if distributed.is_main_process:
            palette, classes, done = data.train.palette, data.train.classes, trainer.evaluation_done
            with RunLog(out, recipe, trainer.step, palette, classes=classes, evaluation_done=done) as log:
                log.start(trainer.step, trainer.facts())
                with stop.deferred():
                    _run(trainer, folder, log, stop)
        else:
            with stop.deferred():
                _run(trainer, folder, None, stop)
        report = write_report(trainer.eval_model, recipe, data, folder, trainer.facts()) if distributed.is_main_process else {}
        distributed.barrier()
        return report


def _begin_or_resume(
    folder: RunDir, recipe: Recipe, data: Splits, distributed: DistributedContext, resume: bool
) -> TrainingState | None:
    """Let rank 0 prepare the folder and check a resume, then the other ranks read the state."""
    state = folder.start(recipe, data.facts, resume=resume) if distributed.is_main_process else None
    distributed.barrier()
    return state if distributed.is_main_process else folder.state() if resume else None


@contextmanager
def _host_state_restored() -> Iterator[None]:
    """Give torch's random generators and deterministic mode back to the program that calls `train`."""
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _restore_damaged_weights(trainer: Trainer, folder: RunDir) -> None:
    """Write last and best weights again where a power cut damaged them: the states hold the same tensors."""
    for path, step in ((folder.last, trainer.step), (folder.best, int(trainer.best["step"]))):
        state = folder.state(step) if step else None
        if state is not None and not folder.holds_weights(path, step, state.eval_tensors):
            logger.warning(f"resume: {path.name} is missing or damaged; it is written again from the state of step {step}")
            trainer.restore_weights(path, state)


def _run(trainer: Trainer, folder: RunDir, log: RunLog | None, stop: StopRequest) -> None:
    recipe, steps = trainer.recipe, trainer.steps
    if not trainer.evaluation_done:  # the run was stopped during this evaluation
        _evaluate(trainer, folder, log, stop)
        _save(trainer, folder, log)
    for batch in _batches(trainer, folder, log, stop):
        step_result = trainer.train_step(batch, stop=stop)
        done = trainer.step
        if not step_result.finite:
            raise TrainingError(_nonfinite_step_message(step_result, folder))
        if log:
            log.step(
                done,
                loss=step_result.loss,
                lr=step_result.lr,
                gradient_norm=step_result.gradient_norm,
                skipped=step_result.skipped,
            )
        trainer.evaluation_done = not recipe.should_evaluate(done)
        if not (trainer.evaluation_done or step_result.stopping):
            _evaluate(trainer, folder, log, stop)
        if done % recipe.save_every == 0 or recipe.should_evaluate(done) or step_result.stopping or done == steps:
            _save(trainer, folder, log)
        if step_result.stopping and (done < steps or not trainer.evaluation_done):
            raise stop.stop_error(_resume_note(trainer))


def _batches(trainer: Trainer, folder: RunDir, log: RunLog | None, stop: StopRequest) -> Iterator[Batch]:
    """Yield the batches; where one cannot be read, the state is saved first, so that no step is lost."""
    try:
        yield from trainer.batches()
    except DeepLabZooError as error:
        _save(trainer, folder, log)
        if stop.signal:  # systemd and Slurm send the signal to the workers, too, which then fail
            raise stop.stop_error(_resume_note(trainer)) from None
        if isinstance(error, ImageError):
            raise TrainingError(
                f"{error} Training stopped before step {trainer.step + 1}; repair the image and go on with --resume, or "
                "with --resume --set unreadable=skip to replace such images by others."
            ) from None
        raise


def _evaluate(trainer: Trainer, folder: RunDir, log: RunLog | None, stop: StopRequest) -> None:
    """Evaluate on val; where that is stopped or fails, a state is saved from which it is repeated."""
    _require_finite(trainer, folder)
    for net in (trainer.net, trainer.eval_model):
        trainer.distributed.sync_buffers(net)
    try:
        with stop.immediate():
            measured = validate(
                trainer.eval_model,
                trainer.data.val,
                trainer.distributed,
                limit=trainer.recipe.evaluation_images,
                num_samples=trainer.recipe.pictures if log else 0,
                crop=trainer.recipe.crop_val,
            )
    except ImmediateStop:
        _save(trainer, folder, log)
        raise stop.stop_error(_resume_note(trainer)) from None
    except DeepLabZooError:
        _save(trainer, folder, log)
        raise
    if measured.pixels and not math.isfinite(measured.loss):  # argmax of nan would be scored as the first class
        raise TrainingError(_nonfinite_state_message(f"The validation loss is {measured.loss}", trainer, folder))
    best = trainer.update_best(measured.scores.miou)
    trainer.evaluation_done = True
    if log:
        log.evaluation(trainer.step, measured, best)
        if best:
            trainer.save_weights(folder.best)


def _save(trainer: Trainer, folder: RunDir, log: RunLog | None) -> None:
    """Save what a resumed run needs, on rank 0; before the first step there is nothing to save."""
    if log is None or trainer.step == 0:
        return
    _require_finite(trainer, folder)
    log.sync()
    trainer.save_weights(folder.last)
    folder.save(trainer.state())


def _resume_note(trainer: Trainer) -> str:
    return f" after step {trainer.step} of {trainer.steps}; --resume goes on from there"


def _require_finite(trainer: Trainer, folder: RunDir) -> None:
    """Raise TrainingError where the last step made weights non-finite: they must not replace a good state."""
    broken = trainer.first_nonfinite_tensor()
    if broken is not None:
        raise TrainingError(_nonfinite_state_message(f"'{broken}' has non-finite values", trainer, folder))


def _nonfinite_state_message(what: str, trainer: Trainer, folder: RunDir) -> str:
    return (
        f"{what} after step {trainer.step}, so that step was not saved; lower lr, add warmup_steps or clip_norm, or amp=off. "
        f"{folder.resume_advice(trainer.step)}"
    )


def _nonfinite_step_message(step_result: StepResult, folder: RunDir) -> str:
    what = (
        f"The loss is {step_result.loss}"
        if not math.isfinite(step_result.loss)
        else f"The gradient norm is {step_result.gradient_norm}"
    )
    return (
        f"{what} at step {step_result.step} (lr {step_result.lr:.2e}), so training stopped before the weights were changed; "
        f"lower lr, add warmup_steps or clip_norm, or amp=off. {folder.resume_advice(step_result.step)}"
    )
