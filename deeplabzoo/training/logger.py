"""The log of a run: progress bar, log.jsonl with every step, curves.png, and optionally TensorBoard or Weights & Biases.

Only rank 0 logs, and no logger communicates with the other ranks.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from deeplabzoo.errors import OutputError, UsageError, printable
from deeplabzoo.files import write_atomically
from deeplabzoo.log import logger
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.validate import PredictionSample, ValidationResult

_PROGRESS_INTERVAL_S = 30.0
"""Between two redraws of the progress bar where stderr is a file, which would fill with them."""


_CLASSES_SHOWN = 12
"""Classes whose IoU is printed after an evaluation; the log has all."""


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the records of a log.jsonl; a last line that was cut off is dropped."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class RunLog:
    """Writer of one run's records; a resumed run's log is first cut back to its step, so that no line is doubled.

    Args:
        folder: The run's folder.
        recipe: The recipe, with its length in steps.
        step: Steps done so far.
        palette: A colour per class, for images of predictions.
        classes: Names of the classes, whose IoU is then printed after each evaluation.
        evaluation_done: Whether the evaluation that is due at `step` has been made.

    Raises:
        OutputError: The log cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        step: int,
        palette: tuple[tuple[int, int, int], ...],
        *,
        classes: Sequence[str] = (),
        evaluation_done: bool = True,
    ) -> None:
        self._class_names = tuple(map(printable, classes))
        assert recipe.steps is not None
        self._palette = palette
        self._every = recipe.log_every
        self._path = path = folder / "log.jsonl"
        kept = [record for record in read_log(path) if _is_kept_on_resume(record, step, evaluation_done)] if step else []
        ends = [record["step"] for record in kept if record["kind"] == "evaluation"] or [0]
        self._losses = [record["loss"] for record in kept if record["kind"] == "step" and record["step"] > ends[-1]]
        self._logged_names = {name for record in kept for name in record.get("skipped", ())}
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda file: file.write(lines.encode()), durable=True)
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._write_error(error) from None
        interval = 0.1 if sys.stderr.isatty() else _PROGRESS_INTERVAL_S
        self._bar = tqdm(total=recipe.steps, initial=step, desc=recipe.name, unit="step", mininterval=interval)
        self._board = _tensorboard(folder, step) if recipe.tensorboard else None
        self._wandb = _wandb(recipe, folder) if recipe.wandb else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def start(self, step: int, facts: dict[str, Any]) -> None:
        """Record how this run, or this part of it, is computed."""
        self._record({"kind": "start", "step": step, **facts})

    def step(self, done: int, *, loss: float, lr: float, gradient_norm: float, skipped: Sequence[str] = ()) -> None:
        """Record one train step; `done` counts the steps so far, `skipped` names images that could not be read for it."""
        missing = {"skipped": list(skipped)} if skipped else {}
        self._record({"kind": "step", "step": done, "loss": loss, "lr": lr, "gradient_norm": gradient_norm, **missing})
        for name in dict.fromkeys(skipped):
            if name not in self._logged_names:
                self.write_line(f"step {done}: '{name}' cannot be read; another image takes its place (unreadable=skip)")
                self._logged_names.add(name)
        self._losses.append(loss)
        self._bar.update()
        self._bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}", refresh=False)
        if done % self._every == 0:
            self._scalars(done, {"train/loss": loss, "train/lr": lr, "train/gradient_norm": gradient_norm})

    def evaluation(self, done: int, measured: ValidationResult, best: bool) -> None:
        """Record scores on the val split, with the mean training loss since the last evaluation."""
        scores = measured.scores
        train_loss = sum(self._losses) / max(1, len(self._losses))
        self._losses.clear()
        self._record(
            {
                "kind": "evaluation",
                "step": done,
                "train_loss": train_loss,
                "loss": _finite(measured.loss),
                "miou": _finite(scores.miou),
                "pixel_accuracy": _finite(scores.pixel_accuracy),
                "dice": _finite(scores.dice),
                "per_class_iou": list(scores.per_class_iou),
                "images": measured.images,
                "best": best,
            }
        )
        star = " (best so far)" if best else ""
        self.write_line(
            f"step {done}: train loss {train_loss:.3f}, val loss {measured.loss:.3f}, mIoU {100 * scores.miou:.2f} %{star}"
        )
        if len(self._class_names) == len(scores.per_class_iou):
            ranked = sorted(
                (iou, name) for iou, name in zip(scores.per_class_iou, self._class_names, strict=True) if iou is not None
            )
            shown = ", ".join(f"{name} {100 * iou:.1f}" for iou, name in ranked[:_CLASSES_SHOWN])
            self.write_line(f"  IoU % by class, lowest first: {shown}{', …' if len(ranked) > _CLASSES_SHOWN else ''}")
        self._scalars(done, {"val/loss": measured.loss, "val/miou": scores.miou, "train/mean_loss": train_loss})
        for sample in measured.samples:
            panel_HWC = comparison_image(sample, self._palette)
            if self._board is not None:
                self._board.add_image(f"val/{sample.name}", panel_HWC, done, dataformats="HWC")
            if self._wandb is not None:
                import wandb

                self._wandb.log({f"val/{sample.name}": wandb.Image(panel_HWC)}, step=done)

    def write_line(self, line: str) -> None:
        """Print one line above the progress bar."""
        self._bar.write(line, file=sys.stderr)

    def _scalars(self, done: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, done)
        if self._wandb is not None:
            self._wandb.log(values, step=done)

    def sync(self) -> None:
        """Flush all records to the disk, before the state that belongs to them."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._write_error(error) from None

    def _record(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._write_error(error) from None

    def _write_error(self, error: OSError) -> OutputError:
        return OutputError(f"Cannot write '{self._path}': {error.strerror}; make room there and go on with --resume.")


def _is_kept_on_resume(record: dict[str, Any], step: int, evaluation_done: bool) -> bool:
    """Whether a record belongs to the first `step` steps; the evaluation after them only where it was completed."""
    done: int = record["step"]
    return done < step or (done == step and (evaluation_done or record["kind"] != "evaluation"))


def comparison_image(sample: PredictionSample, palette: tuple[tuple[int, int, int], ...]) -> npt.NDArray[np.uint8]:
    """Return image, ground truth and prediction side by side; ignored pixels are white in the ground truth."""
    colours = np.full((65536, 3), 255, np.uint8)
    colours[: len(palette)] = palette
    panel: npt.NDArray[np.uint8] = np.concatenate(
        [sample.image_HWC, colours[sample.truth_HW], colours[sample.prediction_HW]], axis=1
    )
    return panel


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("tensorboard=true needs the package: pip install 'deeplabzoo[train]'.") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step)


def _wandb(recipe: Recipe, folder: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UsageError("wandb=PROJECT needs the package: pip install wandb.") from None
    identity = f"{recipe.name}-{folder.resolve().name}-{recipe.digest()[:8]}"
    return wandb.init(project=recipe.wandb, id=identity, resume="allow", config=recipe.to_dict(), dir=str(folder))


_MEAN_POINTS = 50
"""Points of the smoothed loss, each a mean over an equal part of the run."""


def draw_curves(folder: Path, title: str) -> bool:
    """Write `curves.png`, loss, val mIoU and learning rate from the run's `log.jsonl`.

    Args:
        folder: The run's folder.
        title: Heading of the plot.

    Returns:
        False where matplotlib is not installed; that is logged.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("curves.png is not drawn: matplotlib is not installed (pip install 'deeplabzoo[train]')")
        return False
    records = read_log(folder / "log.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, miou, lr = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    if steps:
        at, values = np.array([one["step"] for one in steps]), np.array([one["loss"] for one in steps])
        loss.plot(at, values, color="tab:blue", alpha=0.25, linewidth=0.8, label="train, each step")
        parts = max(1, min(_MEAN_POINTS, len(values)))
        means = [
            (chunk_at.mean(), chunk.mean())
            for chunk_at, chunk in zip(*(np.array_split(a, parts) for a in (at, values)), strict=True)
        ]
        loss.plot(*zip(*means, strict=True), color="tab:blue", label="train, mean")
        lr.plot(at, [one["lr"] for one in steps], color="tab:grey")
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
    lr.set_ylabel("lr")
    lr.set_xlabel("step")
    loss.set_title(title)
    for axes in (loss, miou, lr):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    write_atomically(folder / "curves.png", lambda file: figure.savefig(file, dpi=120, format="png"))
    return True
