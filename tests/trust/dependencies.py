"""What an install brings along, read from the metadata of what is installed here: names, versions, licences, who needs whom."""

import importlib.metadata
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "deeplabzoo"
UNSTATED = "not stated in its metadata"

_PROJECT: dict[str, Any] = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]

_SPDX = {
    "Apache Software License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache": "Apache-2.0",
    "BSD License": "BSD",
    "BSD 3-Clause License": "BSD-3-Clause",
    "BSD-3-Clause License": "BSD-3-Clause",
    "MIT License": "MIT",
    "The Unlicense (Unlicense)": "Unlicense",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "ISC License (ISCL)": "ISC",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA-Proprietary",
    "Other/Proprietary License": "LicenseRef-Proprietary",
}
"""How metadata of before PEP 639 names licences, and what SPDX calls them."""


@dataclass(frozen=True)
class Dependency:
    """One distribution of the install."""

    name: str
    version: str
    licence: str
    """An SPDX expression where the metadata allows to tell it."""
    requires: tuple[str, ...]
    """Canonical names of what it needs itself, of those that are installed."""


def light_install() -> dict[str, Dependency]:
    """Return what `pip install deeplabzoo` brings on this machine, by canonical name; deeplabzoo itself is left out."""
    found: dict[str, Dependency] = {}
    waiting = [Requirement(line) for line in _PROJECT["dependencies"]]
    while waiting:
        wanted = waiting.pop(0)
        name = canonicalize_name(wanted.name)
        needed = [one for one in _required(name, wanted.extras) if _is_installed(one.name)]
        before = found[name].requires if name in found else ()
        requires = tuple(sorted({*before, *(canonicalize_name(one.name) for one in needed)}))
        if name not in found or requires != before:
            found[name] = described(name, requires)
            waiting += needed
    return found


def direct() -> tuple[str, ...]:
    """Return the canonical names of what pyproject.toml asks for, in its order."""
    return tuple(canonicalize_name(Requirement(line).name) for line in _PROJECT["dependencies"])


def extras() -> dict[str, tuple[str, ...]]:
    """Return the direct requirements of every extra of pyproject.toml, by canonical name, without extras within extras."""
    return {
        extra: tuple(canonicalize_name(name) for line in lines if (name := Requirement(line).name) != ROOT)
        for extra, lines in _PROJECT["optional-dependencies"].items()
    }


def described(name: str, requires: tuple[str, ...] = ()) -> Dependency:
    """Return what the metadata of an installed distribution says; raises PackageNotFoundError."""
    found = importlib.metadata.distribution(name)
    return Dependency(canonicalize_name(found.metadata["Name"]), found.version, _licence(found.metadata), requires)


def _required(name: str, extras: Iterable[str]) -> Iterator[Requirement]:
    """Yield what a distribution needs on this machine with these extras."""
    for line in importlib.metadata.requires(name) or ():
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield requirement


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _licence(metadata: importlib.metadata.PackageMetadata) -> str:
    """SPDX as PEP 639 has it, else the classifiers', else a short licence field."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or () if line.startswith("License :: ")]
    named = sorted({_SPDX.get(one, one) for one in classifiers if one not in ("OSI Approved", "DFSG approved")})
    if named:
        return " AND ".join(named)
    field = re.sub(r"\s+", " ", metadata.get("License") or "").strip()
    return _SPDX.get(field, field) if field and len(field) < 60 else UNSTATED
