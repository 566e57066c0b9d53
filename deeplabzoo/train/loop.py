"""The training loop, read from top to bottom: recipe and data in, a folder with weights and report out."""

import math
from pathlib import Path
from typing import Any

from deeplabzoo.errors import TrainingError
from deeplabzoo.train.distributed import Processes, joined
from deeplabzoo.train.folder import RunFolder
from deeplabzoo.train.log import RunLog
from deeplabzoo.train.network import build
from deeplabzoo.train.recipe import Recipe
from deeplabzoo.train.report import write_report
from deeplabzoo.train.signals import StopRequest
from deeplabzoo.train.splits import Splits, open_splits
from deeplabzoo.train.state import State
from deeplabzoo.train.trainer import Trainer, Update
from deeplabzoo.train.validate import measure
from deeplabzoo.zoo.factory import load


def train(recipe: Recipe, root: Path | None, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train `recipe` on the data at `root` and return the report that `out/report.json` holds.

    Under torchrun every process calls this; the first one writes. `resume` goes on from the last state in `out`, and ends with
    the weights, bit for bit on a CPU, of a run that was never stopped. Raises UsageError for a call that cannot be meant,
    DataError for data that cannot be used, TrainingError for a run that cannot go on, OutputError.
    """
    with joined(recipe.device) as processes, StopRequest() as stop:
        data = open_splits(recipe, root)
        recipe = recipe.planned(len(data.train))
        folder = RunFolder(out)
        state = _begin(folder, recipe, data, processes, resume)
        net = load(folder.last) if state else build(recipe, data.train)  # a resumed run needs no other weights again
        trainer = Trainer(recipe, data, net, processes, state)
        if processes.first:
            with RunLog(out, recipe, trainer.step, data.train.palette) as log:
                log.start(trainer.step, trainer.facts())
                _run(trainer, folder, log, stop)
        else:
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
    for batch in trainer.batches():
        update = trainer.update(batch, stopping=stop.signal_name is not None)
        done = trainer.step
        if not update.finite:
            raise TrainingError(_not_finite(update, folder))
        if log:
            log.step(done, loss=update.loss, lr=update.lr, gradient_norm=update.gradient_norm)
        if recipe.due(done):
            trainer.processes.align_buffers(trainer.net)
            measured = measure(
                trainer.evaluated,
                trainer.data.val,
                trainer.processes,
                limit=recipe.evaluation_images,
                pictures=recipe.pictures if log else 0,
                crop=recipe.crop_val,
            )
            best = trainer.take_score(measured.scores.miou)
            if log:
                log.evaluation(done, measured, best)
                if best:
                    trainer.save_weights(folder.best)
        if log and (done % recipe.save_every == 0 or recipe.due(done) or update.stopping or done == steps):
            trainer.save_weights(folder.last)
            folder.save(trainer.state())
        if update.stopping and done < steps:
            raise TrainingError(
                f"Stopped by {stop.signal_name or 'a signal'} after step {done} of {steps}; --resume goes on from there."
            )


def _not_finite(update: Update, folder: RunFolder) -> str:
    what = f"The loss is {update.loss}" if not math.isfinite(update.loss) else f"The gradient's norm is {update.gradient_norm}"
    return (
        f"{what} at step {update.step} (lr {update.lr:.2e}), so training stopped before the weights were touched; lower lr, "
        f"add warmup_steps or clip_norm, or amp=off. {folder.last_good()}"
    )
