"""The recorded training benchmarks as tables: every number in them comes from a record, and a test holds it so."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deeplabzoo.benchmarking.training_settings import SIDES
from deeplabzoo.errors import UsageError

BLOCK = "training-table"
_HEADER = (
    "side",
    "images/s, end to end",
    "of torchvision's",
    "wait for data, ms a step",
    "step, ms",
    "peak memory, MB",
    "MB before the first step",
)


def records_table(folder: Path) -> str:
    """Return the tables of all records of a folder, in the order of their names; raises UsageError for what is no record."""
    files = sorted(folder.glob("*.json"))
    try:
        tables = [f"`{file.name}`: {record_table(json.loads(file.read_text(encoding='utf-8')))}" for file in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"A file in '{folder}' is not a record of training_step: {error!r}.") from None
    return "\n\n".join(tables) or "No run is recorded yet."


def record_table(record: dict[str, Any]) -> str:
    """Return one record: its conditions in a sentence, a line a side, the command that measures it again."""
    given, machine, versions = record["settings"], record["hardware"], record["versions"]
    where = machine.get("gpu") or machine["cpu"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "deeplabzoo"))
    conditions = (
        f"{record['model']} ({record['same_network']['parameters'] / 1e6:.2f} M parameters), batch {given['batch']}, "
        f"crop {given['crop']}, {given['workers']} workers, {where}, {_count(record['threads'], 'thread')}; "
        f"{given['rounds']} turns of {given['steps']} steps each; {libraries}; {record['date'][:10]}, "
        f"commit {_commit(record['commit'])}."
    )
    lines = [_line(_HEADER), _line(["---"] * len(_HEADER))]
    for name, title in SIDES.items():
        if name in record["sides"]:
            lines.append(_line([title, *_cells(record["sides"][name], record["against_torchvision"].get(name))]))
    return "\n".join([conditions, "", *lines, "", f"Again: `{record['command']}`"])


def _cells(side: dict[str, Any], ratio: dict[str, float] | None) -> list[str]:
    memory = side["memory"]
    return [
        _spread(side["images_per_s"], 2),
        _spread(ratio, 2) if ratio else "1",
        _spread(side["data_ms_per_step"], 0),
        _spread(side["step_ms"], 0),
        f"{memory['peak_bytes'] / 1e6:.0f}",
        f"{memory['before_bytes'] / 1e6:.0f}",
    ]


def _spread(values: dict[str, float], digits: int) -> str:
    """Return the median with the smallest and largest turn."""
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def _commit(text: str | None) -> str:
    commit, _, changes = (text or "unknown").partition(" ")
    return f"{commit[:12]} {changes}".strip()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
