"""A run's folder: recipe.json, log.jsonl, state/, last.safetensors, best.safetensors, report.json, curves.png."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deeplabzoo.errors import TrainingError, UsageError
from deeplabzoo.output import ensure_folder, remove_unfinished, write_atomically
from deeplabzoo.plain_json import parse_json
from deeplabzoo.say import say
from deeplabzoo.train.overrides import recipe_from_dict
from deeplabzoo.train.recipe import Recipe
from deeplabzoo.train.state import State, load_state, save_state, steps_saved


class RunFolder:
    """Where a run keeps what it makes; raises OutputError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.json"
        self.log = path / "log.jsonl"
        self.states = path / "state"
        self.last = path / "last.safetensors"
        self.best = path / "best.safetensors"
        self.report = path / "report.json"
        self.curves = path / "curves.png"

    def recipe(self) -> Recipe | None:
        """Return the recipe of the run that is here, or None; raises TrainingError for a file that cannot be understood."""
        if not self.recipe_file.exists():
            return None
        try:
            return recipe_from_dict(parse_json(self.recipe_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, UsageError) as error:
            raise TrainingError(f"'{self.recipe_file}' cannot be understood: {error}") from None

    def begin(self, recipe: Recipe, data_sha256: str, *, resume: bool) -> State | None:
        """Make the folder a run of `recipe`, and return the state to go on from, or None for the beginning.

        Raises UsageError where a run is here already and `resume` is false, or where recipe or data are not those of the state
        that is resumed (unless the recipe says `allow_change`); TrainingError where states are here and none is whole.
        """
        before = self.recipe() if self.log.exists() or self.states.exists() else None  # else: a call that failed early
        if before is not None and not resume:
            raise UsageError(
                f"'{self.path}' already holds a run of '{before.name}'; add --resume to go on, or choose another --out."
            )
        ensure_folder(self.path)
        for file in (self.recipe_file, self.log, self.last, self.best, self.report, self.curves):
            remove_unfinished(file)
        state = self.state() if resume else None
        if state is not None:
            self._check(before, recipe, state, data_sha256)
        elif resume and steps_saved(self.states):
            raise TrainingError(
                f"None of the states in '{self.states}' is whole; restore one, or remove that folder to begin at step 0 again."
            )
        self.write_json(self.recipe_file, recipe.to_dict())
        if resume:
            say(
                f"resume: going on after step {state.step}"
                if state
                else "resume: no state is saved here yet; starting at step 0"
            )
        return state

    def _check(self, before: Recipe | None, recipe: Recipe, state: State, data_sha256: str) -> None:
        changes = before.differences(recipe) if before else []
        if not changes and state.facts.get("recipe_sha256") != recipe.digest():
            changes.append(f"the state of step {state.step} is that of another recipe")
        if state.facts.get("data_sha256") != data_sha256:
            changes.append("the training pictures")
        if changes and not recipe.allow_change:
            raise UsageError(
                f"This run cannot be resumed as it is, because its recipe was changed ({'; '.join(changes)}); "
                "undo that, choose another --out, or add --set allow_change=true to go on nevertheless."
            )
        if changes:
            say(f"resume: going on with a changed recipe ({'; '.join(changes)})")

    def state(self) -> State | None:
        """Return the newest state that is whole, or None."""
        return load_state(self.states)

    def last_good(self, failed: int) -> str:
        """Say where a run that failed in update number `failed` can be taken up again; the state that led to it is no good."""
        saved = steps_saved(self.states)
        good = next((step for step in saved if step < failed), None)
        if not saved:
            return "No state was saved before."
        if saved[0] < failed:
            return f"The last good state is that of step {good}, in '{self.states}'."
        rest = f"remove it to go on from that of step {good}" if good else "there is none before it, so begin anew"
        return f"The state of step {saved[0]}, in '{self.states}', leads straight to this; {rest}."

    def save(self, state: State) -> None:
        """Write a state to resume from; that of the best score so far stays, however old."""
        save_state(self.states, state, best=state.facts["best"]["step"])

    def write_json(self, path: Path, values: Mapping[str, Any]) -> None:
        """Write plain values to a file of the folder, atomically."""
        text = json.dumps(values, indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
