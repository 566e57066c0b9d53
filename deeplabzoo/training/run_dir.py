"""The folder of a training run: recipe.json, log.jsonl, weights, report, and the states that `--resume` continues from."""

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deeplabzoo.checkpoints.native import read_checkpoint
from deeplabzoo.errors import OutputError, TrainingError, UsageError, WeightsError
from deeplabzoo.files import ensure_folder, fsync_path, remove_partial_files, write_atomically
from deeplabzoo.hub.http_download import sha256_of
from deeplabzoo.log import logger
from deeplabzoo.strict_json import parse_json
from deeplabzoo.training.overrides import recipe_from_dict
from deeplabzoo.training.recipe import Recipe

# States. Batches, learning rates and dropout are functions of the step, so a state is tensors (model, EMA, optimizer) and a few
# facts. Each is a folder `step_00001000`, written under another name, flushed to the disk and then renamed: after a `kill -9`
# or a power cut at any moment the older one is complete. The step in the name says which is the newest, never a clock; hashes
# say whether all files belong together. Safetensors and JSON only; nothing is unpickled.

_STATES_KEPT = 2
_STATE_NAME = re.compile(r"step_(\d{8,})")
_FACTS = "facts.json"


@dataclass(frozen=True)
class TrainingState:
    """A run after `step` optimizer steps."""

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """One file each: `net`, `optimizer`, and `average` (the EMA) where the recipe has one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: the recipe and its digest, the model's configuration, the best score so far, the gradient scaler."""

    @property
    def eval_tensors(self) -> Mapping[str, torch.Tensor]:
        """State dict of the model that is evaluated and saved: the EMA where there is one."""
        return self.tensors.get("average", self.tensors["net"])


def save_state(folder: Path, state: TrainingState, *, best: int | None = None) -> None:
    """Write a state and remove all but the last two and that of the best score.

    The state of the best score is kept because it was evaluated: where a run diverges for more than two states before its loss
    becomes non-finite, that one is sound. A state of the same step is replaced, never mixed with the new one. A state that
    could not be written completely is removed, since on a full disk it would take the space that resuming needs.

    Args:
        folder: The run's `state` folder; created if missing.
        state: What to write.
        best: Step of the best score so far, whose state is kept.

    Raises:
        OutputError: The state cannot be written, for example on a full disk.
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
            fsync_path(file)
            hashes[file.name] = sha256_of(file)
        (partial / _FACTS).write_text(json.dumps({"step": state.step, "sha256": hashes, "facts": dict(state.facts)}, indent=1))
        fsync_path(partial / _FACTS)
        if final.exists():
            final.rename(folder / f".gone_{state.step:08d}")
        partial.rename(final)
        fsync_path(folder)
        for older in (path for path in _state_folders(folder)[_STATES_KEPT:] if _step_of(path) != best):
            older.rename(older.with_name(f".gone_{older.name[5:]}"))
        for gone in folder.glob(".gone_*"):
            shutil.rmtree(gone)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(
            f"The state of step {state.step} cannot be written to '{folder}' ({error}); "
            "make room there and go on with --resume."
        ) from error


def load_state(folder: Path, step: int | None = None) -> TrainingState | None:
    """Return the newest complete state (or the one of `step`), None without one; damaged states are skipped with a warning."""
    for path in _state_folders(folder):
        if step is not None and _step_of(path) != step:
            continue
        try:
            written = json.loads((path / _FACTS).read_text())
            for name, digest in written["sha256"].items():
                if sha256_of(path / name) != digest:
                    raise OSError(f"{name} is not the file that was written")
            tensors = {name.removesuffix(".safetensors"): _read_tensors(path / name) for name in written["sha256"]}
            return TrainingState(int(written["step"]), tensors, dict(written["facts"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(f"state: '{path.name}' is damaged ({error}); using the one before it")
    return None


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of all saved states, complete or not, newest first."""
    return [_step_of(path) for path in _state_folders(folder)]


