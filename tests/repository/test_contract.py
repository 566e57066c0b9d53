"""The public contract, compared with a committed snapshot: additions are free, what is gone fails with its name.

`tests/repository/contract.json` is the snapshot. After a deliberate change, such as a new option, it is written again by
`python tests/repository/test_contract.py --write`; its section `import_paths` is kept by hand and copied.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("contract.json")

# ---------------------------------------------------------------------------------------------------------------------------
# Where the package keeps what has no public name. This block is all that a move of modules may change.


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return every command's parser by name, and those of first words that change the options (`benchmark --train`)."""
    from deeplabzoo.cli.commands import COMMANDS, SUBCOMMANDS
    from deeplabzoo.cli.parser import get_parser

    parsers: dict[str, argparse.ArgumentParser] = {name: get_parser(name) for name in COMMANDS}
    for name, subcommands in SUBCOMMANDS.items():
        parsers |= {f"{name} {one}": get_parser(name, one) for one in subcommands}
    return parsers


def exit_codes() -> list[str]:
    """Return the exit codes that docs/commands.md lists."""
    from deeplabzoo.cli.commands import EXIT_CODES

    return [str(code) for code in EXIT_CODES]


RECIPE = ("deeplabzoo.training.recipe",)
REPORT = ("deeplabzoo.evaluation.report",)
OPTIMIZED = ("deeplabzoo.optimization.optimized_model",)

NOT_FROZEN = {
    "benchmark table": None,
    "benchmark": {"--labels", "--confusion", "--scaling", "--megapixels", "--seams", "--mosaics", "--note"},
}
"""Commands (None) and options that measure single functions or write this repository's documents: they may leave."""

# ---------------------------------------------------------------------------------------------------------------------------

TINY = ["steps=2", "batch=2", "workers=0", "evaluations=1", "augmentation.crop=65", "model=deeplabv3plus_lcnet_050"]
SMALL = ["network.head_channels=16", "network.decoder_channels=16", "network.decoder_low_level_channels=8"]
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "V3": ("deeplabv3_resnet18", {}),
    "V3+": ("deeplabv3plus_mobilenetv2", {}),
    "V3+ with an auxiliary head": ("deeplabv3plus_resnet18", {"aux_head": True, "num_classes": 5}),
}


def home(name: str, modules: tuple[str, ...]) -> Any:
    """Return `name` from the first of `modules` that exists."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise  # the module exists and lacks something else
    raise LookupError(f"{name} is in none of {', '.join(modules)}; add its module to the block at the top of {__file__}.")


def plain(value: Any) -> Any:
    """Return a default value as JSON: dataclasses as objects, tuples as lists, the rest by its repr."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    return Path(value).as_posix() if isinstance(value, Path) else repr(value)


def signature(function: Callable[..., Any]) -> dict[str, Any]:
    """Return how a function may be called, such that more keys mean more ways to call it (`required`: fewer)."""
    parameters = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    starred = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    named = [one for one in parameters if one.kind not in starred]
    by_place = [one.name for one in named if one.kind is not inspect.Parameter.KEYWORD_ONLY]
    facts = {
        "by_place": {str(place): name for place, name in enumerate(by_place, 1)},
        "by_name": [one.name for one in named if one.kind is not inspect.Parameter.POSITIONAL_ONLY],
        "defaults": {one.name: plain(one.default) for one in named if one.default is not one.empty},
        "any": [starred[one.kind] for one in parameters if one.kind in starred],
    }
    required = [one.name for one in named if one.default is one.empty]
    return {**{key: value for key, value in facts.items() if value}, "required": required}


def fields(kind: Any) -> dict[str, Any]:
    """Return a dataclass's fields with their defaults."""
    defaults = {}
    for field in dataclasses.fields(kind):
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        defaults[field.name] = "(required)" if default is dataclasses.MISSING else plain(default)
    return {"fields": defaults, "required": [name for name, default in defaults.items() if default == "(required)"]}


