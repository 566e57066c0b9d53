"""The layers of the package, read from its source: a module imports its own folder and lower ones, however it imports them."""

import ast
import functools
import graphlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import deeplabzoo
from tools.docs.architecture import PAGE, module_tree

PACKAGE = Path(__file__).resolve().parents[2] / "deeplabzoo"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("models", "data"),
    ("checkpoints",),
    ("hub",),
    ("processing",),
    ("optimization",),
    ("inference",),
    ("evaluation",),
    ("export", "training"),
    ("publish", "benchmark", "demo"),
    ("cli",),
)
"""Folders, lowest first; those of one line do not import each other."""

FREE = {"errors", "log", "files", "git", "strict_json", "numba_jit", "optional_imports", "offline", "moved", "device"}
"""Modules of the package's root that all may import; they import only one another. Other root modules are commands (cli)."""

PLAIN_DATA = {"deeplabzoo.models.config", "deeplabzoo.data.classes"}
"""Modules without torch that `models` and `data` may import of each other."""

UPWARD: dict[tuple[str, str], str] = {
    ("deeplabzoo.models.deeplab", "deeplabzoo.optimization.optimized_model"): "DeepLab.optimize",
    ("deeplabzoo.models.deeplab", "deeplabzoo.publish.push_to_hub"): "DeepLab.push_to_hub",
    ("deeplabzoo.models.deeplab", "deeplabzoo.checkpoints.native"): "DeepLab.save",
}
"""(importer, imported) -> the only function that may import upwards so; an import for annotations needs no function."""

DISPATCHERS = {"deeplabzoo.cli.main", "deeplabzoo.cli.parser", "deeplabzoo.data.dataset"}
"""Modules that import a command or a dataset reader by a name that the user typed: such an import is no part of the layers."""

MOST_MODULES, MOST_LINES, LONGEST_MODULE, MEDIAN = 185, 36_000, 450, (100, 250)
"""Ceilings a little above what there is, launchers and `__init__.py` included; the goal is 150 modules and 25 000 lines."""
SHORTEST_COUNTED = 20
"""Lines; shorter files (`__init__.py`, launchers of commands) are left out of the median."""


@dataclass(frozen=True)
class Import:
    """One module of the package that another one names."""

    module: str
    """Dotted name; a package's own name where a name of its `__init__.py` is imported."""
    line: int
    function: str = ""
    """Qualified name of the function that imports it; empty at module level."""
    typing_only: bool = False
    """Whether it stands below `if TYPE_CHECKING`."""
    dispatched: bool = False
    """Whether its last part is not known: an f-string such as f"deeplabzoo.{command}"."""


