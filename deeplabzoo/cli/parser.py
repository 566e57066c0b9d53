"""What every command shares: its argument parser, and `run`, which turns errors into one line and an exit code.

A command is a module `deeplabzoo.cli.<name>` with `main(argv) -> int`: it parses with `Parser` and works inside `run`, so that
a wrong call (exit code 2), work that failed (exit code 1) and a bug (a traceback) look the same in all commands.
"""

import argparse
import contextvars
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from deeplabzoo.errors import DeepLabZooError, UsageError, did_you_mean
from deeplabzoo.log import show_log

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells report it."""

_CAPTURE_PARSER = contextvars.ContextVar("_CAPTURE_PARSER", default=False)


class _ParserCaptured(BaseException):
    """Carries a command's parser to `get_parser`, past every handler of the command itself."""

    def __init__(self, parser: "Parser") -> None:
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of leaving the process, and names the nearest option for a typo.

    Abbreviated options are refused: they would change their meaning when a new option is added.
    """

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"python -m deeplabzoo.{command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with argparse's message as a sentence that points to the help."""
        raise UsageError(f"{message[:1].upper()}{message[1:].rstrip('.')}; see `{self.prog} --help`.")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; raises UsageError on a wrong call, with the nearest option when one is misspelt."""
        if _CAPTURE_PARSER.get():
            raise _ParserCaptured(self)
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            near = did_you_mean(unknown[0].split("=")[0], options, count=1) if unknown[0].startswith("-") else ""
            raise UsageError(f"Unknown argument {' '.join(unknown)!r}; see `{self.prog} --help`.{near}")
        return namespace


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, the same in every command that runs a network."""
    parser.add_argument(
        "--device", default="auto", help="auto (the default: cuda, mps or cpu, and says which), or a torch device"
    )


def run(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Return the exit status of `command(argv)`: errors raised on purpose become one line on stderr, bugs keep their traceback.

    Ctrl-C gives 130. A reader that closed the pipe early (`| head`) gives 1 without a word: what was left is not done.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name that the console cannot show must not end the work
    show_log()
    try:
        status = command(argv)
        sys.stdout.flush()
    except DeepLabZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except SystemExit as leaving:  # --help and --version
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it exits; let that go nowhere instead of printing an "ignored" exception.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    return status
