"""What all commands share: the argument parser, common options, and `run`, which turns errors into exit codes.

A command is a module `deeplabzoo.cli.NAME` with `build_parser() -> Parser` and `main(argv) -> int`. It checks its arguments
before it imports torch. A wrong call (exit code 2), a failure (1) and a bug (a traceback) look the same in all commands.
"""

import argparse
import copy
import importlib
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from deeplabzoo.errors import DeepLabZooError, UsageError, did_you_mean
from deeplabzoo.files import write_atomically
from deeplabzoo.log import show_log

if TYPE_CHECKING:
    from deeplabzoo.models.deeplab import DeepLab

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells report it."""
STDOUT = "-"
"""Value of `--json` that means standard output."""
OUTPUT_STRIDES = (8, 16, 32)


class HelpFormatter(argparse.HelpFormatter):
    """Wraps text to the terminal and shows defaults; indented lines of an epilog are commands and stay copyable."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(line for block in text.strip().split("\n") for line in _fill_line(block, width))

    def _get_help_string(self, action: argparse.Action) -> str:
        return help_text(action)


def help_text(action: argparse.Action) -> str:
    """Return an argument's help with its default, where it has one that the text does not name itself."""
    text, default = action.help or "", action.default
    if default is None or default is False or default in ("", [], argparse.SUPPRESS) or "default" in text:
        return text
    values = default if isinstance(default, list | tuple) else [default]
    return f"{text} (default {' '.join(f'{one:g}' if isinstance(one, float) else str(one) for one in values)})"


def _fill_line(line: str, width: int) -> list[str]:
    """Wrap a line of prose at spaces; break a command before an option, with a backslash, so that it stays copyable."""
    if not line.startswith("  "):
        return textwrap.wrap(line, width, break_on_hyphens=False) or [""]
    lines, rest = [], line
    while len(rest) > width and (cut := rest.rfind(" --", 8, width - 2)) > 0:
        lines.append(f"{rest[:cut]} \\")
        rest = f"      {rest[cut + 1 :]}"
    return [*lines, rest]


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of ending the process, and names the nearest option for a typo.

    Abbreviated options are refused: they would change their meaning when a new option is added.

    Args:
        command: Name of the command, as in `python -m deeplabzoo.COMMAND`.
        description: What the command does, in one sentence.
        epilog: Paragraphs, one line each, and at the end examples, whose lines are indented by two spaces.
    """

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"python -m deeplabzoo.{command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with argparse's message as a sentence that points to the help."""
        raise UsageError(f"{message[:1].upper()}{message[1:].rstrip('.')}; see `{self.prog} --help`.")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; raises UsageError on a wrong call, with the nearest option for a misspelt one."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [flag for action in self._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]
            near = did_you_mean(unknown[0].split("=")[0], options, count=1) if unknown[0].startswith("-") else ""
            raise UsageError(f"Unknown argument {' '.join(unknown)!r}; see `{self.prog} --help`.{near}")
        return namespace

    def accept_old_spelling(self, old: str, flag: str) -> None:
        """Accept `old` as another spelling of the option `flag`, without showing it in the help."""
        alias = copy.copy(self._option_string_actions[flag])
        alias.option_strings, alias.help, alias.default, alias.required = [old], argparse.SUPPRESS, argparse.SUPPRESS, False
        self._add_action(alias)


def get_parser(command: str, *subcommand: str) -> Parser:
    """Return the parser of a command, or of one of its SUBCOMMANDS: what completion and docs/commands.md are written from."""
    parser: Parser = importlib.import_module(f"deeplabzoo.cli.{command}").build_parser(*subcommand)
    return parser


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, the same in every command that runs a model."""
    parser.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU) or a torch device such as cuda:1")


def add_backend_option(
    parser: Parser, default: str, *, backends: str = "torch, compiled, onnxruntime, openvino or auto"
) -> None:
    """Add `--backend`, the same in every command that runs an optimized model; `--engine` is its old spelling."""
    parser.add_argument("--backend", default=default, metavar="NAME", help=backends)
    parser.accept_old_spelling("--engine", "--backend")


def add_precision_option(parser: Parser) -> None:
    """Add `--precision` of the optimized model."""
    parser.add_argument("--precision", default="fp32", help="fp32, bf16, fp16 or int8, where backend and hardware support it")


def add_json_option(parser: Parser, what: str) -> None:
    """Add `--json FILE` for a command whose result is a report."""
    parser.add_argument("--json", metavar="FILE", help=f"write {what} as JSON; {STDOUT} for standard output")


def write_json(target: str, text: str) -> None:
    """Write JSON where `--json` says: to a file, whole or not at all, or for `-` to standard output; raises OutputError."""
    if target == STDOUT:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        write_atomically(Path(target), lambda file: file.write(text.encode()))


def load_named_model(model: str, weights: str | None) -> "DeepLab":
    """Return the model that MODEL and `--weights` name; see `deeplabzoo.hub.factory.load_named_model`."""
    from deeplabzoo.hub.factory import load_named_model as load  # here, because torch takes seconds to import

    return load(model, weights)


def require_at_least(minimum: int, options: Iterable[tuple[str, int | None]]) -> None:
    """Raise UsageError for an option below `minimum`; options are (name without dashes, value or None)."""
    for name, value in options:
        if value is not None and value < minimum:
            raise UsageError(f"--{name} must be at least {minimum}, not {value}.")


def run(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Return the exit code of `command(argv)`: errors raised on purpose become one line on stderr, bugs keep their traceback.

    Ctrl-C gives 130. A reader that closed the pipe early (`| head`) gives 1 without a message.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name that the console cannot show must not end the run
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