def members(kind: type) -> dict[str, Any]:
    """Return a class's public methods with their signatures, and its properties, without those of other libraries."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("deeplabzoo.")]
    names = sorted({name for base in own for name in vars(base) if not name.startswith("_") or name == "__call__"})
    found: dict[str, Any] = {}
    for name in names:
        value = inspect.getattr_static(kind, name)
        if isinstance(value, property):
            found[name] = "property"
        elif inspect.isroutine(value):
            found[name] = signature(getattr(kind, name))
    made = {} if dataclasses.is_dataclass(kind) else {"constructor": signature(kind)}
    return {"members": found, **made, **(fields(kind) if dataclasses.is_dataclass(kind) else {})}


def public_names() -> list[str]:
    """Return what `import deeplabzoo` offers."""
    import deeplabzoo

    return sorted(deeplabzoo.__all__)


def python_api() -> dict[str, Any]:
    """Return functions with their signatures, classes with methods, properties, fields and the attributes of their objects."""
    import deeplabzoo
    from deeplabzoo.inference.predictor import Result

    kinds = {
        **{name: getattr(deeplabzoo, name) for name in deeplabzoo.__all__ if name != "__version__"},
        "Result": Result,
        "Report": home("Report", REPORT),
        "OptimizedDeepLab": home("OptimizedDeepLab", OPTIMIZED),
        "Recipe": home("Recipe", RECIPE),
    }
    found = {name: members(kind) if isinstance(kind, type) else signature(kind) for name, kind in sorted(kinds.items())}
    net = tiny()
    for name, thing in (("DeepLab", net), ("Predictor", deeplabzoo.Predictor(net)), ("OptimizedDeepLab", net.optimize())):
        found[name]["attributes"] = sorted(key for key in vars(thing) if not key.startswith("_"))
    found["DeepLab"]["modules"] = [name for name, _ in net.named_children()]
    return found


@functools.cache
def tiny() -> Any:
    """Return a small V3+."""
    import deeplabzoo

    return deeplabzoo.create("deeplabv3plus_lcnet_050", num_classes=3)


def errors() -> dict[str, Any]:
    """Return each error class: what else catches it, and the exit code that it gives a command."""
    from deeplabzoo import errors

    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    return {
        name: {"is": sorted(base.__name__ for base in kind.__mro__[1:-1]), "exit_status": getattr(kind, "exit_status", None)}
        for name, kind in sorted(kinds.items())
    }


def command_line() -> dict[str, Any]:
    """Return every command's arguments and options, hidden spellings included."""
    found: dict[str, Any] = {}
    for name, parser in commands().items():
        if NOT_FROZEN.get(name, ()) is not None:
            found |= dict(_described(name, parser))
    return found


def _described(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, Any]]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    places = [action for action in parser._actions if not action.option_strings and action not in nested]
    options = {flag: action for flag, action in parser._option_string_actions.items() if flag not in NOT_FROZEN.get(name, ())}
    yield (
        name,
        {
            "arguments": {str(place): _word(parser, action) for place, action in enumerate(places, 1)},
            "options": {flag: _word(parser, action) for flag, action in sorted(options.items())},
            "required": [flag for flag, action in options.items() if action.required]
            + [str(place) for place, action in enumerate(places, 1) if action.nargs not in ("?", "*")],
        },
    )
    for action in nested:
        for key, child in action.choices.items():
            yield from _described(f"{name} {key}", child)


def _word(parser: argparse.ArgumentParser, action: argparse.Action) -> dict[str, Any]:
    facts: dict[str, Any] = {"values": 1 if action.nargs is None else action.nargs}
    if action.nargs != 0 and (action.metavar or action.dest):
        facts["shown_as"] = action.metavar or action.dest.upper()
    if action.choices is not None:
        facts["choices"] = [str(choice) for choice in action.choices]
    if isinstance(action, argparse._AppendAction):  # "extend" too
        facts["repeats"] = True
    default = parser.get_default(action.dest)  # of the option that an old spelling stands for
    if default not in (None, argparse.SUPPRESS):
        facts["default"] = plain(default)
    return facts


