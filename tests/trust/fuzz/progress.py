"""What the runs on one target did so far, as a file: one entry a run."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Run:
    """One process that tried inputs."""

    inputs: int = 0
    seconds: float = 0.0
    """Of processor time, from the first input on."""
    defects: dict[str, str] = field(default_factory=dict)
    """Place -> the promise that was broken there."""
    edges: int = 0
    """Branches of the package reached, as atheris counts them; 0 while the run goes on."""


def runs_in(folder: Path) -> list[Run]:
    """Return the runs that are kept in a folder, the newest last."""
    file = folder / "progress.json"
    return [Run(**run) for run in json.loads(file.read_text())] if file.exists() else []


def write_runs(folder: Path, runs: Sequence[Run]) -> None:
    """Keep the runs, whole whenever it is interrupted."""
    (folder / "progress.new").write_text(json.dumps([dataclasses.asdict(run) for run in runs], indent=1))
    os.replace(folder / "progress.new", folder / "progress.json")
