"""`python -m deeplabzoo.completion SHELL`: a script by which bash, zsh or fish complete commands, options and model names.

It is written from the commands' own parsers; only model names are asked for while one types.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import deeplabzoo
from deeplabzoo.cli.commands import COMMANDS, SUBCOMMANDS
from deeplabzoo.cli.parser import _CAPTURE_PARSER, Parser, _ParserCaptured, run

# The words that every command takes, as plain data: what completion scripts and docs/commands.md are written from.


@dataclass(frozen=True)
class Argument:
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
    all_arguments: tuple[Argument, ...]
    actions: tuple[str, ...]
    """Names of its actions; they follow as commands of their own."""
    subcommands: tuple[str, ...]
    """Words that may follow its name and make another command of it; these follow, too."""
    examples: str
    """What its help says behind the options."""

    @property
    def options(self) -> tuple[Argument, ...]:
        """Words that begin with a dash."""
        return tuple(argument for argument in self.all_arguments if argument.flags)

    @property
    def positionals(self) -> tuple[Argument, ...]:
        """Words told by their place."""
        return tuple(argument for argument in self.all_arguments if not argument.flags)


def iter_commands(names: Sequence[str] = tuple(COMMANDS)) -> Iterator[Command]:
    """Yield the commands in their order, each with its actions behind it."""
    for name in names:
        yield from _walk_parser(name, get_parser(name), SUBCOMMANDS.get(name, ()))
        for subcommand in SUBCOMMANDS.get(name, ()):
            yield from _walk_parser(f"{name} {subcommand}", get_parser(name, subcommand))


def _walk_parser(name: str, parser: argparse.ArgumentParser, subcommands: tuple[str, ...] = ()) -> Iterator[Command]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    children = {key: one for action in nested for key, one in action.choices.items()}
    all_arguments = tuple(_argument(action) for action in parser._actions if action not in nested)
    yield Command(name, parser.description or "", all_arguments, tuple(children), subcommands, (parser.epilog or "").strip())
    for key, child in children.items():
        yield from _walk_parser(f"{name} {key}", child)


def _argument(action: argparse.Action) -> Argument:
    choices = tuple(map(str, action.choices or ()))
    named = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar
    metavar = named or "|".join(choices) or action.dest.upper()
    several = isinstance(action.nargs, int) and action.nargs > 1
    repeats = action.nargs in ("+", "*") or (several and not isinstance(action.metavar, tuple))  # a tuple names each value
    optional = not action.required if action.option_strings else action.nargs in ("?", "*")
    shown = "" if action.nargs == 0 else metavar
    text = (action.help or "").replace("%%", "%")
    return Argument(tuple(action.option_strings), shown, choices, repeats, optional, text)


_EPILOG = """\
For this shell alone:
  source <(deeplabzoo completion bash)
  deeplabzoo completion fish | source

For good:
  deeplabzoo completion bash > ~/.local/share/bash-completion/completions/deeplabzoo
  deeplabzoo completion zsh > ~/.deeplabzoo.zsh     and in ~/.zshrc, after compinit: source ~/.deeplabzoo.zsh
  deeplabzoo completion fish > ~/.config/fish/completions/deeplabzoo.fish
"""

_BASH = """\
_deeplabzoo_models() {{
    COMPREPLY=($(compgen -W "$("${{COMP_WORDS[0]}}" list --names "$1*" 2>/dev/null)" -- "$1"))
}}

_deeplabzoo() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}" words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
        return
    fi
{actions}
    case "$command $before" in
{values}
    esac
    case "$command" in
{options}
    esac
    case "$current" in
        -*) COMPREPLY=($(compgen -W "$words" -- "$current")); return ;;
    esac
    case "$command" in
{arguments}
    esac
}}

complete -o default -F _deeplabzoo deeplabzoo
"""

_FISH_POSITION_FUNCTION = """\
function __deeplabzoo_at --description 'Whether the words before the cursor are those of this command'
    set -l words (commandline -opc)[2..-1]
    test (count $argv) -gt 0; or test (count $words) -eq 0; or return 1
    for index in (seq (count $argv))
        test "$words[$index]" = "$argv[$index]"; or return 1
    end
