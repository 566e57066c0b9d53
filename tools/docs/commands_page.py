"""Write docs/commands.md from the commands' own parsers: `python -m tools.docs.commands_page [FILE]`."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from deeplabzoo.cli.commands import COMMANDS, EXIT_CODES
from deeplabzoo.cli.completion import Argument, Command, iter_commands
from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.files import write_atomically

_HEAD = """\
<!-- Written by `python -m tools.docs.commands_page` from the commands' parsers; do not edit. -->
# Commands

`deeplabzoo COMMAND …` and `python -m deeplabzoo.COMMAND …` are the same.

Results go to stdout, log lines to stderr. On a terminal tables are cut to its width and headings are bold unless `NO_COLOR` is
set; a pipe or a file gets whole, plain lines without a progress bar. Scripts should read `--json`, where a command has it.
`deeplabzoo completion bash` (or zsh, fish) prints a script that completes commands, options and model names.
"""


def commands_page() -> str:
    """Return the page as Markdown."""
    return "\n".join([_HEAD, *_exit_codes(), "", *_overview(), *(line for one in iter_commands() for line in _section(one))])


def page_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and write the page."""
    parser = Parser("commands_page", "Write the page of all commands.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/commands.md"), help="default: docs/commands.md")
    page = commands_page().encode()
    write_atomically(parser.parse_args(argv).file, lambda file: file.write(page))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(page_command, argv)


def _exit_codes() -> Iterator[str]:
    yield "## Exit codes"
    yield ""
    yield "| code | meaning |"
    yield "|---|---|"
    yield from (f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    yield ""
    yield "A traceback is a bug; please report it."


def _overview() -> Iterator[str]:
    yield "## All commands"
    yield ""
    yield "| command | |"
    yield "|---|---|"
    yield from (f"| [`{name}`](#{name}) | {line} |" for name, line in COMMANDS.items())
    yield ""


def _section(command: Command) -> Iterator[str]:
    yield f"{'###' if ' ' in command.name else '##'} {command.name}"
    yield ""
    yield command.purpose
    yield ""
    yield f"```\n{_usage(command)}\n```"
    yield ""
    arguments = [argument for argument in command.all_arguments if argument.flags != ("-h", "--help")]
    if arguments:
        yield "| argument | |"
        yield "|---|---|"
        yield from (f"| {_code(argument)} | {_escaped(_argument_help(argument))} |" for argument in arguments)
        yield ""
    if command.examples:
        yield f"```\n{command.examples}\n```"
        yield ""


def _usage(command: Command) -> str:
    arguments = [f"[{argument}]" if argument.optional else str(argument) for argument in command.positionals]
    required = [str(argument) for argument in command.options if not argument.optional]
    options = ["[OPTIONS]"] if any(argument.optional for argument in command.options) else []
    return " ".join(["deeplabzoo", command.name, *arguments, *required, *options, *(["ACTION …"] if command.actions else [])])


def _argument_help(argument: Argument) -> str:
    choices = (
        f"one of {', '.join(argument.choices)}" if argument.choices and "|".join(argument.choices) != argument.metavar else ""
    )
    return "; ".join(filter(None, (argument.help, choices if choices and not _lists_all_choices(argument) else "")))


def _lists_all_choices(argument: Argument) -> bool:
    """Whether the help names every choice."""
    return all(choice in argument.help for choice in argument.choices)


def _code(argument: Argument) -> str:
    return f"`{str(argument).replace('|', chr(92) + '|')}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
