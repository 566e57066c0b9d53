"""Write the tables of docs/trust.md: `python tests/trust/trust_page.py`, from records and the lists of defects."""

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trust_record import FOLDER, KIND

from deeplabzoo.files import write_atomically
from tools.docs.tables import replace_block

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "trust.md"
DEFECTS = HERE / "defects"
REASONS = HERE / "surviving_mutants.toml"
AREAS = {
    "weights": "weights files",
    "manifest": "manifests and settings",
    "images": "pictures and masks",
    "parsers": "parsers, by fuzzing",
    "download": "downloads",
    "training": "training",
    "numbers": "numbers",
    "servers": "threads and servers",
    "tests": "the tests themselves",
}
"""Areas of records in the order of the table, and what they are called there; others follow under their own names."""

Record = Mapping[str, Any]


def records() -> list[Record]:
    """Return every record of the folder, in the order of the table."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json"))]
    wrong = [one.get("name") for one in found if one.get("kind") != KIND]
    if wrong:
        raise SystemExit(f"{FOLDER} holds records of another kind: {wrong}.")
    areas = list(AREAS)
    return sorted(found, key=lambda one: (areas.index(one["area"]) if one["area"] in AREAS else len(areas), one["name"]))


def defects() -> list[dict[str, str]]:
    """Return every defect that was found, by area."""
    found = []
    for file in sorted(DEFECTS.glob("*.toml")):
        found += [{"area": file.stem, **one} for one in tomllib.loads(file.read_text(encoding="utf-8")).get("defect", ())]
    return found


def test_name(written: str) -> str:
    """Return a test as docs/promises.md would name it; a defect's file may name it from the root, from tests or from here."""
    file, _, function = written.partition("::")
    for folder in (HERE, HERE.parent, HERE.parents[1]):
        if (folder / file).is_file():
            return f"{(folder / file).relative_to(HERE.parent).as_posix()}::{function}"
    return written


@dataclass(frozen=True)
class Reason:
    """Why changes of a line may survive."""

    module: str
    was: str
    now: tuple[str, ...]
    """What the line may have become; nothing: anything, since tests cannot tell whatever stands there."""
    why: str

    def explains(self, module: str, mutant: Mapping[str, Any]) -> bool:
        """Whether this mutant of this module is meant."""
        return (module, mutant["was"]) == (self.module, self.was) and (not self.now or mutant["now"] in self.now)


def reasons() -> list[Reason]:
    """Return every reason that is on file."""
    listed = tomllib.loads(REASONS.read_text(encoding="utf-8")).get("mutant", ()) if REASONS.exists() else ()
    return [Reason(one["module"], one["was"], _several(one.get("now", ())), one["why"]) for one in listed]


def survivors() -> list[tuple[str, Mapping[str, Any]]]:
    """Return every recorded mutant that no test noticed, with its module."""
    found = [one for one in records() if one["name"].startswith("mutation_")]
    return [(one["name"].removeprefix("mutation_"), mutant) for one in found for mutant in one["details"]["surviving_mutants"]]


def _several(value: str | list[str] | tuple[()]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def blocks() -> dict[str, str]:
    """Return every table of the page by the name of its block."""
    found = records()
    return {
        "trust-table": "\n".join(_trust_table([one for one in found if one["name"] != "coverage"])),
        "defects-table": "\n".join(_defects_table()),
        "coverage-table": "\n".join(_coverage_table([one for one in found if one["name"] == "coverage"])),
        "mutants-table": "\n".join(_mutants_table()),
    }


def _trust_table(found: list[Record]) -> Iterator[str]:
    yield "| area | what was done | inputs tried | faults injected | survived | time | date, commit |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for one in found:
        inputs, faults, survived = (f"{one[key]:,}" if one[key] else "" for key in ("inputs", "faults", "survived"))
        where = f"{one['date'][:10]}, {(one['commit'] or 'unknown')[:7]}"
        what = f"{_cell(one['what'])} (`{_cell(one['command'])}`)"
        area, time = AREAS.get(one["area"], one["area"]), _time(one["seconds"])
        yield f"| {area} | {what} | {inputs} | {faults} | {survived} | {time} | {where} |"
    inputs, faults = (sum(one[key] for one in found) for key in ("inputs", "faults"))
    survived = sum(one["survived"] for one in found if one["faults"])
    yield f"| **all** | | {inputs:,} | {faults:,} | {survived:,} | {_time(sum(one['seconds'] for one in found))} | |"


def _defects_table() -> Iterator[str]:
    listed = defects()
    yield f"{len(listed)} defects were found and fixed; each has a test."
    yield ""
    yield "| area | what was wrong | what is done now | found by | test |"
    yield "| --- | --- | --- | --- | --- |"
    for one in listed:
        what, fixed, found_by = (_cell(one[key]) for key in ("what", "fixed", "found_by"))
        yield f"| {one['area']} | {what} | {fixed} | {found_by} | `{test_name(one['test'])}` |"


def _coverage_table(found: list[Record]) -> Iterator[str]:
    for one in found:
        details = one["details"]
        when = f"{one['date'][:10]} at {(one['commit'] or 'unknown')[:7]}"
        yield f"Measured {when}: {_cell(one['what'])} (`{_cell(one['command'])}`)."
        yield ""
        yield "| part | lines | covered | branches | covered |"
        yield "| --- | --- | --- | --- | --- |"
        for part, counts in details["parts"].items():
            lines, branches = _percent(counts, "lines"), _percent(counts, "branches")
            yield f"| `{part}` | {counts['lines']:,} | {lines} | {counts['branches']:,} | {branches} |"


def _mutants_table() -> Iterator[str]:
    """One row a line: what it became, and one reason; lines of several reasons have several rows."""
    yield "| module | line | survived as | why no test can notice |"
    yield "| --- | --- | --- | --- |"
    known, rows = reasons(), dict[tuple[str, str, str], list[str]]()
    for module, mutant in survivors():
        why = next((one.why for one in known if one.explains(module, mutant)), "not explained yet")
        rows.setdefault((module, mutant["was"], why), []).append(f"`{_cell(mutant['now'])}`")
    for (module, was, why), became in rows.items():
        yield f"| `{module}` | `{_cell(was)}` | {'<br>'.join(became)} | {_cell(why)} |"


def _percent(counts: Mapping[str, int], what: str) -> str:
    return f"{100 * counts[f'{what}_covered'] / counts[what]:.1f} %" if counts[what] else ""


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Write every block of the page."""
    for block, text in blocks().items():
        page = replace_block(PAGE, text, block).encode()
        write_atomically(PAGE, lambda file, page=page: file.write(page))  # type: ignore[misc]
    return 0


if __name__ == "__main__":
    sys.exit(main())
