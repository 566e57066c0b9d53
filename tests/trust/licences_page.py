"""Write the tables of docs/licences.md: `python tests/trust/licences_page.py`, from installed metadata and the manifest."""

import datetime
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dependencies import Dependency, described, direct, extras, light_install

from deeplabzoo.files import write_atomically
from deeplabzoo.hub.manifest import WeightRow, released
from tools.docs.tables import replace_block

PAGE = Path(__file__).resolve().parents[2] / "docs" / "licences.md"
DEPENDENCIES, WEIGHTS = "dependencies", "weights-licences"


def dependencies_block() -> str:
    """Return the tables of what is installed on this machine: the light install, and what the extras ask for."""
    today, light = datetime.datetime.now(datetime.UTC).date().isoformat(), light_install()
    asked = set(direct())
    machine = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    lines = [
        f"Read on {today} with {machine}. `pip install deeplabzoo` brings {len(light)} distributions, {len(asked)} of them",
        "asked for by deeplabzoo itself (bold):",
        "",
        *_table((light[name], name in asked, "") for name in (*sorted(asked), *sorted(light.keys() - asked))),
        "",
        "What the extras ask for besides:",
        "",
        *_table((dependency, False, ", ".join(names)) for dependency, names in _of_extras()),
    ]
    return "\n".join(lines)


def weights_block(rows: Sequence[WeightRow]) -> str:
    """Return one line for every released file: the file's licence, that of the code that made it, and the pictures' terms."""
    lines = ["| weights | the file | the code that made it | the pictures it learned from |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{row.full_name}` | {row.license.weights} | {row.license.code} | {row.license.data} |"
        for row in sorted(rows, key=lambda row: (row.data, row.full_name))
    ]
    return "\n".join(lines)


def _of_extras() -> Iterator[tuple[Dependency, list[str]]]:
    by_name: dict[str, list[str]] = {}
    for extra, names in extras().items():
        for name in names:
            by_name.setdefault(name, []).append(extra)
    for name, users in sorted(by_name.items()):
        try:
            yield described(name), users
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit(
                f"{name} is not installed, so nothing is known of its licence; install the extras first."
            ) from None


def _table(lines: Iterator[tuple[Dependency, bool, str]]) -> Iterator[str]:
    yield "| distribution | version | licence, as its metadata says | extra |"
    yield "| --- | --- | --- | --- |"
    for one, is_direct, extra in lines:
        name = f"**{one.name}**" if is_direct else one.name
        yield f"| {name} | {one.version} | {one.licence} | {extra} |"


def main() -> int:
    """Write both blocks of the page."""
    for block, text in ((DEPENDENCIES, dependencies_block()), (WEIGHTS, weights_block(released()))):
        page = replace_block(PAGE, text, block).encode()
        write_atomically(PAGE, lambda file, page=page: file.write(page))  # type: ignore[misc]
    return 0


if __name__ == "__main__":
    sys.exit(main())
