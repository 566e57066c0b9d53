"""A run's folder: recipe.json, log.jsonl, state/, last.safetensors, best.safetensors, report.json, curves.png."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deeplabzoo.errors import OutputError, TrainingError, UsageError
from deeplabzoo.files import ensure_folder, remove_partial_files, write_atomically
from deeplabzoo.hub.http_download import sha256_of
from deeplabzoo.log import logger
from deeplabzoo.strict_json import parse_json
from deeplabzoo.training.overrides import recipe_from_dict
from deeplabzoo.training.recipe import Recipe

# What `--resume` needs, on disk: whole or not there at all; the last two, and that of the best score.
#
# Batches, rates and dropout are functions of the step, so a state is tensors (network, average, optimizer) and a few facts; it
# needs no other file. Each state is a folder `step_00001000`, written under another name, flushed to the disk and then renamed: a
# `kill -9`, or a power cut, at any moment leaves the older one. The number in the name says which is the newest, never a clock;
# hashes say whether all files belong together. Safetensors and JSON only; nothing is unpickled.


_KEPT = 2
_NAME = re.compile(r"step_(\d{8,})")
_FACTS = "facts.json"


@dataclass(frozen=True)
class TrainingState:
    """A run after `step` updates."""

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """One file each, e.g. `net`, `average`, `optimizer`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: the recipe's digest, the network's configuration, the best score so far, the gradient scaler."""


def save_state(folder: Path, state: TrainingState, *, best: int | None = None) -> None:
    """Write a state under `folder` and drop all but the last two and that of step `best`; raises OutputError where that fails.

    The best one was measured: where a run goes astray for more than two states before its numbers end, that one is sound.

    A state of this step that is already there is replaced by the new one, never mixed with it. What could not be written whole
    is removed: on a full disk it would take the room that going on needs.
    """
    final = folder / f"step_{state.step:08d}"
    partial = folder / f".writing_{state.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob(".writing_*"), *folder.glob(".gone_*")):
            shutil.rmtree(leftover)
        partial.mkdir()
        hashes = {}
        for name, tensors in state.tensors.items():
            file = partial / f"{name}.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)
            _fsync(file)
            hashes[file.name] = sha256_of(file)
        (partial / _FACTS).write_text(json.dumps({"step": state.step, "sha256": hashes, "facts": dict(state.facts)}, indent=1))
        _fsync(partial / _FACTS)
        if final.exists():
            final.rename(folder / f".gone_{state.step:08d}")
        partial.rename(final)
        _fsync(folder)
        for older in (path for path in list(_complete_states(folder))[_KEPT:] if _step(path) != best):
            older.rename(older.with_name(f".gone_{older.name[5:]}"))
        for gone in folder.glob(".gone_*"):
            shutil.rmtree(gone)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(
            f"The state of step {state.step} cannot be written to '{folder}' ({error}); "
            "make room there and go on with --resume."
        ) from error


def load_state(folder: Path) -> TrainingState | None:
    """Return the newest state that is whole, or None; one that is damaged is named and passed over."""
    for path in _complete_states(folder):
        try:
            written = json.loads((path / _FACTS).read_text())
            for name, digest in written["sha256"].items():
                if sha256_of(path / name) != digest:
                    raise OSError(f"{name} is not the file that was written")
            tensors = {name.removesuffix(".safetensors"): _read(path / name) for name in written["sha256"]}
            return TrainingState(int(written["step"]), tensors, dict(written["facts"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.info(f"state: '{path.name}' is damaged ({error}); going back to the one before")
    return None


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the states that are here, whole or not, newest first."""
    return [_step(path) for path in _complete_states(folder)]


def _complete_states(folder: Path) -> Iterator[Path]:
    """Complete states, newest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    yield from sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:])


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file in memory of their own: the file is removed while the run goes on with them."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def _fsync(path: Path) -> None:
    """Make the system write a file, or a folder's list of names, to the disk before anything refers to it."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunDir:
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

    def start(self, recipe: Recipe, data_sha256: str, *, resume: bool) -> TrainingState | None:
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
            remove_partial_files(file)
        state = self.state() if resume else None
        if state is not None:
            self._check(before, recipe, state, data_sha256)
        elif resume and saved_steps(self.states):
            raise TrainingError(
                f"None of the states in '{self.states}' is whole; restore one, or remove that folder to begin at step 0 again."
            )
        self.write_json(self.recipe_file, recipe.to_dict())
        if resume:
            logger.info(
                f"resume: going on after step {state.step}"
                if state
                else "resume: no state is saved here yet; starting at step 0"
            )
        return state

    def _check(self, before: Recipe | None, recipe: Recipe, state: TrainingState, data_sha256: str) -> None:
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
            logger.info(f"resume: going on with a changed recipe ({'; '.join(changes)})")

    def state(self) -> TrainingState | None:
        """Return the newest state that is whole, or None."""
        return load_state(self.states)

    def resume_advice(self, failed: int) -> str:
        """Say where a run that failed in update number `failed` can be taken up again; the state that led to it is no good."""
        saved = saved_steps(self.states)
        good = next((step for step in saved if step < failed), None)
        if not saved:
            return "No state was saved before."
        if saved[0] < failed:
            return f"The last good state is that of step {good}, in '{self.states}'."
        rest = f"remove it to go on from that of step {good}" if good else "there is none before it, so begin anew"
        return f"The state of step {saved[0]}, in '{self.states}', leads straight to this; {rest}."

    def save(self, state: TrainingState) -> None:
        """Write a state to resume from; that of the best score so far stays, however old."""
        save_state(self.states, state, best=state.facts["best"]["step"])

    def write_json(self, path: Path, values: Mapping[str, Any]) -> None:
        """Write plain values to a file of the folder, atomically."""
        text = json.dumps(values, indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
