"""Whether the tests would notice: one small wrong change of a module at a time, each against the tests of that module.

`python tests/trust/mutation.py metrics` tries every mutant and, with DEEPLABZOO_RECORD=1, writes
benchmarks/trust/mutation_metrics.json. The changes are cosmic-ray's (extra `trust`). torch is imported once: every mutant lives
in a fork of this process, which imports deeplabzoo anew with the changed source in place of the module; no file is touched.
"""

import argparse
import ast
import importlib.machinery
import importlib.util
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python tests/trust/mutation.py"


@dataclass(frozen=True)
class Target:
    """A module and the tests that are to notice its faults, the quickest first."""

    module: str
    tests: tuple[str, ...]
    loops: tuple[str, ...] = ()
    """Functions that numba compiles: of a mutant of them nothing compiled may be kept, since numba sees no changed constant."""

    def is_compiled(self, where: str) -> bool:
        """Whether a change at this place changes what numba compiles; a constant of the module may."""
        return bool(self.loops) and where in (*self.loops, "module")


TARGETS = {
    "atrous": Target("deeplabzoo.models.layers", ("models/test_atrous_rates.py",)),
    "metrics": Target("deeplabzoo.evaluation.metrics", ("evaluation/test_metrics.py",), ("_count_label_pairs",)),
    "manifest": Target("deeplabzoo.hub.manifest", ("hub/test_manifest.py", "cli/test_weights_command.py")),
    "labels": Target(
        "deeplabzoo.processing.postprocessing",
        ("processing/test_postprocessing.py", "processing/test_preprocessing.py", "inference/test_predictor.py"),
    ),
    "cells": Target(
        "deeplabzoo.processing.postprocessing_numba",
        ("processing/test_postprocessing_numba.py", "processing/test_postprocessing.py"),
        ("upsample_argmax_cells", "_argmax_row", "_fill", "_gather", "_candidates"),
    ),
}

_LIBRARIES = (
    "torch",
    "torch.nn.functional",
    "numba",
    "timm",
    "numpy",
    "PIL.Image",
    "hypothesis.strategies",
    "pytest",
    "huggingface_hub",
    "safetensors.torch",
    "torchmetrics.segmentation",
    "jsonschema",
)
"""Imported once, before the forks; none of them imports deeplabzoo."""

_OPERATORS = {
    "Add": ("Sub", "Mul"),
    "Sub": ("Add",),
    "Mul": ("Add", "Div"),
    "Div": ("Mul",),
    "FloorDiv": ("Mul", "Div"),
    "Mod": ("Mul", "FloorDiv"),
    "Pow": ("Mul",),
    "BitAnd": ("BitOr",),
    "BitOr": ("BitAnd",),
    "LShift": ("RShift",),
    "RShift": ("LShift",),
}
"""Arithmetic that each operator is replaced by; cosmic-ray knows all pairs, and the others are noticed by the same tests."""


@dataclass(frozen=True)
class Mutant:
    """One changed source."""

    source: str
    line: int
    was: str
    """The changed lines as they are."""
    now: str
    """The same lines in the mutant."""
    where: str
    """Function or class that holds them."""


def mutants(source: str) -> list[Mutant]:
    """Return the changes by the chosen operators, each once, that are Python; none of annotations, which nothing runs."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    tree = ast.parse(source)
    annotations, places = list(_annotations(tree)), list(_definitions(tree))
    found: dict[str, Mutant] = {}
    for name in sorted(operator_names()):
        if not _is_chosen(name.removeprefix("core/")):
            continue
        operator = get_operator(name)()
        nodes = [(node, *spot) for node in ast_nodes(get_ast(source)) for spot in operator.mutation_positions(node)]
        for occurrence, (node, start, end) in enumerate(nodes):
            is_star = node.parent is not None and node.parent.type in ("parameters", "param")
            if is_star or any(first <= start and end <= last for first, last in annotations):
                continue
            changed = mutate_code(source, operator, occurrence)
            if changed is None or changed == source or changed in found or not _is_python(changed):
                continue
            inner = [place for first, last, place in places if first <= start[0] <= last]
            found[changed] = Mutant(changed, start[0], *_difference(source, changed), inner[-1] if inner else "module")
    return sorted(found.values(), key=lambda mutant: mutant.line)


def _is_chosen(name: str) -> bool:
    kind, _, change = name.partition("_")
    before, _, after = change.partition("_")
    if kind == "ReplaceBinaryOperator":
        return after in _OPERATORS.get(before, ())
    if kind == "ReplaceComparisonOperator":
        return before.startswith("Is") == after.startswith("Is")
    return not name.startswith("Variable")  # these need names to be given


def _is_python(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _annotations(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                yield (part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0)


def _definitions(tree: ast.AST) -> Iterator[tuple[int, int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield min([node.lineno, *(one.lineno for one in node.decorator_list)]), node.end_lineno or node.lineno, node.name


def _difference(source: str, changed: str) -> tuple[str, str]:
    before, after = source.splitlines(), changed.splitlines()
    head = next(n for n, (old, new) in enumerate(zip([*before, ""], [*after, ""], strict=False)) if old != new)
    same = (old == new for old, new in zip(reversed(before[head:]), reversed(after[head:]), strict=False))
    tail = next((n for n, equal in enumerate(same) if not equal), min(len(before), len(after)) - head)
    return tuple(" ".join("\n".join(lines[head : len(lines) - tail]).split()) for lines in (before, after))  # type: ignore[return-value]


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from other source than its file has."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the given source, with the file's name."""
        return compile(self._source, self.path, "exec")