def _state_folders(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if _STATE_NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Copy the tensors out of the mapped file, which is removed while the run continues."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


class RunDir:
    """Paths and files of one run's folder.

    Args:
        path: The folder; it is created by `lock` or `start`.
    """

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
        """Return the recipe of the run in this folder, or None.

        `allow_change` is false in what is returned: a change is allowed to the call that asks for it, not to later ones.

        Raises:
            TrainingError: recipe.json cannot be understood.
        """
        if not self.recipe_file.exists():
            return None
        try:
            recipe = recipe_from_dict(parse_json(self.recipe_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, UsageError) as error:
            raise TrainingError(f"'{self.recipe_file}' cannot be understood: {error}") from None
        return replace(recipe, allow_change=False)

    def recipe_to_resume(self) -> Recipe | None:
        """Return the run's recipe, from its newest state where recipe.json is damaged; None where no run was begun.

        Raises:
            TrainingError: recipe.json is damaged, and no state holds the recipe.
        """
        try:
            return self.recipe()
        except TrainingError as error:
            state = self.state()
            if state is not None and "recipe" in state.facts:
                logger.warning(f"resume: recipe.json is damaged; the recipe is taken from the state of step {state.step}")
                return replace(recipe_from_dict(state.facts["recipe"]), allow_change=False)
            if not self._begun:
                return None
            raise TrainingError(
                f"{str(error).rstrip('.')}; remove that file and repeat the run's first --set settings together with --resume."
            ) from None

    @property
    def _begun(self) -> bool:
        """Whether a run has written anything here; recipe.json alone is left by a call that failed before its first step."""
        return self.log.exists() or self.states.exists()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one run, so that a second run does not mix its files with this one's.

        The lock ends with the process, however it ends.

        Raises:
            UsageError: Another run holds the folder.
            OutputError: The folder cannot be written.
        """
        ensure_folder(self.path)
        file = self.path / ".lock"
        key = str(self.path.resolve())
        if key in _locked_here:
            raise _in_use(self.path, "this process")
        handle = _lock_file(file, self.path)
        _locked_here.add(key)
        try:
            yield
        finally:
            _locked_here.discard(key)
            if os.name == "nt":  # an open file cannot be removed there
                os.close(handle)
                file.unlink(missing_ok=True)
            else:  # removed while it is still locked: no other run can have locked it by then
                file.unlink(missing_ok=True)
                os.close(handle)

    def start(self, recipe: Recipe, data_facts: Mapping[str, Any], *, resume: bool) -> TrainingState | None:
        """Prepare the folder for a run of `recipe`.

        Args:
            recipe: The recipe, with its length in steps.
            data_facts: Fingerprint of the data (`Splits.facts`), compared with that of the state.
            resume: Whether to continue from the newest complete state.

        Returns:
            The state to continue from, None for step 0.

        Raises:
            UsageError: A run is here already and `resume` is false; or recipe, classes or data are not those of the state and
            the
                recipe does not `allow_change`.
            TrainingError: States are here, and none is complete.
        """
        before = self.recipe_to_resume() if self._begun else None
        if before is not None and not resume:
            raise UsageError(
                f"'{self.path}' already holds a run of '{before.name}'; add --resume to go on, or choose another --out."
            )
        ensure_folder(self.path)
        for file in (self.recipe_file, self.log, self.last, self.best, self.report, self.curves):
            remove_partial_files(file)
        state = self.state() if resume else None
        if state is not None:
            self._check_unchanged(before, recipe, state, data_facts)
        elif resume and saved_steps(self.states):
            raise TrainingError(
                f"None of the states in '{self.states}' is whole; restore one, or remove that folder to begin at step 0 again."
            )
        self.write_json(self.recipe_file, replace(recipe, allow_change=False).to_dict())
        if resume:
            logger.info(
                f"resume: going on after step {state.step}"
                if state
                else "resume: no state is saved here yet; starting at step 0"
            )
        return state

    def _check_unchanged(
        self, before: Recipe | None, recipe: Recipe, state: TrainingState, data_facts: Mapping[str, Any]
    ) -> None:
        changes = before.differences(recipe) if before else []
        if not changes and state.facts.get("recipe_sha256") != recipe.digest():
            changes.append(f"the state of step {state.step} is that of another recipe")
        if state.facts.get("data_sha256") != data_facts["data_sha256"]:
            changes.append("the list of training images")
        elif state.facts.get("data_contents_sha256", "") not in ("", data_facts.get("data_contents_sha256")):
            changes.append("the files of the training or validation images or masks")
        old, new = self._classes_of(state), list(data_facts.get("classes", ()))
        if old is not None and old != new:
            changes.append(f"classes: {', '.join(old)} -> {', '.join(new)}")
        if changes and not recipe.allow_change:
            raise UsageError(
                f"This run cannot be resumed as it is, because recipe or data were changed ({'; '.join(changes)}); "
                "undo that, choose another --out, or add --set allow_change=true to go on nevertheless."
            )
        if changes:
            logger.warning(f"resume: going on although recipe or data were changed ({'; '.join(changes)})")

    def _classes_of(self, state: TrainingState) -> list[str] | None:
        """Return the class names that a state was trained with; states of older versions leave them to the weights file."""
        if "classes" in state.facts:
            return list(state.facts["classes"])
        try:
            classes = read_checkpoint(self.last).classes
            return None if classes is None else list(classes)
        except WeightsError:
            return None

    def state(self, step: int | None = None) -> TrainingState | None:
        """Return the newest complete state, or that of `step`; None without one."""
        return load_state(self.states, step)

    def holds_weights(self, path: Path, step: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether a weights file is readable and, where it is of `step`, holds exactly these tensors."""
        try:
            found = read_checkpoint(path, dtype=None)
        except WeightsError:
            return False
        if found.source.get("step") != step:
            return True
        return all(name in found.state_dict and torch.equal(found.state_dict[name], one) for name, one in tensors.items())

    def resume_advice(self, failed: int) -> str:
        """Return a sentence that says which state to resume from after step `failed` became non-finite."""
        saved = saved_steps(self.states)
        good = next((step for step in saved if step < failed), None)
        if not saved:
            return "No state was saved before."
        if saved[0] < failed:
            return f"The last good state is that of step {good}, in '{self.states}'."
        rest = f"remove it to go on from that of step {good}" if good else "there is none before it, so start again"
        return f"The state of step {saved[0]}, in '{self.states}', leads straight to this; {rest}."

    def save(self, state: TrainingState) -> None:
        """Write a state to resume from; the state of the best score so far is kept, however old."""
        save_state(self.states, state, best=state.facts["best"]["step"])

    def write_json(self, path: Path, values: Mapping[str, Any]) -> None:
        """Write plain values to a file of the folder, atomically and flushed to the disk."""
        text = json.dumps(values, indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()), durable=True)


# The lock of a run's folder: a POSIX record lock, which belongs to the process. `flock` (and so the filelock package) would be
# inherited by forked data loader workers, which outlive a killed run by seconds and would keep `--resume` out.

_locked_here: set[str] = set()
"""Folders locked by this process, whose threads a record lock does not keep apart."""


def _lock_file(file: Path, folder: Path) -> int:
    """Open and lock `file`, and return its handle; raises UsageError where another process holds it."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"Cannot write into '{folder}' ({error.strerror or error}); choose another place.") from None
        try:
            _lock_handle(handle)
        except OSError as error:
            if not isinstance(error, BlockingIOError | PermissionError):  # a file system without locks
                logger.warning(f"'{folder}' cannot be locked ({error.strerror or error}); do not start a second run there")
                return handle
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise _in_use(folder, holder) from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), file.stat()):  # else its holder removed it between our two calls
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        os.close(handle)


def _lock_handle(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, 1 << 20, os.SEEK_SET)  # beyond the text, which a locked range would keep others from reading
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _in_use(folder: Path, holder: str) -> UsageError:
    return UsageError(
        f"A run is being written to '{folder}' by {holder}; wait until it ends, stop it, or choose another --out."
    )
