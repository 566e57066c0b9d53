"""Which lines and branches of the package the tests of CI run: `measure_coverage.py run`, then `loops`, then `report`.

Processes that tests start are measured, too. Machine code tells nobody which line it is at, so `loops` repeats the tests of
what numba compiles with these loops run by Python. `run` takes words for pytest and may be called several times, for a part of
the tests each; `report` adds all up, prints the parts, and with DEEPLABZOO_RECORD=1 writes benchmarks/trust/coverage.json. The
extra `trust` brings what it needs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from trust_record import TrustRecord, write_record

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "make coverage"
_RUNS = ROOT / ".coverage-runs.jsonl"
"""What each run took, until it is reported."""
_WHOLE = ("models", "zoo", "inference", "metrics", "train")
"""Parts whose lines are promised to be run, nine of ten at least."""
_LOOPS = [
    "tests/processing/test_postprocessing_numba.py",
    "tests/processing/test_postprocessing.py",
    "tests/evaluation/test_metrics.py",
    "tests/data/test_transforms.py",
    "-k",
]
_LOOPS.append("left_out or every_row or argmax_of or first_of_equal or finite or bytes or compiled_and or window or one_colour")
"""Tests of compiled loops on pictures that are small enough for Python."""


def run(words: list[str], **variables: str) -> int:
    """Run tests under coverage, with these variables set, and return pytest's status."""
    began = time.perf_counter()
    environment = os.environ | {"COVERAGE_FILE": str(ROOT / ".coverage"), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "coverage", "run", "-m", "pytest", "--timeout=3000", *words]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    with _RUNS.open("a") as file:
        file.write(json.dumps({"words": words, "seconds": time.perf_counter() - began, "status": status}) + "\n")
    return status


def report() -> int:
    """Add the runs up, print a table, and write the record."""
    subprocess.run([sys.executable, "-m", "coverage", "combine", "--quiet"], cwd=ROOT, check=True)
    answer = ROOT / ".coverage-report.json"
    subprocess.run([sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(answer)], cwd=ROOT, check=True)
    files = json.loads(answer.read_text())["files"]
    parts = _parts(files)
    for part, counts in parts.items():
        lines, branches = (100 * counts[f"{what}_covered"] / max(counts[what], 1) for what in ("lines", "branches"))
        print(f"{part:<22} {counts['lines']:>6} lines {lines:5.1f} %  {counts['branches']:>6} branches {branches:5.1f} %")
    runs = [json.loads(line) for line in _RUNS.read_text().splitlines()]
    write_record(
        TrustRecord(
            name="coverage",
            area="tests",
            what="lines and branches run by the tests of CI, in their own and in other processes",
            command=COMMAND,
            seconds=round(sum(one["seconds"] for one in runs), 1),
            details={
                "parts": parts,
                "least_covered_files": _least(files),
                "pytest": [{"words": " ".join(one["words"]), "status": one["status"]} for one in runs],
            },
        )
    )
    return 0


def _parts(files: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Return the sums of every folder of the package, those that a share is promised for first, and of all."""
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    for name, file in files.items():
        inside = name.split("deeplabzoo/", 1)[1]
        folder, has_folder, _ = inside.partition("/")
        part = folder if has_folder else "metrics" if inside == "metrics.py" else "commands and others"
        summary = file["summary"]
        counts = {
            "lines": summary["num_statements"],
            "lines_covered": summary["covered_lines"],
            "branches": summary["num_branches"],
            "branches_covered": summary["covered_branches"],
        }
        sums[part].update(counts)
        sums["all"].update(counts)
    order = [*_WHOLE, *sorted(sums.keys() - {*_WHOLE, "all"}), "all"]
    return {part: dict(sums[part]) for part in order}


def _least(files: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return the ten files of the promised parts of which the least is run, in percent of lines."""
    shares = {
        name.split("deeplabzoo/", 1)[1]: round(file["summary"]["percent_statements_covered"], 1) for name, file in files.items()
    }
    promised = {name: share for name, share in shares.items() if name.removesuffix(".py").split("/")[0] in _WHOLE}
    return dict(sorted(promised.items(), key=lambda item: item[1])[:10])


def main() -> int:
    """Run the tests, repeat those of loops, or report what the runs found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "loops", "report"))
    parser.add_argument("words", nargs=argparse.REMAINDER, help="for pytest: files, options")
    args = parser.parse_args()
    if args.action == "loops":
        return run(_LOOPS, NUMBA_DISABLE_JIT="1")
    return run(args.words) if args.action == "run" else report()


if __name__ == "__main__":
    sys.exit(main())
