"""`python -m deeplabzoo.completion SHELL`: completion scripts for bash, zsh and fish.

They are generated from the commands' parsers; only model names are asked for at completion time. `iter_commands` is also what
docs/commands.md is written from. (shtab, the usual library for this, writes no scripts for fish.)
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import deeplabzoo
from deeplabzoo.cli.commands import COMMANDS, SUBCOMMANDS
from deeplabzoo.cli.parser import Parser, get_parser, help_text, run


@dataclass(frozen=True)
class Argument:
    """One option or argument of a command."""

    flags: tuple[str, ...]
    """Empty for a positional argument."""
    metavar: str
    """Name of the value; empty for a switch."""
    choices: tuple[str, ...]
    repeats: bool
    optional: bool
    help: str

    @property
    def is_model(self) -> bool:
        """Whether its value is the name of a model."""
        return self.metavar == "MODEL" or "--model" in self.flags

    def __str__(self) -> str:
        values = self.metavar + (" …" if self.repeats else "")
        return f"{', '.join(self.flags)} {values}".strip()


@dataclass(frozen=True)
class Command:
    """A command, an action of a command (`weights check`), or a subcommand (`benchmark --train`)."""

    name: str
    purpose: str
    all_arguments: tuple[Argument, ...]
    actions: tuple[str, ...]
    """Names of its actions, which `iter_commands` yields next."""
    subcommands: tuple[str, ...]
    """First arguments that select other options, which `iter_commands` yields next."""
    examples: str
    """Epilog of its help."""

    @property
    def options(self) -> tuple[Argument, ...]:
        """Arguments that begin with a dash."""
        return tuple(argument for argument in self.all_arguments if argument.flags)

    @property
    def positionals(self) -> tuple[Argument, ...]:
        """Positional arguments."""
        return tuple(argument for argument in self.all_arguments if not argument.flags)


def iter_commands(names: Sequence[str] = tuple(COMMANDS)) -> Iterator[Command]:
    """Yield the commands in their order, each followed by its actions and subcommands."""
    for name in names:
        yield from _walk_parser(name, get_parser(name), SUBCOMMANDS.get(name, ()))
        for subcommand in SUBCOMMANDS.get(name, ()):
            yield from _walk_parser(f"{name} {subcommand}", get_parser(name, subcommand))


def _walk_parser(name: str, parser: argparse.ArgumentParser, subcommands: tuple[str, ...] = ()) -> Iterator[Command]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    children = {key: one for action in nested for key, one in action.choices.items()}
    visible = [action for action in parser._actions if action not in nested and action.help != argparse.SUPPRESS]
    all_arguments = tuple(map(_argument, visible))
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
    text = help_text(action).replace("%%", "%")
    return Argument(tuple(action.option_strings), shown, choices, repeats, optional, text)


_EPILOG = """\
For new shells, add `source ~/.deeplabzoo.bash` to ~/.bashrc, or `source ~/.deeplabzoo.zsh` to ~/.zshrc after compinit.

examples, for the current shell:
  source <(deeplabzoo completion bash)
  deeplabzoo completion fish | source

examples, permanent:
  deeplabzoo completion bash > ~/.deeplabzoo.bash
  deeplabzoo completion zsh > ~/.deeplabzoo.zsh
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
function __deeplabzoo_at --description 'Whether the arguments before the cursor are those of this command'
    set -l words (commandline -opc)[2..-1]
    test (count $argv) -gt 0; or test (count $words) -eq 0; or return 1
    for index in (seq (count $argv))
        test "$words[$index]" = "$argv[$index]"; or return 1
    end
end
"""


def completion_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print the script; raises UsageError for an unsupported shell."""
    args = build_parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    head = f"# Completion of deeplabzoo {deeplabzoo.__version__}, written by `deeplabzoo completion {args.shell}`."
    print(_SHELLS[args.shell](head, tuple(iter_commands())), end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(completion_command, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    parser = Parser("completion", "Print a script that completes commands, options and model names in a shell.", _EPILOG)
    parser.add_argument("shell", choices=tuple(_SHELLS), metavar="SHELL", help="bash, zsh or fish")
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
    """Yield what completes the value of an option; a bare `return` leaves it to the shell, which completes files."""
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
    """Return the bash function, run by zsh's bashcompinit."""
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
    """Return the subcommands with a dash, or those without."""
    return [subcommand for subcommand in command.subcommands if subcommand.startswith("-") is flags]


def _flags(command: Command) -> Iterator[str]:
    for argument in command.options:
        yield from argument.flags


def _shell_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SHELLS: Mapping[str, Callable[[str, Sequence[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
