"""The training loop, read from top to bottom: recipe and data in, a folder with weights and report out."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deeplabzoo.errors import DeepLabZooError, ImageError, TrainingError
from deeplabzoo.train.distributed import Processes, joined
from deeplabzoo.train.folder import RunFolder
from deeplabzoo.train.log import RunLog
from deeplabzoo.train.network import build, resumed
from deeplabzoo.train.recipe import Recipe
from deeplabzoo.train.report import write_report
from deeplabzoo.train.signals import LeaveNow, StopRequest
from deeplabzoo.train.splits import Splits, open_splits
from deeplabzoo.train.state import State
from deeplabzoo.train.stream import Batch
from deeplabzoo.train.trainer import Trainer, Update
from deeplabzoo.train.validate import measure


def train(recipe: Recipe, root: Path | None, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train `recipe` on the data at `root` and return the report that `out/report.json` holds.

    Under torchrun every process calls this; the first one writes. `resume` goes on from the last state in `out`, and ends with
    the weights, bit for bit on a CPU, of a run that was never stopped. Raises UsageError for a call that cannot be meant,
    DataError for data that cannot be used, TrainingError for a run that cannot go on (StoppedError where SIGTERM or Ctrl-C
    asked for it), OutputError.
    """
    with joined(recipe.device) as processes, StopRequest() as stop:
        data = open_splits(recipe, root)
        recipe = recipe.planned(len(data.train))
        folder = RunFolder(out)
        state = _begin(folder, recipe, data, processes, resume)
        net = resumed(state, data.train) if state else build(recipe, data.train)
        trainer = Trainer(recipe, data, net, processes, state)
        if processes.first:
            with RunLog(out, recipe, trainer.step, data.train.palette, measured=trainer.measured) as log:
                log.start(trainer.step, trainer.facts())
                with stop.held():
                    _run(trainer, folder, log, stop)
        else:
            with stop.held():
                _run(trainer, folder, None, stop)
        report = write_report(trainer.evaluated, recipe, data, folder, trainer.facts()) if processes.first else {}
        processes.wait()
        return report


def _begin(folder: RunFolder, recipe: Recipe, data: Splits, processes: Processes, resume: bool) -> State | None:
    """Let the first process make the folder (and judge a resume), then the others read what it left."""
    state = folder.begin(recipe, data.sha256, resume=resume) if processes.first else None
    processes.wait()
    return state if processes.first else folder.state() if resume else None


def _run(trainer: Trainer, folder: RunFolder, log: RunLog | None, stop: StopRequest) -> None:
    recipe, steps = trainer.recipe, trainer.steps
    if not trainer.measured:  # the run was stopped in the middle of this evaluation
        _evaluate(trainer, folder, log, stop)
        _save(trainer, folder, log)
    for batch in _batches(trainer, folder, log, stop):
        update = trainer.update(batch, stop=stop)
        done = trainer.step
        if not update.finite:
            raise TrainingError(_not_finite(update, folder))
        if log:
            log.step(done, loss=update.loss, lr=update.lr, gradient_norm=update.gradient_norm, skipped=update.skipped)
        trainer.measured = not recipe.due(done)
        if not (trainer.measured or update.stopping):
            _evaluate(trainer, folder, log, stop)
        if done % recipe.save_every == 0 or recipe.due(done) or update.stopping or done == steps:
            _save(trainer, folder, log)
        if update.stopping and (done < steps or not trainer.measured):
            raise stop.stopped(_after(trainer))


def _batches(trainer: Trainer, folder: RunFolder, log: RunLog | None, stop: StopRequest) -> Iterator[Batch]:
    """Yield the batches; where one cannot be read, nothing before it is lost: the state is saved first."""
    try:
        yield from trainer.batches()
    except DeepLabZooError as error:
        _save(trainer, folder, log)
        if stop.signal:  # sent to the workers, too, as systemd and Slurm do
            raise stop.stopped(_after(trainer)) from None
        if isinstance(error, ImageError):
            raise TrainingError(
                f"{error} Training stopped before step {trainer.step + 1}; put the picture right and go on with --resume, or "
                "with --resume --set unreadable=skip to let others take the place of such pictures."
            ) from None
        raise


def _evaluate(trainer: Trainer, folder: RunFolder, log: RunLog | None, stop: StopRequest) -> None:
    """Measure on val; where that is stopped or fails, a state is saved from which it is done again."""
    _require_finite(trainer, folder)
    for net in (trainer.net, trainer.evaluated):
        trainer.processes.align_buffers(net)
    try:
        with stop.at_once():
            measured = measure(
                trainer.evaluated,
                trainer.data.val,
                trainer.processes,
                limit=trainer.recipe.evaluation_images,
                pictures=trainer.recipe.pictures if log else 0,
                crop=trainer.recipe.crop_val,
            )
    except LeaveNow:
        _save(trainer, folder, log)
        raise stop.stopped(_after(trainer)) from None
    except DeepLabZooError:
        _save(trainer, folder, log)
        raise
    if measured.pixels and not math.isfinite(measured.loss):  # argmax of nan would be scored as the first class
        raise TrainingError(_unsound(f"The validation loss is {measured.loss}", trainer, folder))
    best = trainer.take_score(measured.scores.miou)
    trainer.measured = True
    if log:
        log.evaluation(trainer.step, measured, best)
        if best:
            trainer.save_weights(folder.best)


def _save(trainer: Trainer, folder: RunFolder, log: RunLog | None) -> None:
    """Save what a resumed run needs, in the first process; before the first step there is nothing to save."""
    if log is None or trainer.step == 0:
        return
    _require_finite(trainer, folder)
    log.sync()
    trainer.save_weights(folder.last)
    folder.save(trainer.state())


def _after(trainer: Trainer) -> str:
    return f" after step {trainer.step} of {trainer.steps}; --resume goes on from there"


def _require_finite(trainer: Trainer, folder: RunFolder) -> None:
    """Raise TrainingError where the last step made weights that are no numbers: saved, they would take a good state's place."""
    broken = trainer.broken()
    if broken is not None:
        raise TrainingError(_unsound(f"'{broken}' holds values that are no finite numbers", trainer, folder))


def _unsound(what: str, trainer: Trainer, folder: RunFolder) -> str:
    return (
        f"{what} after step {trainer.step}, so that step was not saved; lower lr, add warmup_steps or clip_norm, or amp=off. "
        f"{folder.last_good(trainer.step)}"
    )


def _not_finite(update: Update, folder: RunFolder) -> str:
    what = f"The loss is {update.loss}" if not math.isfinite(update.loss) else f"The gradient's norm is {update.gradient_norm}"
    return (
        f"{what} at step {update.step} (lr {update.lr:.2e}), so training stopped before the weights were touched; lower lr, "
        f"add warmup_steps or clip_norm, or amp=off. {folder.last_good(update.step)}"
    )
