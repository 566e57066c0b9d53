"""What every command shares, and the console script `deeplabzoo` that lists them.

A command is a module `deeplabzoo.<name>` with `main(argv) -> int`: it parses with `Parser` and works inside `run`, so that a
wrong call, a piece of work that failed and a bug look the same in all of them: one sentence and status 2, one sentence and
status 1, a traceback.
"""

import argparse
import contextlib
import contextvars
import importlib
import io
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import deeplabzoo
from deeplabzoo.errors import DeepLabZooError, UnknownNameError, UsageError, did_you_mean
from deeplabzoo.terminal import bold

if TYPE_CHECKING:
    from deeplabzoo.models.deeplab import DeepLab

COMMANDS: dict[str, str] = {
    "list": "models or released weights by size, GFLOPs, mIoU",
    "info": "everything about one model and its weights",
    "predict": "label photos: palette PNG, overlay with legend, areas",
    "evaluate": "mIoU, Dice and plots on a labelled data set",
    "demo": "a page on this computer: drop a photo or use the webcam",
    "benchmark": "speed and memory against other libraries, same weights",
    "prepare": "training data: VOC 2012, trainaug, a check of your own",
    "train": "train a recipe, or go on with a run that was stopped",
    "convert": "a checkpoint of any known origin as one of ours, proved",
    "export": "a model as ONNX, OpenVINO or torch.export, proved",
    "publish": "a finished run as a release: weights, figures, card",
    "weights": "list, check, verify, record, tabulate released files",
    "completion": "a script for bash, zsh or fish that completes all this",
}
"""Every command, and what it does in one line of a screen of 80 columns."""

FORMS: dict[str, tuple[str, ...]] = {"benchmark": ("--train", "table")}
"""First words that make another thing of a command, with options of its own."""

GROUPS: dict[str, tuple[str, ...]] = {
    "look up": ("list", "info"),
    "run": ("predict", "evaluate", "demo", "benchmark"),
    "training": ("prepare", "train"),
    "hand on": ("convert", "export", "publish", "weights"),
}
"""What the commands are for, as `--help` shows them; those that stand nowhere here come last."""

STATUSES: dict[int, str] = {
    0: "done",
    1: "the work failed, and one sentence on stderr says why (`weights check`: a file is changed or gone)",
    2: "the call was wrong, and one sentence on stderr says how; nothing was done",
    130: "interrupted by Ctrl-C",
    143: "a training run was stopped by SIGTERM; its state is saved, and `--resume` goes on (after Ctrl-C, too)",
}
"""Exit status of every command."""

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells report it."""


_REVEALING = contextvars.ContextVar("_REVEALING", default=False)


class _Revealed(BaseException):
    """Carries a command's parser to `parser_of`, past every handler of the command itself."""

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
        if _REVEALING.get():
            raise _Revealed(self)
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


def named_network(model: str, weights: str | None) -> "DeepLab":
    """Return the network that a command line names, with trained weights.

    `model` is a name of the zoo, `hf-hub:repo[@revision]`, or a checkpoint file or folder, which says itself what it is;
    `weights` is a tag of that name or a file, and without it the name's default tag is taken. Raises what `create` and `load`
    raise.
    """
    if not (Path(model).is_file() or _is_folder_of_weights(Path(model))):
        named: DeepLab = deeplabzoo.create(model, pretrained=weights or True)
        return named
    if weights is not None:
        raise UsageError(f"MODEL '{model}' holds its own weights; leave --weights out.")
    loaded: DeepLab = deeplabzoo.load(model)
    return loaded


def _is_folder_of_weights(path: Path) -> bool:
    """Whether it is a folder as SMP and transformers save it, and not one that happens to have a model's name."""
    return any((path / file).is_file() for file in ("model.safetensors", "pytorch_model.bin"))


def run(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Return the exit status of `command(argv)`: errors raised on purpose become one line on stderr, bugs keep their traceback.

    Ctrl-C gives 130. A reader that closed the pipe early (`| head`) gives 1 without a word: what was left is not done.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name that the console cannot show must not end the work
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


def parser_of(command: str, *first: str) -> Parser:
    """Return the parser that a command would read its words with: what completion and docs/commands.md are written from.

    `first` is one of the command's FORMS, if it is asked for.
    """
    module = importlib.import_module(f"deeplabzoo.{command}")
    if hasattr(module, "__path__"):  # a package is run by its __main__
        module = importlib.import_module(f"deeplabzoo.{command}.__main__")
    with _revealing():
        try:
            module.main(list(first))
        except _Revealed as found:
            return found.parser
    raise RuntimeError(f"deeplabzoo.{command} parses its words with something else than Parser")


@contextlib.contextmanager
def _revealing() -> Iterator[None]:
    token = _REVEALING.set(True)
    try:
        yield
    finally:
        _REVEALING.reset(token)


def _overview() -> str:
    """Return every command in its group, on one screen of 80 x 24."""
    grouped = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in COMMANDS if name not in grouped)
    width = max(map(len, COMMANDS))
    lines = []
    for group, names in {**GROUPS, "shell" if rest == ("completion",) else "more": rest}.items():
        listed = [name for name in names if name in COMMANDS]
        for name in listed:
            title = bold(f"{group:<8}") if name == listed[0] else " " * 8
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
            "exit status: 0 done, 1 it failed, 2 a wrong call, 130 interrupted, 143 SIGTERM",
        ]
    )


def _dispatch(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        raise UsageError(f"No command given; expected one of {', '.join(COMMANDS)} (`deeplabzoo --help` lists them).")
    if words[0] == "help" and len(words) > 1:
        words = [words[1], "--help"]
    if words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"deeplabzoo {deeplabzoo.__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UnknownNameError(
            f"Unknown command {words[0]!r}; expected one of {', '.join(COMMANDS)}.{did_you_mean(words[0], COMMANDS)}"
        )
    # As `python -m` would: importing the module instead would put it over the function of the same name in the package
    # (deeplabzoo.evaluate).
    sys.argv = [f"deeplabzoo {words[0]}", *words[1:]]
    runpy.run_module(f"deeplabzoo.{words[0]}", run_name="__main__", alter_sys=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script: `deeplabzoo COMMAND …`."""
    return run(_dispatch, argv)
