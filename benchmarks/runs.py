"""What was tried: `python -m benchmarks.runs add RUN_DIR --note TEXT`, then `python -m benchmarks.runs table --write FILE.md`.

A run's recipe and evaluations are copied from its folder into `benchmarks/runs/NAME.json`, also those of a run that was given
up, since a table of successes alone tells nobody what to avoid.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.errors import UsageError
from deeplabzoo.files import write_atomically
from tools.docs.tables import replace_block

FOLDER = Path(__file__).resolve().parent / "runs"
BLOCK = "runs-table"


def record(folder: Path, note: str) -> dict[str, Any]:
    """Return what a run's folder says of it; raises UsageError for a folder without a recipe or without an evaluation."""
    try:
        recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"'{folder}' cannot be read as a run's folder: {error}.") from None
    measured = [line for line in lines if line["kind"] == "evaluation"]
    if not measured:
        raise UsageError(f"The run in '{folder}' was never evaluated, so there is nothing to record.")
    kept = ("step", "train_loss", "loss", "miou", "pixel_accuracy", "per_class_iou", "images")
    finished = (folder / "report.json").is_file()
    return {
        "recipe": recipe,
        "note": note,
        "finished": finished,
        "evaluations": [{key: line[key] for key in kept if key in line} for line in measured],
    }


def table() -> str:
    """Return one line a recorded run: what it was, how far it went, and its mIoU on val in order."""
    lines = ["| run | what | steps | val mIoU % at step |", "|---|---|---|---|"]
    for file in sorted(FOLDER.glob("*.json")):
        kept = json.loads(file.read_text(encoding="utf-8"))
        figures = ", ".join(f"{100 * one['miou']:.2f} ({one['step']})" for one in kept["evaluations"])
        steps = str(kept["evaluations"][-1]["step"]) + ("" if kept["finished"] else ", given up")
        lines.append(f"| `{file.stem}` | {kept['note']} | {steps} | {figures} |")
    return "\n".join(lines)


def runs_command(argv: Sequence[str] | None = None) -> int:
    """Record a run, or write the table of all."""
    parser = Parser("runs", "Record training runs, and tabulate what was tried.")
    parser.prog = "python -m benchmarks.runs"
    actions = parser.add_subparsers(dest="action", required=True, metavar="add|table", parser_class=_Action)
    add = actions.add_parser("add", description="Copy a run's recipe and evaluations.")
    add.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    add.add_argument("--name", required=True, help="of the record")
    add.add_argument("--note", required=True, help="what was tried, in a few words")
    writes = actions.add_parser("table", description="Print the table, or fill it into documents.")
    writes.add_argument("--write", type=Path, nargs="+", metavar="DOCUMENT", help=f"documents with the block `{BLOCK}`")
    args = parser.parse_args(argv)
    if args.action == "add":
        text = json.dumps(record(args.run_dir, args.note), indent=1) + "\n"
        FOLDER.mkdir(exist_ok=True)
        write_atomically(FOLDER / f"{args.name}.json", lambda file: file.write(text.encode()))
        return 0
    if not args.write:
        print(table())
        return 0
    for document, content in {one: replace_block(one, table(), BLOCK) for one in args.write}.items():
        write_atomically(document, lambda file, content=content: file.write(content.encode()))  # type: ignore[misc]
    return 0


class _Action(Parser):
    """argparse makes an action's parser with keywords; ours takes two texts."""

    def __init__(self, prog: str, description: str, **_: Any) -> None:
        super().__init__(prog.removeprefix("python -m deeplabzoo."), description)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(runs_command, argv)


if __name__ == "__main__":
    sys.exit(main())
