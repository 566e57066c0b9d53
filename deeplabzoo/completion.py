"""`python -m deeplabzoo.completion SHELL`: a script by which bash, zsh or fish complete commands, options and model names.

It is written from the commands' own parsers; only model names are asked for while one types.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import deeplabzoo
from deeplabzoo.cli import COMMANDS, Parser, run
from deeplabzoo.parsers import Command, Word, every_command

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

_FISH_PLACE = """\
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
    print(_SHELLS[args.shell](head, tuple(every_command())), end="")
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
            f'        "{one.name}") words="{" ".join((*_flags(one), *_forms(one, flags=True)))}" ;;' for one in commands
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
        for form in command.forms:
            name = f"{command.name} {form}"
            yield f'    [ "$COMP_CWORD" -gt 2 ] && [ "$command ${{COMP_WORDS[2]}}" = "{name}" ] && command="{name}"'


def _bash_values(command: Command) -> Iterator[str]:
    """Yield what completes the value behind an option; nothing but `return` leaves it to the shell: files."""
    for word in command.options:
        if word.metavar:
            cases = "|".join(f'"{command.name} {flag}"' for flag in word.flags)
            yield f"        {cases}) {_bash_words(word)}return ;;"


def _bash_argument(command: Command) -> Iterator[str]:
    found = next((_bash_words(word) for word in command.arguments if _bash_words(word)), "")
    if first := _forms(command, flags=False):
        found += f'[ "$COMP_CWORD" -eq 2 ] && COMPREPLY+=($(compgen -W "{" ".join(first)}" -- "$current")); '
    if found:
        yield f'        "{command.name}") {found}return ;;'


def _bash_words(word: Word) -> str:
    if word.is_model:
        return '_deeplabzoo_models "$current"; '
    return f'COMPREPLY=($(compgen -W "{" ".join(word.choices)}" -- "$current")); ' if word.choices else ""


def _zsh(head: str, commands: Sequence[Command]) -> str:
    """Return the bash function behind zsh's own layer for such functions."""
    return f"autoload -U +X bashcompinit && bashcompinit\n\n{_bash(head, commands)}"


def _fish(head: str, commands: Sequence[Command]) -> str:
    lines = [head, "", _FISH_PLACE]
    lines += [f"complete -c deeplabzoo -n __deeplabzoo_at -f -a {name} -d {_quoted(line)}" for name, line in COMMANDS.items()]
    purposes = {command.name: command.purpose for command in commands}
    for command in commands:
        elsewhere = "".join(f"; and not __deeplabzoo_at {command.name} {form}" for form in command.forms)
        start = f"complete -c deeplabzoo -n '__deeplabzoo_at {command.name}{elsewhere}'"
        for form in command.forms:
            shown = f"-l {form[2:]}" if form.startswith("--") else f"-f -a {form}"
            lines.append(f"{start} {shown} -d {_quoted(purposes[f'{command.name} {form}'])}")
        if command.actions:
            lines.append(f"{start} -f -a {_quoted(' '.join(command.actions))}")
        for word in command.words:
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in word.flags)
            values = _fish_words(word)
            if flags or values:
                lines.append(" ".join(filter(None, (start, flags, values, f"-d {_quoted(word.help)}"))))
    return "\n".join(lines) + "\n"


def _fish_words(word: Word) -> str:
    if word.is_model:
        words = "(deeplabzoo list --names (commandline -ct)'*' 2>/dev/null)"
    elif word.choices:
        words = " ".join(word.choices)
    else:
        return "-r" if word.flags and word.metavar else ""
    return f"{'-x ' if word.flags else ''}-a {_quoted(words)}"


def _forms(command: Command, *, flags: bool) -> list[str]:
    """Return the words that make another command of this one: those with a dash, or those without."""
    return [form for form in command.forms if form.startswith("-") is flags]


def _flags(command: Command) -> Iterator[str]:
    for word in command.options:
        yield from word.flags


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SHELLS: Mapping[str, Callable[[str, Sequence[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}


if __name__ == "__main__":
    sys.exit(main())