class Reader(ast.NodeVisitor):
    """Collects the package's modules that a source text imports: by statements, by `importlib` and `runpy`, by public names.

    Args:
        name: Dotted name of the module that is read.
        modules: Dotted names of all modules of the package.
        public: Public name of the package -> module that defines it, for `deeplabzoo.create(...)`.
        is_package: Whether the text is an `__init__.py`; decides what `from . import x` means.
    """

    IMPORTERS = frozenset({"import_module", "__import__", "run_module", "find_spec"})

    def __init__(self, name: str, modules: frozenset[str], public: dict[str, str], *, is_package: bool = False) -> None:
        self.name, self.modules, self.public, self.is_package = name, modules, public, is_package
        self.imports: list[Import] = []
        self.scopes: list[str] = []
        self.functions = 0
        self.typing_only = False
        self.constants: list[ast.Constant] = []
        self.computed = False

    def read(self, source: str) -> list[Import]:
        """Return the imports of a source text, in its order."""
        self.visit(ast.parse(source))
        if self.computed:  # import_module(TABLE[key]): every module that the file names as a whole string may be meant
            for one in self.constants:
                if one.value in self.modules:
                    self.imports.append(Import(str(one.value), one.lineno, "(a table)"))
        return sorted(dict.fromkeys(self.imports), key=lambda one: one.line)

    def visit_Import(self, node: ast.Import) -> None:
        """`import deeplabzoo.a.b`; `import deeplabzoo` alone counts where a public name of it is used."""
        for alias in node.names:
            if alias.name.startswith("deeplabzoo."):
                self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """`from deeplabzoo.a import b`, `from deeplabzoo import create`, `from . import b`."""
        base = node.module or ""
        if node.level:
            parts = self.name.split(".")
            kept = parts[: len(parts) - node.level + self.is_package]
            base = ".".join([*kept, base] if base else kept)
        if base != "deeplabzoo" and not base.startswith("deeplabzoo."):
            return
        for alias in node.names:
            self._add_name(base, alias.name, node.lineno)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """`deeplabzoo.create`, after `import deeplabzoo`."""
        if isinstance(node.value, ast.Name) and node.value.id == "deeplabzoo":
            self._add_name("deeplabzoo", node.attr, node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """`importlib.import_module("deeplabzoo.a.b")` and its relatives, with a constant or an f-string."""
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in self.IMPORTERS and node.args:
            self._add_dynamic(node.args[0])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Remember strings for tables of module names."""
        self.constants.append(node)

    def visit_If(self, node: ast.If) -> None:
        """Mark what stands below `if TYPE_CHECKING`."""
        test = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", "")
        if test != "TYPE_CHECKING":
            self.generic_visit(node)
            return
        before, self.typing_only = self.typing_only, True
        for child in node.body:
            self.visit(child)
        self.typing_only = before
        for child in node.orelse:
            self.visit(child)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Names of classes are part of a function's qualified name; their bodies run at import."""
        self.scopes.append(node.name)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """What a function imports is deferred; decorators, defaults and annotations run at import."""
        for outside in (*node.decorator_list, node.args, *filter(None, [node.returns])):
            self.visit(outside)
        self.scopes.append(node.name)
        self.functions += 1
        for child in node.body:
            self.visit(child)
        self.functions -= 1
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """A lambda defers its body, too."""
        self.scopes.append("<lambda>")
        self.functions += 1
        self.generic_visit(node)
        self.functions -= 1
        self.scopes.pop()

    def _add(self, module: str, line: int, *, dispatched: bool = False) -> None:
        function = ".".join(self.scopes) if self.functions else ""
        self.imports.append(Import(module, line, function, self.typing_only, dispatched))

    def _add_name(self, base: str, name: str, line: int) -> None:
        if f"{base}.{name}" in self.modules:
            self._add(f"{base}.{name}", line)
        elif base != "deeplabzoo":
            self._add(base, line)
        elif name in self.public:
            self._add(self.public[name], line)

    def _add_dynamic(self, argument: ast.expr) -> None:
        if isinstance(argument, ast.Constant):
            if str(argument.value).startswith("deeplabzoo."):
                self._add(str(argument.value), argument.lineno)
            return
        first = argument.values[0] if isinstance(argument, ast.JoinedStr) and argument.values else None
        prefix = str(first.value) if isinstance(first, ast.Constant) else ""
        if prefix.startswith("deeplabzoo."):
            for module in sorted(self.modules):
                if module.startswith(prefix) and "." not in module[len(prefix) :]:
                    self._add(module, argument.lineno, dispatched=True)
        elif not prefix:
            self.computed = True


def module_name(file: Path) -> str:
    """Return a file's dotted name."""
    parts = ["deeplabzoo", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
MODULES = frozenset(FILES)
NOT_READ = {"deeplabzoo", "deeplabzoo.moved"}
"""Tables of names for users; what they resolve is imported on a user's request, not by a layer."""


@functools.cache
def imports_of(module: str) -> tuple[Import, ...]:
    """Return what a module of the package imports of the package."""
    file = FILES[module]
    reader = Reader(module, MODULES, dict(deeplabzoo._HOME), is_package=file.name == "__init__.py")
    found = reader.read(file.read_text(encoding="utf-8"))
    return tuple(one for one in found if not (one.dispatched and module in DISPATCHERS))


def layer(module: str) -> int:
    """Return a module's layer: -1 for those that all may import, else its place in LAYERS."""
    parts = module.split(".")[1:]
    if not parts or parts[0] in FREE:  # the package itself is light: its names are resolved on first use
        return -1
    if parts[-1] == "__main__":  # an entry point, in whatever folder
        return len(LAYERS) - 1
    found = [place for place, folders in enumerate(LAYERS) if parts[0] in folders]
    if found:
        return found[0]
    if len(parts) == 1:
        return len(LAYERS) - 1  # a command: `python -m deeplabzoo.<name>`
    raise AssertionError(f"{module} lies in a folder of no layer; move it, or add the folder to LAYERS.")


def may_import(importer: str, imported: str) -> bool:
    """Whether the layers let a module import another one."""
    below, own = layer(imported), layer(importer)
    same_folder = importer.split(".")[1:2] == imported.split(".")[1:2]
    plain = imported in PLAIN_DATA and own >= 0
    return below < own or (below == own and (same_folder or own in (-1, len(LAYERS) - 1))) or plain


@pytest.mark.parametrize("module", sorted(MODULES - NOT_READ))
def test_a_module_imports_only_its_own_folder_and_lower_layers(module: str) -> None:
    """At module level, inside functions, for annotations, through importlib: all the same, but for the edges of UPWARD."""
    wrong = [
        f"line {one.line}: {one.module}{f' in {one.function}' if one.function else ''}"
        for one in imports_of(module)
        if not may_import(module, one.module) and not _is_listed(module, one)
    ]
    assert not wrong, f"{module} imports upwards: {'; '.join(wrong)}"


def _is_listed(module: str, one: Import) -> bool:
    function = UPWARD.get((module, one.module))
    return function is not None and (one.typing_only or one.function == function)


@pytest.mark.parametrize(("edge", "function"), UPWARD.items(), ids=lambda value: str(value))
def test_every_listed_upward_import_exists(edge: tuple[str, str], function: str) -> None:
    """A list that is longer than the truth would hide the next one."""
    importer, imported = edge
    assert not may_import(importer, imported)
    assert function in [one.function for one in imports_of(importer) if one.module == imported and not one.typing_only]


def edges() -> Iterator[tuple[str, str]]:
    """Yield (importer, imported) for every import that runs, deferred ones included, but those of UPWARD."""
    for module in sorted(MODULES - NOT_READ):
        for one in imports_of(module):
            if not one.typing_only and one.module != module and (module, one.module) not in UPWARD:
                yield module, one.module


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count as well: a module can be understood, and taken out, without those above it."""
    graph: dict[str, set[str]] = {}
    for importer, imported in edges():
        graph.setdefault(importer, set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(MODULES - NOT_READ))
def test_every_imported_module_exists(module: str) -> None:
    """A name in a string is not checked by a type checker."""
    unknown = [one.module for one in imports_of(module) if one.module not in MODULES]
    assert not unknown, f"{module} names {', '.join(unknown)}, which the package does not have."


def sizes() -> dict[str, int]:
    """Return the lines of every module."""
    return {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in FILES.items()}


def test_the_package_has_few_modules() -> None:
    """Each is read by someone who has never seen the package."""
    assert len(MODULES) <= MOST_MODULES, f"{len(MODULES)} modules; at most {MOST_MODULES}"


def test_the_package_is_short() -> None:
    """All lines of all modules, blank ones and docstrings included."""
    assert sum(sizes().values()) <= MOST_LINES, f"{sum(sizes().values())} lines; at most {MOST_LINES}"


def test_no_module_is_long() -> None:
    """A module that is longer holds two ideas."""
    long = {name: lines for name, lines in sizes().items() if lines > LONGEST_MODULE}
    assert not long, f"above {LONGEST_MODULE} lines: {long}"


def test_the_median_module_is_neither_a_fragment_nor_a_heap() -> None:
    """Of all modules but the shortest ones, which only start a command or mark a package."""
    counted = [lines for lines in sizes().values() if lines >= SHORTEST_COUNTED]
    median = statistics.median(counted)
    assert MEDIAN[0] <= median <= MEDIAN[1], f"median of {len(counted)} modules: {median} lines; expected {MEDIAN}"


KNOWN = frozenset(f"deeplabzoo.{name}" for name in ("a", "a.b", "a.b.c", "a.d", "errors", "run_me", "walk"))


def read(source: str, name: str = "deeplabzoo.a.b.c", *, is_package: bool = False) -> list[tuple[str, str, bool]]:
    """Return (module, function, typing_only) of every import of a small text."""
    found = Reader(name, KNOWN, {"create": "deeplabzoo.a.d"}, is_package=is_package).read(source)
    return [(one.module, one.function, one.typing_only) for one in found]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import deeplabzoo.a.b", [("deeplabzoo.a.b", "", False)]),
        ("import deeplabzoo.a.b as x, os", [("deeplabzoo.a.b", "", False)]),
        ("from deeplabzoo.a import b", [("deeplabzoo.a.b", "", False)]),
        ("from deeplabzoo.a.b import Something", [("deeplabzoo.a.b", "", False)]),
        ("from deeplabzoo import errors", [("deeplabzoo.errors", "", False)]),
        ("from deeplabzoo import create", [("deeplabzoo.a.d", "", False)]),
        ("from deeplabzoo import __version__", []),
        ("import deeplabzoo\ndeeplabzoo.create('x')", [("deeplabzoo.a.d", "", False)]),
        ("import deeplabzoo\nprint(deeplabzoo.__version__)", []),
        ("from . import d", [("deeplabzoo.a.b", "", False)]),
        ("from .. import d", [("deeplabzoo.a.d", "", False)]),
        ("from ..d import Something", [("deeplabzoo.a.d", "", False)]),
        ("def f():\n    from deeplabzoo.a import d", [("deeplabzoo.a.d", "f", False)]),
        ("class C:\n    async def f(self):\n        import deeplabzoo.a.d", [("deeplabzoo.a.d", "C.f", False)]),
        ("class C:\n    import deeplabzoo.a.d", [("deeplabzoo.a.d", "", False)]),
        ("def f(x=__import__('deeplabzoo.a.d')): ...", [("deeplabzoo.a.d", "", False)]),
        ("f = lambda: importlib.import_module('deeplabzoo.a.d')", [("deeplabzoo.a.d", "<lambda>", False)]),
        ("if TYPE_CHECKING:\n    from deeplabzoo.a import d", [("deeplabzoo.a.d", "", True)]),
        ("if typing.TYPE_CHECKING:\n    import deeplabzoo.a.d", [("deeplabzoo.a.d", "", True)]),
        ("if TYPE_CHECKING:\n    import os\nelse:\n    import deeplabzoo.a.d", [("deeplabzoo.a.d", "", False)]),
        ("if ready:\n    import deeplabzoo.a.d", [("deeplabzoo.a.d", "", False)]),
        ("try:\n    import deeplabzoo.a.d\nexcept ImportError:\n    pass", [("deeplabzoo.a.d", "", False)]),
        ("importlib.import_module('deeplabzoo.a.d')", [("deeplabzoo.a.d", "", False)]),
        ("from importlib import import_module\nimport_module('deeplabzoo.a.d')", [("deeplabzoo.a.d", "", False)]),
        ("importlib.import_module('numpy')", []),
        ("importlib.import_module(f'deeplabzoo.a.{name}')", [("deeplabzoo.a.b", "", False), ("deeplabzoo.a.d", "", False)]),
        ("runpy.run_module(f'deeplabzoo.r{name}')", [("deeplabzoo.run_me", "", False)]),
        ("T = {'d': 'deeplabzoo.a.d'}\nimport_module(T[key])", [("deeplabzoo.a.d", "(a table)", False)]),
        ("T = {'d': 'deeplabzoo.a.d'}", []),
        ("import torch\nfrom json import loads", []),
        ("from deeplabzoo.a import gone", [("deeplabzoo.a", "", False)]),
        ("import_module('deeplabzoo.gone')", [("deeplabzoo.gone", "", False)]),
    ],
)
def test_the_reader_sees_every_way_to_import(source: str, expected: list[tuple[str, str, bool]]) -> None:
    """Statements, public names, importlib and runpy with constants, f-strings and tables; where, and if for annotations."""
    assert read(source) == expected


def test_the_reader_knows_relative_imports_of_a_package() -> None:
    """In an `__init__.py` one dot is the package itself."""
    assert read("from . import b", "deeplabzoo.a", is_package=True) == [("deeplabzoo.a.b", "", False)]


def test_the_layers_are_an_order() -> None:
    """The rule itself, for one pair of each kind."""
    assert may_import("deeplabzoo.hub.factory", "deeplabzoo.models.deeplab")
    assert not may_import("deeplabzoo.models.deeplab", "deeplabzoo.hub.factory")
    assert not may_import("deeplabzoo.export.exporter", "deeplabzoo.training.train")
    assert not may_import("deeplabzoo.models.deeplab", "deeplabzoo.data.voc")
    assert may_import("deeplabzoo.models.deeplab", "deeplabzoo.data.classes")
    assert may_import("deeplabzoo.models.deeplab", "deeplabzoo.errors")
    assert not may_import("deeplabzoo.errors", "deeplabzoo.models.config")
    assert may_import("deeplabzoo.export.__main__", "deeplabzoo.cli.export")
    assert may_import("deeplabzoo.predict", "deeplabzoo.cli.predict")
    assert not may_import("deeplabzoo.inference.predictor", "deeplabzoo.predict")


def test_the_check_sees_the_package() -> None:
    """A test over an empty list of files would prove nothing."""
    assert {name.split(".")[1] for name in MODULES if "." in name} >= {folder for folders in LAYERS for folder in folders}
    assert sum(1 for _ in edges()) > 200


def test_the_page_shows_the_modules() -> None:
    """`python -m tools.docs.architecture` leaves docs/architecture.md unchanged."""
    assert module_tree() in PAGE.read_text(encoding="utf-8")


def test_every_module_says_what_it_holds() -> None:
    """The first line of a docstring is what a newcomer reads in docs/architecture.md."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert [str(file) for file in files if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))] == []