def installation() -> dict[str, Any]:
    """Return the extras, the console script, and the environment variables that the package reads."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "deeplabzoo").rglob("*.py")))
    return {
        "extras": sorted(project["optional-dependencies"]),
        "scripts": sorted(project["scripts"]),
        "environment_variables": sorted(set(re.findall(r"DEEPLABZOO_[A-Z_]+", source)) - {"DEEPLABZOO_RECORD"}),
        "exit_codes": exit_codes(),
    }


def checkpoint() -> dict[str, Any]:
    """Return the metadata of a saved model: keys, and the keys of the JSON inside."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.safetensors"
        tiny().save(file)
        with safe_open(str(file), framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata()
    parsed = {key: json.loads(metadata[key]) for key in ("config", "preprocessing")}
    return {
        "metadata": sorted(metadata),
        "format": metadata["format"],
        "version": metadata["version"],
        **{key: sorted(value) for key, value in parsed.items()},
    }


def state_dicts() -> dict[str, Any]:
    """Return names and shapes of the heads' tensors in full, those of the encoder as a hash with the first and last of them."""
    import deeplabzoo

    found = {}
    for title, (name, options) in NETWORKS.items():
        state = deeplabzoo.create(name, **options).state_dict()
        lines = {key: list(tensor.shape) for key, tensor in sorted(state.items())}
        encoder = {key: shape for key, shape in lines.items() if key.startswith("encoder.")}
        text = "".join(f"{key} {shape}\n" for key, shape in encoder.items())
        found[title] = {
            "model": name,
            "tensors": len(lines),
            "heads": {key: shape for key, shape in lines.items() if key not in encoder},
            "encoder_samples": {key: encoder[key] for key in [*list(encoder)[:3], *list(encoder)[-3:]]},
            "encoder_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    return found


def manifest() -> dict[str, Any]:
    """Return the schema's objects: their fields, which of them a row must have, and the words that a field may hold."""
    schema = json.loads((ROOT / "weights" / "manifest.schema.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for name, about in schema["$defs"].items():
        if "properties" in about:
            words = {key: value["enum"] for key, value in about["properties"].items() if "enum" in value}
            constants = {key: value["const"] for key, value in about["properties"].items() if "const" in value}
            found[name] = {
                "fields": sorted(about["properties"]),
                "required": sorted(about.get("required", [])),
                "always_there": sorted(about.get("required", [])),
                **({"words": words} if words else {}),
                **({"constants": constants} if constants else {}),
            }
    return found


def run_folder() -> dict[str, Any]:
    """Return the files of a finished run of the recipe `shapes`, and the keys of what they hold."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        call = [sys.executable, "-m", "deeplabzoo.train", "shapes", "--out", str(out), "--set", *TINY, *SMALL, "log_every=1"]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        files = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        recipe = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    return {
        "files": sorted(files),
        "log.jsonl": {line["kind"]: sorted(line) for line in lines},
        "report.json": {"keys": sorted(report), "val": sorted(report["val"])},
        "recipe.json": sorted(recipe),
    }


SECTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "public_names": (public_names, "`from deeplabzoo import NAME` would fail"),
    "python_api": (python_api, "calls of it would fail or mean another thing"),
    "errors": (errors, "`except` clauses and scripts depend on it"),
    "command_line": (command_line, "keep the old spelling as a hidden alias"),
    "installation": (installation, "scripts and dependents name it"),
    "checkpoint": (checkpoint, "saved files would not load"),
    "state_dicts": (state_dicts, "saved weights would not load"),
    "manifest": (manifest, "rows of manifests would not be read"),
    "run_folder": (run_folder, "`--resume` and readers of runs depend on it"),
}
"""Section -> how it is read from the package, and why a loss in it matters."""


def losses(promised: Any, found: Any, where: str) -> Iterator[str]:
    """Yield a sentence for everything of `promised` that `found` has not: objects and lists may grow, values must be equal.

    A list called `required` is the other way round: it may only shrink.
    """
    if isinstance(promised, Mapping) and isinstance(found, Mapping):
        for key, value in promised.items():
            if key == "required":
                new = [one for one in found.get(key, []) if one not in value]
                yield from (f"{where}: {one!r} is required now and was not" for one in new)
            elif key == "shown_as":
                continue  # the name of a value in the help may change
            elif key not in found:
                yield f"{where}: {key!r} is gone"
            else:
                yield from losses(value, found[key], f"{where}: {key}")
    elif isinstance(promised, list) and isinstance(found, list) and all(isinstance(one, str) for one in promised):
        yield from (f"{where}: {one!r} is gone" for one in promised if one not in found)
    elif promised != found or type(promised) is not type(found):
        yield f"{where} was {promised!r} and is {found!r}"


@functools.cache
def snapshot() -> dict[str, Any]:
    """Return the committed snapshot."""
    contract: dict[str, Any] = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    return contract


@pytest.mark.parametrize("section", SECTIONS)
def test_nothing_of_the_contract_is_gone(section: str) -> None:
    """Everything that the snapshot holds is still there and means the same."""
    read, reason = SECTIONS[section]
    lost = list(losses(snapshot()[section], json.loads(json.dumps(read())), section))
    assert not lost, f"{len(lost)} promises are broken ({reason}):\n" + "\n".join(lost)


IMPORTS = """
import importlib, json, sys, warnings
found = {}
for path, names in json.load(sys.stdin).items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            found[path] = {"error": str(error)}
            continue
    messages = [str(one.message) for one in caught if one.category is DeprecationWarning and path in str(one.message)]
    missing = [name for name in names if not hasattr(module, name)]
    found[path] = {"module": module.__name__, "missing": missing, "warnings": messages}
json.dump(found, sys.stdout)
"""


@functools.cache
def imported() -> dict[str, Any]:
    """Import every documented path in a fresh process."""
    paths = {**snapshot()["import_paths"]["kept"], **snapshot()["import_paths"]["old"]}
    call = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(call, input=json.dumps(paths), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("path", snapshot()["import_paths"]["kept"])
def test_documented_modules_stay_where_they_are(path: str) -> None:
    """These paths are part of the contract: the module is there itself, with its names and without a warning."""
    assert imported()[path] == {"module": path, "missing": [], "warnings": []}


@pytest.mark.parametrize("path", snapshot()["import_paths"]["old"])
def test_documented_old_paths_import_the_same_names(path: str) -> None:
    """A path that documents have shown works; where the module has moved, one DeprecationWarning names the new path."""
    found = imported()[path]
    assert "error" not in found, f"{path} cannot be imported ({found.get('error')}); add it to deeplabzoo/moved.py."
    assert found["missing"] == [], f"{path} has lost {', '.join(found['missing'])}"
    if found["module"] == path:
        assert found["warnings"] == []
    else:
        [message] = found["warnings"]
        assert found["module"] in message


def test_every_command_runs_as_a_module() -> None:
    """`python -m deeplabzoo.COMMAND --help` ends with exit code 0: manifests, reports and model cards hold such commands."""
    names = [name for name in snapshot()["command_line"] if " " not in name]
    program = (
        "import contextlib, io, json, runpy, sys\n"
        "codes = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    sys.argv = [name, '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        try:\n"
        "            runpy.run_module(f'deeplabzoo.{name}', run_name='__main__', alter_sys=True)\n"
        "        except SystemExit as leaving:\n"
        "            codes[name] = leaving.code\n"
        "print(json.dumps(codes))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, json.dumps(names)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == dict.fromkeys(names, 0)


def call(first: str, *, option: int = 1, **others: int) -> None:
    """Stand for a public function."""


def with_more(first: str, second: int = 0, *, option: int = 1, more: bool = False, **others: int) -> None:
    """`call`, extended harmlessly."""


def with_another_default(first: str, *, option: int = 2, **others: int) -> None:
    """`call` with another meaning."""


def with_a_new_duty(first: str, second: int, *, option: int = 1) -> None:
    """`call` with one more argument that must be given, and without `**others`."""


def options(*, renamed: bool = False, alias: bool = False, duty: bool = False) -> dict[str, Any]:
    """Return the description of a small command."""
    parser = argparse.ArgumentParser("made_up")
    parser.add_argument("image", nargs="+", metavar="PICTURE" if renamed else "IMAGE")
    spellings = ["--overwrite"] if renamed else ["--again"]
    action = parser.add_argument(*spellings, action="store_true")
    if alias:
        parser.add_argument("--again", action="store_true", dest=action.dest, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=513, required=duty)
    return dict(_described("made_up", parser))


@pytest.mark.parametrize(
    ("promised", "found", "lost"),
    [
        (signature(call), signature(with_more), []),
        (signature(call), signature(with_another_default), ["it: defaults: option was 1 and is 2"]),
        (signature(call), signature(with_a_new_duty), ["it: 'any' is gone", "it: 'second' is required now and was not"]),
        (signature(with_more), signature(call), ["'2' is gone", "'second' is gone", "'more' is gone", "gone", "gone"]),
        (options(), options(renamed=True, alias=True), []),
        (options(), options(renamed=True), ["it: made_up: options: '--again' is gone"]),
        (options(), options(duty=True), ["it: made_up: '--size' is required now and was not"]),
        ({"shape": [1, 2]}, {"shape": [2, 1]}, ["it: shape was [1, 2] and is [2, 1]"]),
        ({"flag": False}, {"flag": 0}, ["it: flag was False and is 0"]),
    ],
)
def test_losses_are_seen_and_additions_are_not(promised: Any, found: Any, lost: list[str]) -> None:
    """The comparison itself: each sentence names what is gone."""
    sentences = list(losses(json.loads(json.dumps(promised)), json.loads(json.dumps(found)), "it"))
    assert len(sentences) == len(lost), sentences
    assert all(part in sentence for part, sentence in zip(lost, sentences, strict=True)), sentences


def written(value: Any, indent: int = 0) -> str:
    """Return JSON with short objects on one line."""
    short = json.dumps(value, ensure_ascii=False)
    if len(short) + indent <= 120 or not isinstance(value, dict | list):
        return short
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {written(one, indent + 1)}" for key, one in value.items()]
        return "{\n" + ",\n".join(inner + part for part in parts) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(inner + written(one, indent + 1) for one in value) + "\n" + " " * indent + "]"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Write tests/repository/contract.json from the package as it is.")
    arguments.add_argument("--write", action="store_true", required=True)
    arguments.parse_args()
    paths = json.loads(SNAPSHOT.read_text(encoding="utf-8"))["import_paths"]
    contract = {"import_paths": paths, **{name: read() for name, (read, _) in SECTIONS.items()}}
    SNAPSHOT.write_text(written(contract) + "\n", encoding="utf-8")
    print(f"{SNAPSHOT}: {len(SNAPSHOT.read_text(encoding='utf-8').splitlines())} lines")