end
"""


def completion_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print the script; raises UsageError for a shell that there is no script for."""
    args = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    head = f"# Completion of deeplabzoo {deeplabzoo.__version__}, written by `deeplabzoo completion {args.shell}`."
    print(_SHELLS[args.shell](head, tuple(iter_commands())), end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 the call was wrong."""
    return run(completion_command, argv)


def _parser() -> Parser:
    parser = Parser("completion", "Print a script that completes commands, options and model names.", _EPILOG)
    parser.add_argument("shell", choices=tuple(_SHELLS), metavar="SHELL", help=", ".join(_SHELLS))
    return parser


def _bash(head: str, commands: Sequence[Command]) -> str:
    return f"{head}\n\n" + _BASH.format(
        commands=" ".join(COMMANDS),
        actions="\n".join(_bash_actions(commands)),
        values="\n".join(line for command in commands for line in _bash_values(command)),
        options="\n".join(
            f'        "{one.name}") words="{" ".join((*_flags(one), *_subcommands(one, flags=True)))}" ;;' for one in commands
        ),
        arguments="\n".join(line for command in commands for line in _bash_argument(command)),
    )


def _bash_actions(commands: Sequence[Command]) -> Iterator[str]:
    for command in commands:
        if command.actions:
            yield f'    if [ "$command" = {command.name} ] && [ "$COMP_CWORD" -eq 2 ]; then'
            yield f'        COMPREPLY=($(compgen -W "{" ".join(command.actions)} --help" -- "$current"))'
            yield "        return"
            yield "    fi"
            yield f'    [ "$command" = {command.name} ] && command="{command.name} ${{COMP_WORDS[2]}}"'
        for subcommand in command.subcommands:
            name = f"{command.name} {subcommand}"
            yield f'    [ "$COMP_CWORD" -gt 2 ] && [ "$command ${{COMP_WORDS[2]}}" = "{name}" ] && command="{name}"'


def _bash_values(command: Command) -> Iterator[str]:
    """Yield what completes the value behind an option; nothing but `return` leaves it to the shell: files."""
    for argument in command.options:
        if argument.metavar:
            cases = "|".join(f'"{command.name} {flag}"' for flag in argument.flags)
            yield f"        {cases}) {_bash_values_of(argument)}return ;;"


def _bash_argument(command: Command) -> Iterator[str]:
    found = next((_bash_values_of(argument) for argument in command.positionals if _bash_values_of(argument)), "")
    if first := _subcommands(command, flags=False):
        found += f'[ "$COMP_CWORD" -eq 2 ] && COMPREPLY+=($(compgen -W "{" ".join(first)}" -- "$current")); '
    if found:
        yield f'        "{command.name}") {found}return ;;'


def _bash_values_of(argument: Argument) -> str:
    if argument.is_model:
        return '_deeplabzoo_models "$current"; '
    return f'COMPREPLY=($(compgen -W "{" ".join(argument.choices)}" -- "$current")); ' if argument.choices else ""


def _zsh(head: str, commands: Sequence[Command]) -> str:
    """Return the bash function behind zsh's own layer for such functions."""
    return f"autoload -U +X bashcompinit && bashcompinit\n\n{_bash(head, commands)}"


def _fish(head: str, commands: Sequence[Command]) -> str:
    lines = [head, "", _FISH_POSITION_FUNCTION]
    lines += [
        f"complete -c deeplabzoo -n __deeplabzoo_at -f -a {name} -d {_shell_quote(line)}" for name, line in COMMANDS.items()
    ]
    purposes = {command.name: command.purpose for command in commands}
    for command in commands:
        elsewhere = "".join(f"; and not __deeplabzoo_at {command.name} {subcommand}" for subcommand in command.subcommands)
        start = f"complete -c deeplabzoo -n '__deeplabzoo_at {command.name}{elsewhere}'"
        for subcommand in command.subcommands:
            shown = f"-l {subcommand[2:]}" if subcommand.startswith("--") else f"-f -a {subcommand}"
            lines.append(f"{start} {shown} -d {_shell_quote(purposes[f'{command.name} {subcommand}'])}")
        if command.actions:
            lines.append(f"{start} -f -a {_shell_quote(' '.join(command.actions))}")
        for argument in command.all_arguments:
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in argument.flags)
            values = _fish_values_of(argument)
            if flags or values:
                lines.append(" ".join(filter(None, (start, flags, values, f"-d {_shell_quote(argument.help)}"))))
    return "\n".join(lines) + "\n"


def _fish_values_of(argument: Argument) -> str:
    if argument.is_model:
        words = "(deeplabzoo list --names (commandline -ct)'*' 2>/dev/null)"
    elif argument.choices:
        words = " ".join(argument.choices)
    else:
        return "-r" if argument.flags and argument.metavar else ""
    return f"{'-x ' if argument.flags else ''}-a {_shell_quote(words)}"


def _subcommands(command: Command, *, flags: bool) -> list[str]:
    """Return the words that make another command of this one: those with a dash, or those without."""
    return [subcommand for subcommand in command.subcommands if subcommand.startswith("-") is flags]


def _flags(command: Command) -> Iterator[str]:
    for argument in command.options:
        yield from argument.flags


def _shell_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SHELLS: Mapping[str, Callable[[str, Sequence[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def get_parser(command: str, *first: str) -> Parser:
    """Return the parser that a command would read its words with: what completion and docs/commands.md are written from.

    `first` is one of the command's FORMS, if it is asked for.
    """
    module = importlib.import_module(f"deeplabzoo.cli.{command}")
    with _capturing_parser():
        try:
            module.main(list(first))
        except _ParserCaptured as found:
            return found.parser
    raise RuntimeError(f"deeplabzoo.cli.{command} parses its words with something else than Parser")


@contextlib.contextmanager
def _capturing_parser() -> Iterator[None]:
    token = _CAPTURE_PARSER.set(True)
    try:
        yield
    finally:
        _CAPTURE_PARSER.reset(token)
