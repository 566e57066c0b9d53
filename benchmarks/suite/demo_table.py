"""The recorded time from drop to answer of the demo's page, as a table; the browser test writes the record."""

from pathlib import Path

from deeplabzoo.benchmark.record import read_record

BLOCK = "demo-table"
FOLDER = "demo"
"""Its records lie in this folder below the others."""
TASK = "drop to answer"


def demo_table(folder: Path) -> str:
    """Return a line for each photo of each record; raises UsageError for a JSON file that is no record."""
    records = [read_record(path) for path in sorted(folder.glob("*.json"))]
    lines = ["| photo | model | drops | ms from drop to answer, median (quartiles) | where |", "|---|---|---|---|---|"]
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
    return "\n".join([*lines, "", *(f"Again: `{command}`" for command in commands)])
