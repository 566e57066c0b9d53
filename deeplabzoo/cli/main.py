"""The console script `deeplabzoo`: an overview of the commands, and their dispatch."""

import importlib
import sys
from collections.abc import Sequence

import deeplabzoo
from deeplabzoo.cli.commands import COMMANDS, GROUPS
from deeplabzoo.cli.formatting import bold
from deeplabzoo.cli.parser import run
from deeplabzoo.errors import UnknownNameError, UsageError, did_you_mean

# What a command prints for people: columns that fit the terminal, paragraphs that wrap, and bold only where it is wanted.
#
# Where the output is a pipe or a file nothing is cut and nothing is coloured, so that `grep` sees whole lines.


def _overview() -> str:
    """Return every command in its group, on one screen of 80 x 24."""
    grouped = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in COMMANDS if name not in grouped)
    width = max(map(len, COMMANDS))
    lines = []
    for group, names in {**GROUPS, "shell" if rest == ("completion",) else "more": rest}.items():
        listed = [name for name in names if name in COMMANDS]
        for name in listed:
            title = bold(f"{group:<8}") if name == listed[0] else " " * 8
            lines.append(f"{title} {name:<{width}}  {COMMANDS[name]}")
    return "\n".join(
        [
            f"deeplabzoo {deeplabzoo.__version__}: DeepLabV3 and DeepLabV3+ for PyTorch",
            "",
            "usage: deeplabzoo COMMAND ...    (or python -m deeplabzoo.COMMAND ...)",
            "       deeplabzoo COMMAND --help (options and examples)",
            "",
            *lines,
            "",
            "exit status: 0 done, 1 it failed, 2 a wrong call, 130 interrupted, 143 SIGTERM",
        ]
    )


def _dispatch(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        raise UsageError(f"No command given; expected one of {', '.join(COMMANDS)} (`deeplabzoo --help` lists them).")
    if words[0] == "help" and len(words) > 1:
        words = [words[1], "--help"]
    if words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"deeplabzoo {deeplabzoo.__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UnknownNameError(
            f"Unknown command {words[0]!r}; expected one of {', '.join(COMMANDS)}.{did_you_mean(words[0], COMMANDS)}"
        )
    command = importlib.import_module(f"deeplabzoo.cli.{words[0]}")
    return int(command.main(words[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script: `deeplabzoo COMMAND …`; returns the exit code."""
    return run(_dispatch, argv)
