"""What a soak run did, as a file: how many faults and inputs, what came through, how long, on what machine.

`pytest -m soak` with DEEPLABZOO_RECORD=1 writes benchmarks/trust/<name>.json; docs/trust.md takes its table from there.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.benchmark.record import conditions
from deeplabzoo.files import write_atomically

KIND = "deeplabzoo.trust/1"
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "trust"


@dataclass(frozen=True, kw_only=True)
class TrustRecord:
    """One soak run: of `faults` so many `survived`; every one of `inputs` was answered, or refused by one sentence."""

    name: str
    """Of the file: lower case, words joined by `_`."""
    area: str
    """As in the table: `weights`, `images`, `download`, `training`, `numbers`, `servers`."""
    what: str
    """What was done, in one sentence."""
    command: str
    """Repeats the run."""
    seconds: float
    """Wall-clock time of the run; for a fuzzer, processor time."""
    inputs: int = 0
    """Inputs tried."""
    faults: int = 0
    """Faults injected."""
    survived: int = 0
    """Faults after which the promise held."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further figures, each with its unit in its name."""


def write_record(record: TrustRecord) -> None:
    """Write the record with date, hardware, versions and commit where DEEPLABZOO_RECORD=1 asks for it."""
    if os.environ.get("DEEPLABZOO_RECORD") != "1":
        return
    values = {"kind": KIND, **dataclasses.asdict(record), **conditions(torch.device("cpu"))}
    text = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_atomically(FOLDER / f"{record.name}.json", lambda file: file.write(text.encode()))
