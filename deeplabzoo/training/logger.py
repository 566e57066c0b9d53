"""What one sees of a run: a bar with the time left, log.jsonl with every step, and TensorBoard or W&B where wanted.

Only the first process logs, and no logger ever talks to the other processes (asks.md theme M).
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

from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.validate import PredictionSample, ValidationResult

_PROGRESS_INTERVAL_S = 30.0
"""Between two redraws of the bar where nobody watches: a file would fill with them."""


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the records of a log.jsonl; a last line that was cut off is left out."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class RunLog:
    """Records of one run; a resumed run's log is first cut back to the step that it goes on from, so no line is doubled.

    Raises OutputError where it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        step: int,
        palette: tuple[tuple[int, int, int], ...],
        *,
        evaluation_done: bool = True,
    ) -> None:
        assert recipe.steps is not None
        self._palette = palette
        self._every = recipe.log_every
        self._path = path = folder / "log.jsonl"
        kept = [record for record in read_log(path) if _is_kept_on_resume(record, step, evaluation_done)] if step else []
        ends = [record["step"] for record in kept if record["kind"] == "evaluation"] or [0]
        self._losses = [record["loss"] for record in kept if record["kind"] == "step" and record["step"] > ends[-1]]
        self._logged_names = {name for record in kept for name in record.get("skipped", ())}
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda file: file.write(lines.encode()))
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
        """Record with what this run, or this part of it, was made: device, versions, data."""
        self._record({"kind": "start", "step": step, **facts})

    def step(self, done: int, *, loss: float, lr: float, gradient_norm: float, skipped: Sequence[str] = ()) -> None:
        """Record one update; `done` counts those made so far, `skipped` names pictures that could not be read for it."""
        missing = {"skipped": list(skipped)} if skipped else {}
        self._record({"kind": "step", "step": done, "loss": loss, "lr": lr, "gradient_norm": gradient_norm, **missing})
        for name in dict.fromkeys(skipped):
            if name not in self._logged_names:
                self.write_line(f"step {done}: '{name}' cannot be read; another picture takes its place (unreadable=skip)")
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
        self._scalars(done, {"val/loss": measured.loss, "val/miou": scores.miou, "train/mean_loss": train_loss})
        for picture in measured.samples:
            panel_HWC = comparison_image(picture, self._palette)
            if self._board is not None:
                self._board.add_image(f"val/{picture.name}", panel_HWC, done, dataformats="HWC")
            if self._wandb is not None:
                import wandb

                self._wandb.log({f"val/{picture.name}": wandb.Image(panel_HWC)}, step=done)

    def write_line(self, line: str) -> None:
        """Print one line above the bar."""
        self._bar.write(line, file=sys.stderr)

    def _scalars(self, done: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, done)
        if self._wandb is not None:
            self._wandb.log(values, step=done)

    def sync(self) -> None:
        """Bring all records to the disk, before a state that counts on them is."""
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
    """Whether a record was made before a state of `step`; where its evaluation is yet to be made, that one was not."""
    done: int = record["step"]
    return done < step or (done == step and (evaluation_done or record["kind"] != "evaluation"))


def comparison_image(picture: PredictionSample, palette: tuple[tuple[int, int, int], ...]) -> npt.NDArray[np.uint8]:
    """Return photo, ground truth and prediction in one picture; ignored pixels are white in the ground truth."""
    colours = np.full((65536, 3), 255, np.uint8)
    colours[: len(palette)] = palette
    panel: npt.NDArray[np.uint8] = np.concatenate(
        [picture.image_HWC, colours[picture.truth_HW], colours[picture.prediction_HW]], axis=1
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
