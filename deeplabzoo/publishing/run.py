"""A finished run, read from its folder: its recipe, its report, and the weights that are to be released."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import DataError, TrainingError, UsageError
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.say import say
from deeplabzoo.train.folder import RunFolder
from deeplabzoo.train.recipe import Recipe
from deeplabzoo.train.splits import Splits, open_splits
from deeplabzoo.zoo.checksum import sha256_of
from deeplabzoo.zoo.factory import load

Chosen = Literal["best", "last"]


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What a run left; `net` holds the chosen weights as they were trained, in float32."""

    folder: Path
    recipe: Recipe
    report: dict[str, Any]
    chosen: Chosen
    net: DeepLab

    @property
    def step(self) -> int | None:
        """After how many updates the chosen weights were saved."""
        step = self.net.weights_source.get("trained", {}).get("step")
        return int(step) if step is not None else None

    @property
    def class_list(self) -> str | None:
        """Name of the known class list that the outputs have; None for classes of somebody's own."""
        fitting = [name for name, known in CLASS_LISTS.items() if known.classes == tuple(self.net.classes)]
        return self.recipe.data if self.recipe.data in fitting else next(iter(fitting), None)


def finished_run(path: Path, chosen: Chosen) -> FinishedRun:
    """Read the folder of a run that has ended; raises UsageError, TrainingError or WeightsError, in one sentence."""
    folder = RunFolder(path)
    if not path.is_dir():
        raise UsageError(f"There is no run folder '{path}'; give the --out of a `python -m deeplabzoo.train` that has ended.")
    recipe = folder.recipe()
    if recipe is None:
        raise UsageError(f"'{path}' is not the folder of a training run: it has no recipe.json.")
    if not folder.report.is_file():
        raise UsageError(
            f"The run in '{path}' has not ended: it has no report.json; go on with "
            f"`python -m deeplabzoo.train {recipe.name} --data ROOT --out {path} --resume`."
        )
    try:
        report = json.loads(folder.report.read_text(encoding="utf-8"))
        measured = report["val"]["weights"]["sha256"]
        report["last"]["recipe_sha256"], report["last"]["data_sha256"], report["hours"], report["val"]["hardware"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"'{folder.report}' is not the report of a run ({error!r}); end the run again.") from None
    weights = folder.best if chosen == "best" else folder.last
    if chosen == "best" and weights.is_file() and sha256_of(weights) != measured:
        raise TrainingError(f"'{weights}' is not the file that report.json measured: the run was taken up again; let it end.")
    return FinishedRun(path, recipe, report, chosen, load(weights))


def open_run_data(run: FinishedRun, root: Path | None) -> Splits | None:
    """Open the data that the run was trained and measured on; None, and said, where nobody told where they are.

    Raises DataError for a folder that holds other training pictures than the run's, and what opening it raises.
    """
    if root is None and run.recipe.data != "shapes":
        say(f"figures: none is recorded, as --data does not say where '{run.recipe.data}' is")
        return None
    data = open_splits(run.recipe, root)
    if data.sha256 != run.report["last"]["data_sha256"]:
        raise DataError(f"'{root}' does not hold the {run.recipe.data} pictures that this run was trained on; check --data.")
    if tuple(data.val.classes) != tuple(run.net.classes):
        raise DataError(f"'{root}' has other classes than this run's weights; check --data.")
    return data
