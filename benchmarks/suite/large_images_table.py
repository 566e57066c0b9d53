"""The records of `python -m benchmarks.suite scaling` and `seams` as tables; every number comes from a record."""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.suite import scaling, tile_seams
from deeplabzoo.benchmark.record import Record, Row, read_record

FOLDER = "large_images"
"""Folder of their records below the others."""
SCALING_BLOCK, SEAMS_BLOCK = "scaling-table", "seams-table"
_SCALING = ("megapixels", "side", "tiles", "seconds, file to file", "peak MB above the loaded model", "loaded MB")
_SEAMS = ("image", "inference", "labels equal to whole image", "differ near a seam", "differ elsewhere", "mIoU")


def large_images_tables(folder: Path) -> dict[str, str]:
    """Return the tables of all records of a folder by block; raises UsageError for a JSON file that is not a record."""
    records = [read_record(path) for path in sorted(folder.glob("*.json"))]
    return {
        SCALING_BLOCK: _table(records, scaling.TASK, _SCALING, _scaling_cells),
        SEAMS_BLOCK: _table(records, tile_seams.TASK, _SEAMS, _seams_cells),
    }


def _table(records: Sequence[Record], task: str, header: tuple[str, ...], cells: Callable[[Row], tuple[str, ...]]) -> str:
    parts = []
    for record in records:
        rows = [row for row in record.rows if row.task == task]
        if not rows:
            continue
        lines = [_line(header), _line(["---"] * len(header)), *(_line(cells(row)) for row in rows)]
        notes = [f"- {note}" for note in dict.fromkeys(row.note for row in rows if row.note)]
        parts.append(
            "\n".join([_conditions(record), "", *lines, "", *notes, *([""] if notes else []), _reproduce_note(record)])
        )
    return "\n\n".join(parts) or "No run is recorded yet."


def _conditions(record: Record) -> str:
    name = record.rows[0].name.partition(",")[0]
    where = record.hardware.get("gpu") or record.hardware["cpu"]
    threads = f"{record.threads} thread{'' if record.threads == 1 else 's'}"
    commit, _, changes = (record.commit or "unknown").partition(" ")
    made = f"{commit[:12]} {changes}".strip()
    return f"{name}, {where}, {threads}; torch {record.versions['torch']}, {record.date[:10]}, commit {made}."


def _reproduce_note(record: Record) -> str:
    return f"Reproduce: `{record.command}`"


def _scaling_cells(row: Row) -> tuple[str, ...]:
    figures, (height, width) = row.figures, row.size or (0, 0)
    seconds = figures["seconds"]
    return (
        f"{figures['megapixels']:.4g}",
        f"{height} x {width}",
        f"{figures['tiles']:.0f}",
        f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}",
        f"{figures['peak_mb']:.0f}",
        f"{figures['loaded_mb']:.0f}",
    )


def _seams_cells(row: Row) -> tuple[str, ...]:
    _, _, image = row.name.partition(", ")
    size = f"{row.size[0]} x {row.size[1]}" if row.size else ""
    shares = (row.agreement, row.figures.get("apart_near_seams"), row.figures.get("apart_elsewhere"), row.figures.get("miou"))
    cells = ("" if share is None else f"{100 * share:.2f} %" for share in shares)
    return (f"{image or 'mosaics'}, {size}", row.side, *cells)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
