"""Which source ran: what a report or record must say to be repeated."""

import subprocess
from pathlib import Path


def current_commit() -> str | None:
    """Return the commit of the checkout that runs, marked where tracked files differ from it; None outside a repository.

    Records do not count: the first of two runs writes one, and the second is still of that commit.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed below somebody else's repository
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude,glob)benchmarks/**/*.json")
        return git("rev-parse", "HEAD") + (" with changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
