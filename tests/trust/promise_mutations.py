"""Whether the test named for a promise notices that the promise is broken: `make promises`.

promise_mutations.toml lists wrong changes: a promise's test, a file of the package, a text in it and what replaces it. For
each, the package is copied and changed, and the named test alone is run with the copy: it must fail.
`python tests/trust/promise_mutations.py [PATTERN]` runs those whose test matches; CI checks only that each text is still there
and that each promise is listed.
"""

import fnmatch
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("promise_mutations.toml")
TIMEOUT_S = 900


@dataclass(frozen=True)
class Mutation:
    """One wrong change and the test that must notice it."""

    test: str
    """As docs/promises.md names it: `folder/test_file.py::test_name`."""
    file: str
    """Relative to the repository."""
    old: str
    """Occurs exactly once in the file."""
    new: str

    def apply(self, root: Path) -> None:
        """Change the file in a copy of the repository."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} holds the text of the mutation for {self.test} {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def mutations() -> list[Mutation]:
    """Return the list."""
    return [Mutation(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8"))["mutation"]]


def is_noticed(mutation: Mutation) -> tuple[bool, str]:
    """Return whether the named test fails on the changed package, and the end of pytest's output."""
    with tempfile.TemporaryDirectory(prefix="promise_") as folder:
        copy = Path(folder) / "repository"
        kept = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "site", "build", "dist", "venv")
        shutil.copytree(ROOT, copy, ignore=kept)
        mutation.apply(copy)
        test = mutation.test if mutation.test.startswith("benchmarks/") else f"tests/{mutation.test}"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", test]
        done = subprocess.run(
            command,
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    # 1: a test failed; 2 (interrupted, e.g. an import error) and 4 (no such test) prove nothing about the promise
    return done.returncode == 1, done.stdout[-600:]


def main(patterns: list[str]) -> int:
    """Run the matching mutations; returns 1 if one is not noticed."""
    chosen = [one for one in mutations() if not patterns or any(fnmatch.fnmatch(one.test, f"*{p}*") for p in patterns)]
    unnoticed = 0
    for mutation in chosen:
        noticed, output = is_noticed(mutation)
        unnoticed += not noticed
        print(f"{'noticed  ' if noticed else 'UNNOTICED'} {mutation.test}  ({mutation.file})", flush=True)
        if not noticed:
            print(output, flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} broken promises are noticed by their own test.")
    return min(unnoticed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
