"""The recorded time from dropping an image on the demo page to its result; the browser test writes the record."""

from pathlib import Path

from deeplabzoo.benchmark.record import read_record

BLOCK = "demo-table"
FOLDER = "demo"
"""Folder of its records below the others."""
TASK = "drop to answer"


def demo_table(folder: Path) -> str:
    """Return a line for each image of each record; raises UsageError for a JSON file that is not a record."""
    records = [read_record(path) for path in sorted(folder.glob("*.json"))]
    lines = ["| image | model | runs | ms from drop to result, median (quartiles) | machine |", "|---|---|---|---|---|"]
    for record in records:
        threads = f"{record.threads} thread{'' if record.threads == 1 else 's'}"
        where = f"{record.hardware['cpu']}, {threads}, torch {record.versions['torch']}, {record.date[:10]}"
        for row in record.rows:
            if row.task == TASK and row.ms and row.size:
                spread = f"{row.ms.median:.0f} ({row.ms.low:.0f} to {row.ms.high:.0f})"
                size = f"{row.size[1]} x {row.size[0]}"
                lines.append(f"| {row.note}, {size} | `{row.name}` | {row.pairs} | {spread} | {where} |")
    if len(lines) == 2:
        return "No run is recorded yet."
    commands = dict.fromkeys(record.command for record in records)
    return "\n".join([*lines, "", *(f"Reproduce: `{command}`" for command in commands)])
