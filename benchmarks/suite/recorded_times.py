"""Times from image to labels of released files, gathered from the records of one machine."""

from dataclasses import dataclass
from pathlib import Path

from deeplabzoo.benchmark.record import KIND, Record, read_record
from deeplabzoo.hub.manifest import WeightRow
from deeplabzoo.hub.registry import list_weights

_TASK = "image -> labels"
_SIDES_PX = (512, 513)
"""The sizes that the field measures at; they differ by less than machines do from run to run."""


@dataclass(frozen=True)
class Time:
    """The fastest way in which a file's network was run in float32."""

    ms: float
    """Median of one call, batch 1."""
    side: str
    """Engine and precision."""


@dataclass(frozen=True)
class Times:
    """What was recorded on one machine."""

    by_file: dict[str, Time]
    """`name.tag`, at the stride of its configuration -> time."""
    machine: str


def recorded_times(records: Path) -> Times | None:
    """Return the times on the machine of the newest record; None where nothing is recorded.

    Other processors, thread counts and versions of torch are left out: one chart shows one machine. Raises UsageError for a
    file that calls itself a record and is none.
    """
    files = [path for path in sorted(records.glob("**/*.json")) if KIND in path.read_text(encoding="utf-8")[:200]]
    timed = [one for one in map(read_record, files) if any(row.task == _TASK and row.ms for row in one.rows)]
    if not timed:
        return None
    newest = max(timed, key=lambda one: one.date)
    released = {row.name: row for row in list_weights() if row.default} | {row.full_name: row for row in list_weights()}
    found: dict[str, Time] = {}
    for record in timed:
        if _machine(record) == _machine(newest):
            _gather(record, released, found)
    return Times(found, f"{_where(newest)}, torch {newest.versions['torch']}")


def _gather(record: Record, released: dict[str, WeightRow], found: dict[str, Time]) -> None:
    """Keep the fastest time of each file."""
    for row in record.rows:
        if row.task != _TASK or row.ms is None or row.batch != 1 or row.name not in released or row.size is None:
            continue
        if "fp32" not in row.side:
            continue  # the figures of accuracy that stand beside the times are of float32
        name = released[row.name].full_name
        if set(row.size) <= set(_SIDES_PX) and (name not in found or row.ms.median < found[name].ms):
            found[name] = Time(row.ms.median, row.side)


def _machine(record: Record) -> tuple[str, str]:
    return _where(record), record.versions["torch"]


def _where(record: Record) -> str:
    gpu = record.hardware.get("gpu")
    return str(gpu) if gpu else f"{record.hardware['cpu']}, {record.threads} thread{'s' * (record.threads != 1)}"
