"""Whoever builds a release gets the wheel that was published, byte for byte: nothing of the machine or the day is in it."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("deeplabzoo", "weights", "pyproject.toml", "README.md", "LICENSE")


def built(folder: Path, **environment: str) -> Path:
    """Build the wheel of a copy of the sources in a new process and return its path."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")],
        cwd=folder,
        env={**{name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def copied(folder: Path, *, mode: int, seconds: int) -> Path:
    """Copy the sources with these permissions and this time of change."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        os.utime(path, (seconds, seconds))
    return folder


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheels of two copies: other folders, times of change, permissions, time zones and seeds of hashing."""
    first = copied(tmp_path_factory.mktemp("one") / "src", mode=0o644, seconds=1_000_000_000)
    second = copied(tmp_path_factory.mktemp("another") / "deeper" / "tree", mode=0o600, seconds=1_700_000_000)
    return built(first, TZ="UTC", PYTHONHASHSEED="1"), built(second, TZ="Asia/Tokyo", PYTHONHASHSEED="2", LC_ALL="C")


def test_a_wheel_built_twice_is_the_same(twice: tuple[Path, Path]) -> None:
    """One SHA-256 for both: a release can be checked by building it."""
    one, another = (hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in twice)
    assert one == another