class _Finder:
    """Finds the one module that is changed; all others are left to Python."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self._module, self._path, self._source = module, str(path), source

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return how the changed module is loaded, None for any other."""
        if name != self._module:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=_Loader(name, self._path, self._source))


def _judge(target: Target, path: Path, source: str, seconds: int, machine_code: Path | None) -> None:
    """Run the tests in this process with the source in place of the module, and leave with pytest's status.

    What numba compiles is kept in `machine_code` for the next one, or in no place that outlives this process.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(ROOT)
    sys.meta_path.insert(0, _Finder(target.module, path, source))
    import hypothesis
    import numba
    import pytest

    hypothesis.settings.register_profile("mutation", derandomize=True, database=None)
    hypothesis.settings.load_profile("mutation")
    with tempfile.TemporaryDirectory() as scratch:
        numba.config.CACHE_DIR = str(machine_code or scratch)
        words = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = pytest.main([*words, f"--basetemp={scratch}/pytest", *(f"tests/{test}" for test in target.tests)])
    os._exit(int(status))


def _outcome(target: Target, path: Path, source: str, seconds: int, machine_code: Path | None = None) -> tuple[str, float]:
    """Return `survived`, `noticed` or `stopped` (too long, or too much memory) and the processor seconds it took."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = multiprocessing.get_context("fork").Process(target=_judge, args=(target, path, source, seconds, machine_code))
    process.start()
    process.join(max(600, 20 * seconds))
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    return {0: "survived"}.get(process.exitcode or 0, "noticed" if (process.exitcode or 0) > 0 else "stopped"), took


def try_all(name: str, every: int, lines: tuple[int, int] | None = None) -> None:
    """Try one of `every` mutants of a target, say which survive, and write the record unless only some lines were meant."""
    sys.dont_write_bytecode = False  # each mutant imports the package anew
    for library in _LIBRARIES:
        importlib.import_module(library)
    target, began = TARGETS[name], time.perf_counter()
    path = ROOT.joinpath(*target.module.split(".")).with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    outcome, plain = _outcome(target, path, source, 600)
    kept = Path(tempfile.mkdtemp(prefix="machine_code_"))
    if outcome != "survived":
        raise SystemExit(f"The tests of {name} fail on the unchanged module; mutants would tell nothing.")
    first, last = lines or (1, source.count("\n") + 1)
    tried = [mutant for mutant in mutants(source) if first <= mutant.line <= last][::every]
    outcomes, survivors, processor = Counter[str](), [], 0.0
    for number, mutant in enumerate(tried, 1):
        machine_code = None if target.is_compiled(mutant.where) else kept
        outcome, took = _outcome(target, path, mutant.source, int(20 + 5 * plain), machine_code)
        outcomes[outcome] += 1
        processor += took
        if outcome == "survived":
            survivors.append({"where": mutant.where, "line": mutant.line, "was": mutant.was, "now": mutant.now})
            print(f"[{number}/{len(tried)}] {path.name}:{mutant.line} survived: {mutant.was}  ->  {mutant.now}", flush=True)
    shutil.rmtree(kept)
    print(f"{name}: {dict(outcomes)} of {len(tried)}", flush=True)
    if lines is None:
        _record(name, target, every, outcomes, survivors, processor, time.perf_counter() - began)


def _record(
    name: str,
    target: Target,
    every: int,
    outcomes: Counter[str],
    survivors: list[dict[str, object]],
    processor: float,
    wall: float,
) -> None:
    from trust_record import TrustRecord, write_record

    write_record(
        TrustRecord(
            name=f"mutation_{name}",
            area="tests",
            what=f"small wrong changes of {target.module}{f', one of {every}' if every > 1 else ''}, noticed by "
            + " or ".join(target.tests),
            command=f"{COMMAND} {name}{f' --every {every}' if every > 1 else ''}",
            seconds=round(processor, 1),
            faults=outcomes.total(),
            survived=outcomes.total() - outcomes["survived"],
            details={
                "one_mutant_tried_of": every,
                "noticed": outcomes["noticed"],
                "stopped_for_time_or_memory": outcomes["stopped"],
                "wall_seconds": round(wall, 1),
                "surviving_mutants": survivors,
            },
        )
    )


def main() -> None:
    """Try the mutants of the named targets, or list them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one mutant of N, where there is no time for all")
    parser.add_argument("--lines", type=int, nargs=2, metavar=("FIRST", "LAST"), help="these lines alone; no record")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # the package beside this file, also where another checkout is installed
    for name in args.targets:
        if args.list:
            source = ROOT.joinpath(*TARGETS[name].module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
            for mutant in mutants(source):
                print(f"{mutant.line} {mutant.where}: {mutant.was}  ->  {mutant.now}")
        else:
            try_all(name, args.every, args.lines)


if __name__ == "__main__":
    main()
