"""The console script and what all commands share: lists, refuses, and leaves in one way."""

import argparse
import contextlib
import importlib
import io
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deeplabzoo
from deeplabzoo.cli import completion
from deeplabzoo.cli.commands import COMMANDS, EXIT_CODES, GROUPS, SUBCOMMANDS
from deeplabzoo.cli.completion import iter_commands
from deeplabzoo.cli.main import main
from deeplabzoo.cli.parser import Parser, get_parser, help_text, load_named_model, run
from deeplabzoo.errors import DeepLabZooError, UsageError, WeightsError
from deeplabzoo.training.signals import StopRequest
from tools.docs.commands_page import commands_page


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_every_command_is_listed_in_one_line(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The table is the whole truth about what there is."""
    assert main([word]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in COMMANDS.items():
        assert any(f" {name} " in one[8:] and one.endswith(f"  {line}") for one in lines)


def test_the_overview_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """24 lines of 80 columns; each command once, in its group; the exit statuses below."""
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    listed = [line[9:].split()[0] for line in lines[5:-2]]
    assert sorted(listed) == sorted(COMMANDS)
    assert [line[:8].strip() for line in lines[5:-2] if line[:8].strip()] == list(GROUPS)
    assert all(f"{status} " in lines[-1] for status in EXIT_CODES)


def test_groups_name_commands_once() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)


def test_help_of_a_command_by_two_ways() -> None:
    """`deeplabzoo help list` is `deeplabzoo list --help`."""
    assert console("help", "list").stdout == console("list", "--help").stdout != ""


def test_the_commands_page_matches_the_parsers() -> None:
    """`python -m tools.docs.commands_page` leaves docs/commands.md unchanged."""
    assert commands_page() == (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text()


def test_every_exit_status_is_one_that_the_page_names(capsys: pytest.CaptureFixture[str]) -> None:
    """0, 1, 2, 130 and 143 are all that a command can leave with, apart from a bug."""

    def interrupted(argv: object) -> int:
        raise KeyboardInterrupt

    own = {DeepLabZooError.exit_status, UsageError.exit_status, StopRequest().stop_error("").exit_status}
    assert {run(lambda argv: 0), run(interrupted), *own} == set(EXIT_CODES)
    assert capsys.readouterr().err == "interrupted\n"


BASH = """
source "$1"
shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_deeplabzoo
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completion_script(shell: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert completion.main([shell]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("completion") / "deeplabzoo.bash"
    script.write_text(completion_script("bash"))
    return script


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["li"], ["list"]),
        (["predict", "--ove"], ["--overlay", "--overlap", "--overwrite"]),
        (["list", "--sort", "p"], ["params"]),
        (["weights", "ch"], ["check"]),
        (["weights", "check", "--do"], ["--download"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["benchmark", "--tr"], ["--train"]),
        (["weights", "record", "--"], ["--help"]),
        (["predict", "--engi"], [""]),
        (["benchmark", "--train", "--cr"], ["--crop"]),
        (["predict", "--out", "a"], [""]),
    ],
)
def test_bash_completes_from_the_parsers(bash_script: Path, words: list[str], expected: list[str]) -> None:
    """Commands, actions, options and choices; an option's file is left to the shell."""
    called = ["bash", "--norc", "-c", BASH, "bash", str(bash_script), "deeplabzoo", *words]
    done = subprocess.run(called, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected
    assert done.stderr == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_names_of_models(bash_script: Path, tmp_path: Path) -> None:
    """They are asked for while one types, so that new weights need no new script."""
    program = tmp_path / "deeplabzoo"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m deeplabzoo "$@"\n')
    program.chmod(0o755)
    called = ["bash", "--norc", "-c", BASH, "bash", str(bash_script), str(program), "info", "deeplabv3_resnet50_v"]
    assert subprocess.run(called, capture_output=True, text=True, check=True).stdout == "deeplabv3_resnet50_voc\n"


def test_other_shells_know_every_command_and_option() -> None:
    """Where fish and zsh are not installed their scripts are at least complete; where they are, they parse."""
    options = {flag for command in iter_commands() for word in command.options for flag in word.flags}
    for shell in ("fish", "zsh"):
        script = completion_script(shell)
        shown = {f"-l {flag[2:]} " if shell == "fish" else flag for flag in options if flag.startswith("--")}
        assert not {flag for flag in shown if flag not in script}
        assert not {name for name in COMMANDS if name not in script}
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=script, text=True, check=True)
    assert completion.main(["tcsh"]) == 2


def test_an_option_of_two_values_names_both() -> None:
    """`--size H W`, not `--size SIZE …`."""
    shown = {str(argument) for command in iter_commands(("export", "benchmark")) for argument in command.all_arguments}
    assert {"--size H W", "--size PIXELS …"} <= shown


def every_parser() -> Iterator[Parser]:
    """Parsers of all commands, of their subcommands and actions."""
    for name in COMMANDS:
        for parser in (get_parser(name), *(get_parser(name, one) for one in SUBCOMMANDS.get(name, ()))):
            yield parser
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    yield from action.choices.values()


def test_every_parser_is_built_without_torch() -> None:
    """`--help`, completion and wrong calls answer at once: heavy libraries are imported after the arguments are checked."""
    code = (
        "import sys; from deeplabzoo.cli.commands import COMMANDS; from deeplabzoo.cli.parser import get_parser\n"
        "for name in COMMANDS: get_parser(name).format_help()\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert get_parser("predict").prog == "python -m deeplabzoo.predict"
    assert get_parser("benchmark", "--train").prog == "python -m deeplabzoo.benchmark --train"


@pytest.mark.parametrize("width", [80, 120])
def test_every_help_wraps_and_ends_in_examples(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer than the terminal, and the last lines are commands that can be copied."""
    monkeypatch.setenv("COLUMNS", str(width))
    for parser in every_parser():
        lines = parser.format_help().rstrip().splitlines()
        usage = lines.index("")
        assert max(map(len, lines[usage:])) <= width, (parser.prog, max(lines[usage:], key=len))
        examples = lines[max(index for index, line in enumerate(lines) if line.startswith("examples")) + 1 :]
        assert examples, parser.prog
        assert all(line.startswith("  ") for line in examples), parser.prog


def test_every_option_shows_its_default() -> None:
    """Where an option has a default its help states it; old spellings are accepted and not shown."""
    for parser in every_parser():
        for action in parser._actions:
            if action.help == argparse.SUPPRESS or action.default in (None, argparse.SUPPRESS) or action.const is True:
                continue
            assert "default" in help_text(action) or action.default in (False, [], ""), (parser.prog, action.option_strings)


def test_examples_of_the_help_are_valid_calls() -> None:
    """Each example is parsed by its command's own parser, and shows no old spelling."""
    for parser in every_parser():
        for line in (parser.epilog or "").splitlines():
            if line.startswith("  python -m deeplabzoo.") and "--help" not in line:
                words = shlex.split(line)
                name = words[2].removeprefix("deeplabzoo.")
                train = [word for word in words[3:] if word in SUBCOMMANDS.get(name, ())]
                chosen = get_parser(name, *train)
                arguments = [word for word in words[3:] if word not in train]
                chosen.parse_args(arguments)
                hidden = {flag for one in chosen._actions if one.help == argparse.SUPPRESS for flag in one.option_strings}
                assert not hidden & set(arguments), line


def test_old_spellings_mean_the_same() -> None:
    """Renamed options keep their old spelling."""
    new = get_parser("predict").parse_args(["a.jpg", "--out", "o", "--backend", "torch", "--overwrite"])
    assert get_parser("predict").parse_args(["a.jpg", "--out", "o", "--engine", "torch", "--again"]) == new
    new = get_parser("benchmark").parse_args(["m", "--backend", "plain", "torch", "--batch-size", "2"])
    assert get_parser("benchmark").parse_args(["m", "--engine", "plain", "torch", "--batch", "2"]) == new
    new = get_parser("train").parse_args(["voc", "--root", "d"])
    assert get_parser("train").parse_args(["voc", "--data", "d"]) == new
    new = get_parser("publish").parse_args(["r", "--root", "d", "--checkpoint", "last", "--image", "i"])
    assert get_parser("publish").parse_args(["r", "--data", "d", "--weights", "last", "--photo", "i"]) == new
    assert get_parser("predict").parse_args(["a.jpg", "--out", "o"]).backend == "auto"


def test_every_command_has_a_help() -> None:
    """Each is a module `deeplabzoo.cli.NAME` with `main(argv)`, and its --help ends with 0."""
    for name in COMMANDS:
        module = importlib.import_module(f"deeplabzoo.cli.{name}")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert module.main(["--help"]) == 0
        assert out.getvalue().startswith(f"usage: python -m deeplabzoo.{name} ")


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"deeplabzoo {deeplabzoo.__version__}\n"


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """A typing mistake costs one line."""
    assert main(["predikt"]) == 2
    assert "Did you mean 'predict'?" in capsys.readouterr().err


def test_no_command_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    """`deeplabzoo` alone is `deeplabzoo --help`."""
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == alone


@pytest.mark.parametrize(
    ("raised", "status"), [(UsageError("Wrong."), 2), (WeightsError("Broken."), 1), (DeepLabZooError("Failed."), 1)]
)
def test_errors_on_purpose_are_one_line(raised: Exception, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2 where the call was wrong, 1 where the work failed; no traceback."""

    def command(argv: object) -> int:
        raise raised

    assert run(command) == status
    assert capsys.readouterr().err == f"error: {raised}\n"


def test_bugs_keep_their_traceback() -> None:
    """`run` hides nothing that it does not understand."""
    with pytest.raises(KeyError):
        run(lambda argv: {}["missing"])


def test_parser_raises_and_suggests() -> None:
    """A misspelt option, an abbreviated one and a missing one: UsageError, so that a caller in Python can catch it."""
    parser = Parser("predict", "x")
    parser.add_argument("--output-stride", type=int)
    parser.add_argument("name")
    with pytest.raises(UsageError, match="Did you mean '--output-stride'"):
        parser.parse_args(["a", "--output-strid", "8"])
    with pytest.raises(UsageError, match="--out"):
        parser.parse_args(["a", "--out", "8"])
    with pytest.raises(UsageError, match=r"python -m deeplabzoo.predict --help"):
        parser.parse_args([])
    with pytest.raises(UsageError, match="invalid int"):
        parser.parse_args(["a", "--output-stride", "x"])


def console(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "deeplabzoo", *words], capture_output=True, text=True, check=False, **options)


def test_console_script_runs_a_command_as_python_m_does() -> None:
    """The status of the command is that of the script, and its help names the module that it runs."""
    helped = console("predict", "--help")
    assert helped.returncode == 0
    assert "python -m deeplabzoo.predict" in helped.stdout
    refused = console("predict", "--nonsense", "x", "--out", "y")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr


def test_commands_do_not_take_the_place_of_functions() -> None:
    """`deeplabzoo.evaluate` is a function and a command; running the one leaves the other callable."""
    code = (
        "import deeplabzoo, sys; from deeplabzoo.cli.main import main\n"
        "try: main(['evaluate', '--help'])\n"
        "except SystemExit: pass\n"
        "assert callable(deeplabzoo.evaluate)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_needs_no_torch() -> None:
    """Asking what there is takes a moment, not seconds."""
    code = "import sys; from deeplabzoo.cli.main import main; main(['--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_console_without_unicode_is_enough() -> None:
    """A photo called 貓.jpg is reported on an ASCII terminal, too, instead of ending the run with a UnicodeEncodeError."""
    code = "import sys; from deeplabzoo.cli.parser import run; sys.exit(run(lambda argv: print('\\u8c93.jpg: cat') or 0))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=False)
    assert (done.returncode, done.stdout) == (0, b"\\u8c93.jpg: cat" + os.linesep.encode())
    assert console("--help", env=env).returncode == 0


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    """`deeplabzoo --help | head -1`."""
    code = (
        "import sys; from deeplabzoo.cli.parser import run\n"
        "sys.exit(run(lambda argv: [print('x' * 99) for _ in range(9999)] and 0))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    error = child.stderr.read()
    child.stderr.close()
    assert child.wait() == 1
    assert error == ""


def test_named_model_reads_files_and_names(tmp_path: Path, shared_data: Path) -> None:
    """A file as the model, a file as the weights of a name: the same network, known by its hash."""
    file = str(shared_data / "tflite" / "deeplabv3_mnv2_pascal_quant.tflite")
    by_file, by_name = load_named_model(file, None), load_named_model("deeplabv3_mobilenetv2_voc", file)
    assert by_file.weights_source["sha256"] == by_name.weights_source["sha256"]
    assert by_file.config == by_name.config
    with pytest.raises(UsageError, match="leave --weights out"):
        load_named_model(file, "coral")
