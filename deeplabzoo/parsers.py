"""The words that every command takes, as plain data: what completion scripts and docs/commands.md are written from."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deeplabzoo.cli import COMMANDS, FORMS, parser_of


@dataclass(frozen=True)
class Word:
    """One option or argument of a command."""

    flags: tuple[str, ...]
    """Empty for an argument that is told by its place."""
    metavar: str
    """What the value is called; empty for a switch."""
    choices: tuple[str, ...]
    repeats: bool
    optional: bool
    help: str

    @property
    def is_model(self) -> bool:
        """Whether its value is a name of the zoo."""
        return self.metavar == "MODEL" or "--model" in self.flags

    def __str__(self) -> str:
        values = self.metavar + (" …" if self.repeats else "")
        return f"{', '.join(self.flags)} {values}".strip()


@dataclass(frozen=True)
class Command:
    """One command, one action of a command that has several, or one other form of a command."""

    name: str
    """E.g. `predict`, `weights check`, `benchmark --train`."""
    purpose: str
    words: tuple[Word, ...]
    actions: tuple[str, ...]
    """Names of its actions; they follow as commands of their own."""
    forms: tuple[str, ...]
    """Words that may follow its name and make another command of it; these follow, too."""
    examples: str
    """What its help says behind the options."""

    @property
    def options(self) -> tuple[Word, ...]:
        """Words that begin with a dash."""
        return tuple(word for word in self.words if word.flags)

    @property
    def arguments(self) -> tuple[Word, ...]:
        """Words told by their place."""
        return tuple(word for word in self.words if not word.flags)


def every_command(names: Sequence[str] = tuple(COMMANDS)) -> Iterator[Command]:
    """Yield the commands in their order, each with its actions behind it."""
    for name in names:
        yield from _described(name, parser_of(name), FORMS.get(name, ()))
        for form in FORMS.get(name, ()):
            yield from _described(f"{name} {form}", parser_of(name, form))


def _described(name: str, parser: argparse.ArgumentParser, forms: tuple[str, ...] = ()) -> Iterator[Command]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    children = {key: one for action in nested for key, one in action.choices.items()}
    words = tuple(_word(action) for action in parser._actions if action not in nested)
    yield Command(name, parser.description or "", words, tuple(children), forms, (parser.epilog or "").strip())
    for key, child in children.items():
        yield from _described(f"{name} {key}", child)


def _word(action: argparse.Action) -> Word:
    choices = tuple(map(str, action.choices or ()))
    named = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar
    metavar = named or "|".join(choices) or action.dest.upper()
    several = isinstance(action.nargs, int) and action.nargs > 1
    repeats = action.nargs in ("+", "*") or (several and not isinstance(action.metavar, tuple))  # a tuple names each value
    optional = not action.required if action.option_strings else action.nargs in ("?", "*")
    shown = "" if action.nargs == 0 else metavar
    text = (action.help or "").replace("%%", "%")
    return Word(tuple(action.option_strings), shown, choices, repeats, optional, text)
