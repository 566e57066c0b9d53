"""What `--resume` needs, on disk: whole or not there at all; the last two, and that of the best score.

Batches, rates and dropout are functions of the step, so a state is tensors (network, average, optimizer) and a few facts; it
needs no other file. Each state is a folder `step_00001000`, written under another name, flushed to the disk and then renamed: a
`kill -9`, or a power cut, at any moment leaves the older one. The number in the name says which is the newest, never a clock;
hashes say whether all files belong together. Safetensors and JSON only; nothing is unpickled.
"""

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

from deeplabzoo.errors import OutputError
from deeplabzoo.say import say
from deeplabzoo.zoo.checksum import sha256_of

_KEPT = 2
_NAME = re.compile(r"step_(\d{8,})")
_FACTS = "facts.json"


@dataclass(frozen=True)
class State:
    """A run after `step` updates."""

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """One file each, e.g. `net`, `average`, `optimizer`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: the recipe's digest, the network's configuration, the best score so far, the gradient scaler."""


def save_state(folder: Path, state: State, *, best: int | None = None) -> None:
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
            _flush(file)
            hashes[file.name] = sha256_of(file)
        (partial / _FACTS).write_text(json.dumps({"step": state.step, "sha256": hashes, "facts": dict(state.facts)}, indent=1))
        _flush(partial / _FACTS)
        if final.exists():
            final.rename(folder / f".gone_{state.step:08d}")
        partial.rename(final)
        _flush(folder)
        for older in (path for path in list(_states(folder))[_KEPT:] if _step(path) != best):
            older.rename(older.with_name(f".gone_{older.name[5:]}"))
        for gone in folder.glob(".gone_*"):
            shutil.rmtree(gone)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(
            f"The state of step {state.step} cannot be written to '{folder}' ({error}); "
            "make room there and go on with --resume."
        ) from error


def load_state(folder: Path) -> State | None:
    """Return the newest state that is whole, or None; one that is damaged is named and passed over."""
    for path in _states(folder):
        try:
            written = json.loads((path / _FACTS).read_text())
            for name, digest in written["sha256"].items():
                if sha256_of(path / name) != digest:
                    raise OSError(f"{name} is not the file that was written")
            tensors = {name.removesuffix(".safetensors"): _read(path / name) for name in written["sha256"]}
            return State(int(written["step"]), tensors, dict(written["facts"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            say(f"state: '{path.name}' is damaged ({error}); going back to the one before")
    return None


def steps_saved(folder: Path) -> list[int]:
    """Return the steps of the states that are here, whole or not, newest first."""
    return [_step(path) for path in _states(folder)]


def _states(folder: Path) -> Iterator[Path]:
    """Complete states, newest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    yield from sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:])


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file in memory of their own: the file is removed while the run goes on with them."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def _flush(path: Path) -> None:
    """Make the system write a file, or a folder's list of names, to the disk before anything refers to it."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
