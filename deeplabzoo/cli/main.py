"""The console script `deeplabzoo`: an overview of the commands, and their dispatch."""

import importlib
import sys
from collections.abc import Sequence

import deeplabzoo
from deeplabzoo.cli.commands import COMMANDS, GROUPS
from deeplabzoo.cli.formatting import bold
from deeplabzoo.cli.parser import run
from deeplabzoo.errors import UnknownNameError, did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script: `deeplabzoo COMMAND …`; returns the exit code."""
    return run(_dispatch, argv)


def _dispatch(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"deeplabzoo {deeplabzoo.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise UnknownNameError(
            f"Unknown command {arguments[0]!r}; expected one of {', '.join(COMMANDS)}.{did_you_mean(arguments[0], COMMANDS)}"
        )
    command = importlib.import_module(f"deeplabzoo.cli.{arguments[0]}")
    return int(command.main(arguments[1:]))


def _overview() -> str:
    """Return every command in its group, on one screen of 80 x 24."""
    width = max(map(len, COMMANDS))
    lines = []
    for group, names in GROUPS.items():
        for name in names:
            title = bold(f"{group:<8}") if name == names[0] else " " * 8
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
            "exit codes: 0 success, 1 failure, 2 usage, 130 interrupted, 143 SIGTERM",
        ]
    )
