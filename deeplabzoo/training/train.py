"""The training loop, read from top to bottom: recipe and data in, a folder with weights and report out."""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deeplabzoo.data.dataset import SegmentationDataset
from deeplabzoo.errors import DeepLabZooError, ImageError, TrainingError
from deeplabzoo.evaluation.evaluate import evaluate
from deeplabzoo.files import write_atomically
from deeplabzoo.git import current_commit
from deeplabzoo.hub.factory import load
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.dataloader import Batch, Splits, open_splits
from deeplabzoo.training.distributed import DistributedContext, init_distributed
from deeplabzoo.training.initialization import build_model, model_from_state
from deeplabzoo.training.logger import RunLog, read_log
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.run_dir import RunDir, TrainingState
from deeplabzoo.training.signals import ImmediateStop, StopRequest
from deeplabzoo.training.trainer import StepResult, Trainer
from deeplabzoo.training.validate import validate

# curves.png: loss, learning rate and val mIoU of a run, drawn from its log.jsonl.


_SMOOTHING_WINDOW = 50
"""Pieces that the loss is averaged over for the line that is easy to read."""


def draw_curves(folder: Path, title: str) -> bool:
    """Write `curves.png` beside `log.jsonl`; where matplotlib is absent, say so and return False."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("curves.png is not drawn: matplotlib is absent (pip install 'deeplabzoo[train]')")
        return False
    records = read_log(folder / "log.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, miou, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    if steps:
        at, values = np.array([one["step"] for one in steps]), np.array([one["loss"] for one in steps])
        loss.plot(at, values, color="tab:blue", alpha=0.25, linewidth=0.8, label="train, each step")
        parts = max(1, min(_SMOOTHING_WINDOW, len(values)))
        means = [
            (chunk_at.mean(), chunk.mean())
            for chunk_at, chunk in zip(*(np.array_split(a, parts) for a in (at, values)), strict=True)
        ]
        loss.plot(*zip(*means, strict=True), color="tab:blue", label="train, mean")
        rate.plot(at, [one["lr"] for one in steps], color="tab:grey")
        bottom, top = 0.0, float(np.quantile(values, 0.99)) * 1.1
        loss.set_ylim(min(bottom, float(values.min())), top if top > 0 else None)
    if evaluations:
        scored = [one for one in evaluations if one["miou"] is not None]
        loss.plot(
            [one["step"] for one in evaluations], [one["loss"] for one in evaluations], "o-", color="tab:orange", label="val"
        )
        miou.plot([one["step"] for one in scored], [100 * one["miou"] for one in scored], "o-", color="tab:green")
        if scored:
            best = max(scored, key=lambda one: one["miou"])
            miou.annotate(
                f"{100 * best['miou']:.2f}", (best["step"], 100 * best["miou"]), textcoords="offset points", xytext=(0, 6)
            )
    loss.set_ylabel("loss")
    if loss.get_legend_handles_labels()[0]:
        loss.legend(frameon=False)
    miou.set_ylabel("val mIoU (%)")
    rate.set_ylabel("lr")
    rate.set_xlabel("step")
    loss.set_title(title)
    for axes in (loss, miou, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    write_atomically(folder / "curves.png", lambda file: figure.savefig(file, dpi=120, format="png"))
    return True


# The end of a run: the best weights measured on all of val (and test), report.json and curves.png.


_MAX_LISTED = 5


def write_report(net: DeepLab, recipe: Recipe, data: Splits, folder: RunDir, facts: dict[str, Any]) -> dict[str, Any]:
    """Measure best.safetensors on all of val, and once on test; write report.json and curves.png; return the report."""
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
    """Return after which steps the run was resumed with another recipe: such a run cannot be repeated by one command."""
    starts = [(record["step"], record["recipe_sha256"]) for record in read_log(folder.log) if record["kind"] == "start"]
    return [step for (_, before), (step, after) in itertools.pairwise(starts) if before != after]


def _skipped(folder: RunDir) -> dict[str, int]:
    """Return how often each training picture was left out because it could not be read, and say so where any was."""
    times = Counter(name for record in read_log(folder.log) for name in record.get("skipped", ()))
    if times:
        shown = f"{', '.join(sorted(times)[:_MAX_LISTED])}{' …' if len(times) > _MAX_LISTED else ''}"
        logger.info(f"{len(times)} training pictures could not be read and were left out {times.total()} times: {shown}")
    return dict(sorted(times.items()))


def _evaluate_split(net: DeepLab, recipe: Recipe, data: SegmentationDataset, device: torch.device) -> dict[str, Any]:
    stride = recipe.evaluation_output_stride
    return evaluate(net, data, output_stride=stride, progress=False, device=device, model=recipe.model).to_dict()


def _peak_memory(device: torch.device) -> int | None:
    """Most memory held at once, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def train(recipe: Recipe, root: Path | None, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train `recipe` on the data at `root` and return the report that `out/report.json` holds.

    Under torchrun every process calls this; the first one writes. `resume` goes on from the last state in `out`, and ends with
    the weights, bit for bit on a CPU, of a run that was never stopped. Raises UsageError for a call that cannot be meant,
    DataError for data that cannot be used, TrainingError for a run that cannot go on (StoppedError where SIGTERM or Ctrl-C
    asked for it), OutputError.
    """
    with init_distributed(recipe.device) as distributed, StopRequest() as stop:
        data = open_splits(recipe, root)
        recipe = recipe.with_total_steps(len(data.train))
        folder = RunDir(out)
        state = _begin_or_resume(folder, recipe, data, distributed, resume)
        net = model_from_state(state, data.train) if state else build_model(recipe, data.train)
        trainer = Trainer(recipe, data, net, distributed, state)
        if distributed.is_main_process:
            with RunLog(out, recipe, trainer.step, data.train.palette, evaluation_done=trainer.evaluation_done) as log:
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
    """Let the first process make the folder (and judge a resume), then the others read what it left."""
    state = folder.start(recipe, data.sha256, resume=resume) if distributed.is_main_process else None
    distributed.barrier()
    return state if distributed.is_main_process else folder.state() if resume else None


def _run(trainer: Trainer, folder: RunDir, log: RunLog | None, stop: StopRequest) -> None:
    recipe, steps = trainer.recipe, trainer.steps
    if not trainer.evaluation_done:  # the run was stopped in the middle of this evaluation
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
    """Yield the batches; where one cannot be read, nothing before it is lost: the state is saved first."""
    try:
        yield from trainer.batches()
    except DeepLabZooError as error:
        _save(trainer, folder, log)
        if stop.signal:  # sent to the workers, too, as systemd and Slurm do
            raise stop.stop_error(_resume_note(trainer)) from None
        if isinstance(error, ImageError):
            raise TrainingError(
                f"{error} Training stopped before step {trainer.step + 1}; put the picture right and go on with --resume, or "
                "with --resume --set unreadable=skip to let others take the place of such pictures."
            ) from None
        raise


def _evaluate(trainer: Trainer, folder: RunDir, log: RunLog | None, stop: StopRequest) -> None:
    """Measure on val; where that is stopped or fails, a state is saved from which it is done again."""
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
    """Save what a resumed run needs, in the first process; before the first step there is nothing to save."""
    if log is None or trainer.step == 0:
        return
    _require_finite(trainer, folder)
    log.sync()
    trainer.save_weights(folder.last)
    folder.save(trainer.state())


def _resume_note(trainer: Trainer) -> str:
    return f" after step {trainer.step} of {trainer.steps}; --resume goes on from there"


def _require_finite(trainer: Trainer, folder: RunDir) -> None:
    """Raise TrainingError where the last step made weights that are no numbers: saved, they would take a good state's place."""
    broken = trainer.first_nonfinite_tensor()
    if broken is not None:
        raise TrainingError(_nonfinite_state_message(f"'{broken}' holds values that are no finite numbers", trainer, folder))


def _nonfinite_state_message(what: str, trainer: Trainer, folder: RunDir) -> str:
    return (
        f"{what} after step {trainer.step}, so that step was not saved; lower lr, add warmup_steps or clip_norm, or amp=off. "
        f"{folder.resume_advice(trainer.step)}"
    )


def _nonfinite_step_message(step_result: StepResult, folder: RunDir) -> str:
    what = (
        f"The loss is {step_result.loss}"
        if not math.isfinite(step_result.loss)
        else f"The gradient's norm is {step_result.gradient_norm}"
    )
    return (
        f"{what} at step {step_result.step} (lr {step_result.lr:.2e}), so training stopped before the weights were touched; lower lr, "
        f"add warmup_steps or clip_norm, or amp=off. {folder.resume_advice(step_result.step)}"
    )
