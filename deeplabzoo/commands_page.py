"""Write docs/commands.md from the commands' own parsers: `python -m deeplabzoo.commands_page [FILE]`."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from deeplabzoo.cli import COMMANDS, STATUSES, Parser, run
from deeplabzoo.output import write_atomically
from deeplabzoo.parsers import Command, Word, every_command

_HEAD = """\
# Commands

Written by `python -m deeplabzoo.commands_page` from the commands' parsers; do not edit. `deeplabzoo COMMAND …` and
`python -m deeplabzoo.COMMAND …` are the same.

What is asked for goes to stdout, what was done on the way to stderr. On a terminal tables are cut to its width and headings are
bold unless `NO_COLOR` is set; into a pipe or a file everything goes whole and plain, without a progress bar. `--json`, where a
command has it, is what a script should read. `deeplabzoo completion bash` (or zsh, fish) prints a script that completes
commands, options and model names.
"""


def commands_page() -> str:
    """Return the page as Markdown."""
    return "\n".join([_HEAD, *_statuses(), "", *_overview(), *(line for one in every_command() for line in _section(one))])


def page_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and write the page."""
    parser = Parser("commands_page", "Write the page of all commands.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/commands.md"), help="default: docs/commands.md")
    page = commands_page().encode()
    write_atomically(parser.parse_args(argv).file, lambda file: file.write(page))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(page_command, argv)


def _statuses() -> Iterator[str]:
    yield "## Exit status"
    yield ""
    yield "| status | meaning |"
    yield "|---|---|"
    yield from (f"| {status} | {meaning} |" for status, meaning in STATUSES.items())
    yield ""
    yield "A traceback is a bug of deeplabzoo, never an answer to a wrong call."


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
    words = [word for word in command.words if word.flags != ("-h", "--help")]
    if words:
        yield "| word | |"
        yield "|---|---|"
        yield from (f"| {_code(word)} | {_escaped(_explained(word))} |" for word in words)
        yield ""
    if command.examples:
        yield f"```\n{command.examples}\n```"
        yield ""


def _usage(command: Command) -> str:
    arguments = [f"[{word}]" if word.optional else str(word) for word in command.arguments]
    required = [str(word) for word in command.options if not word.optional]
    options = ["[OPTIONS]"] if any(word.optional for word in command.options) else []
    return " ".join(["deeplabzoo", command.name, *arguments, *required, *options, *(["ACTION …"] if command.actions else [])])


def _explained(word: Word) -> str:
    choices = f"one of {', '.join(word.choices)}" if word.choices and "|".join(word.choices) != word.metavar else ""
    return "; ".join(filter(None, (word.help, choices if choices and not _tells(word) else "")))


def _tells(word: Word) -> bool:
    """Whether the help names every choice by itself."""
    return all(choice in word.help for choice in word.choices)


def _code(word: Word) -> str:
    return f"`{str(word).replace('|', chr(92) + '|')}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
