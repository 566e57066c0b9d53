"""`python -m fuzz TARGET`: fuzzing until a target has had its share of processor time, in as many runs as that takes.

What was tried so far is kept in a folder, so that a run that was cut off, or that found a defect which is then fixed, is gone
on with. With DEEPLABZOO_RECORD=1 the sum is written to benchmarks/trust/fuzz_TARGET.json.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir

from trust_record import TrustRecord, write_record

from fuzz.progress import Run, runs_in, write_runs
from fuzz.targets import TARGETS

SECONDS = 1200.0
"""Processor time for each target."""
_HERE = Path(__file__).resolve().parent


def campaign(name: str, folder: Path, seconds: float) -> list[Run]:
    """Fuzz until all runs kept in `folder` add up to `seconds` of processor time; returns them."""
    if importlib.util.find_spec("atheris") is None:
        sys.exit("error: fuzzing by coverage takes atheris: pip install atheris (CPython 3.11 to 3.13 on Linux).")
    folder.mkdir(parents=True, exist_ok=True)
    while (left := seconds - sum(run.seconds for run in runs_in(folder))) > 0:
        before = len(runs_in(folder))
        with (folder / "log.txt").open("wb") as log:
            call = [sys.executable, "-m", "fuzz.driver", name, str(folder), str(left)]
            status = subprocess.run(call, cwd=_HERE.parent, env=_environment(), stderr=log, stdout=log, check=False).returncode
        _complete(name, folder, before, status)
    return runs_in(folder)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{_HERE.parent}{os.pathsep}{_HERE.parents[1]}"}


def _complete(name: str, folder: Path, before: int, status: int) -> None:
    """Add to the newest run what only this process sees: the edges reached, and the input at which a run died."""
    runs = runs_in(folder)
    log = (folder / "log.txt").read_text(errors="replace")
    if len(runs) == before:
        sys.exit(f"error: the run of '{name}' ended with status {status} before it began:\n{log[-2000:]}")
    edges = [int(found) for found in re.findall(r"cov: (\d+)", log)]
    runs[-1].edges = max(edges, default=0)
    if status != 0:
        input_file = folder / "scratch" / TARGETS[name].file_name
        (folder / f"defect_{before}_died").write_bytes(input_file.read_bytes())
        runs[-1].defects["process"] = f"ended the process with status {status}"
    write_runs(folder, runs)


def record(name: str, runs: Sequence[Run]) -> TrustRecord:
    """Return the record of all runs on a target."""
    defects = {where: what for run in runs for where, what in run.defects.items()}
    seconds = sum(run.seconds for run in runs)
    return TrustRecord(
        name=f"fuzz_{name}",
        area={"recipes": "training", "palettes": "images"}.get(name, "weights"),
        what=f"The reader of {name} was given inputs changed at random, guided by coverage, for {seconds / 60:.1f} minutes.",
        command=f"cd tests/trust && DEEPLABZOO_RECORD=1 python -m fuzz {name}",
        seconds=round(seconds, 1),
        inputs=sum(run.inputs for run in runs),
        details={
            "runs": len(runs),
            "seconds_wanted": SECONDS,
            "edges": max(run.edges for run in runs),
            "defects_found": len(defects),
            "defects_in_last_run": len(runs[-1].defects),
            "inputs_of_last_run": runs[-1].inputs,
            "seconds_of_last_run": round(runs[-1].seconds, 1),
            "places_of_defects": sorted(defects),
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz, print one line, and record it where that is asked for; the status is 1 where the last run broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor time of all runs together (default: 1200)")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: a temporary folder of the target's name)")
    arguments = parser.parse_args(argv)
    folder = arguments.folder or Path(gettempdir()) / "deeplabzoo_fuzz" / arguments.target
    runs = campaign(arguments.target, folder, arguments.seconds)
    found = record(arguments.target, runs)
    write_record(found)
    print(f"{found.name}: {found.inputs} inputs, {found.seconds} s of processor time, {dict(found.details)}")
    return 1 if runs[-1].defects else 0


if __name__ == "__main__":
    sys.exit(main())
