"""The oldest libraries that pyproject.toml allows: `pip install $(python tests/trust/oldest.py)` installs exactly those."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
_TORCHVISION = {"2.6": "0.21"}
"""torch -> the torchvision of the same release, which timm imports and pyproject does not name."""


def oldest_versions() -> dict[str, str]:
    """Return the lower bound of every dependency, and the torchvision that belongs to the oldest torch."""
    lines = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    floors = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines)  # type: ignore[union-attr]
    return {**floors, "torchvision": _TORCHVISION[floors["torch"]]}


def installed_versions() -> dict[str, str]:
    """Return the versions that run now, of the same libraries."""
    return {name: version(name) for name in oldest_versions()}


def is_oldest(name: str, installed: str) -> bool:
    """Whether a version is the lower bound itself: 2.6.0+cpu is 2.6."""
    numbers, floor = (re.match(r"[\d.]+", one)[0].rstrip(".").split(".") for one in (installed, oldest_versions()[name]))  # type: ignore[index]
    return numbers[: len(floor)] == floor and not any(map(int, numbers[len(floor) :]))


if __name__ == "__main__":
    print(*(f"{name}=={floor}" for name, floor in oldest_versions().items()))
