"""The commit that reports and records name: of the package's own checkout, marked where its source is not that commit's."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deeplabzoo import git as git_module

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=Tester", "-c", "user.email=tester@example.invalid"]
    return subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def answer(root: Path) -> str:
    """Return what a checkout at `root` says of itself."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from git import current_commit; print(current_commit())"
    command = [sys.executable, "-c", code, str(root / "deeplabzoo")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "deeplabzoo").mkdir(parents=True)
    (root / "benchmarks").mkdir()
    shutil.copy(git_module.__file__, root / "deeplabzoo" / "git.py")
    (root / "benchmarks" / "speed.json").write_text("{}")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


def test_changed_source_is_marked_and_a_new_record_is_not(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert answer(repository) == head
    (repository / "benchmarks" / "speed.json").write_text('{"ms": 1}')
    (repository / "notes.txt").write_text("not tracked")
    assert answer(repository) == head
    source = repository / "deeplabzoo" / "git.py"
    source.write_text(source.read_text() + "\n")
    assert answer(repository) == f"{head} with changes"


def test_a_package_installed_below_somebody_elses_repository_has_no_commit(repository: Path) -> None:
    inner = repository / "site-packages"
    shutil.copytree(repository / "deeplabzoo", inner / "deeplabzoo")
    assert answer(inner) == "None"
