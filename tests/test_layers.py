"""The layers of the package, read from its imports: lower rooms never look up."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "deeplabzoo"
PLAIN_DATA = {
    "deeplabzoo.errors",
    "deeplabzoo.say",
    "deeplabzoo.output",
    "deeplabzoo.checkout",
    "deeplabzoo.jit",
    "deeplabzoo.plain_json",
    "deeplabzoo.models.config",
    "deeplabzoo.data.classes",
    "deeplabzoo.data.palettes",
}
# folder -> folders whose modules it may import (besides itself and plain data)
ALLOWED = {
    "models": set(),
    "data": set(),
    "metrics": set(),
    "zoo": {"models", "data", "metrics"},
    "inference": {"models", "data", "metrics", "zoo"},
    "publishing": {"models", "data", "metrics", "zoo", "inference", "train"},
}
LOWER = set(ALLOWED)
PUBLISHING = {"publishing", "publish"}
BENCHMARKING = {"benchmarking", "benchmark"}
LIBRARY = sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).with_suffix("").parts[0] in LOWER)


def imported_modules(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("deeplabzoo.")}


@pytest.mark.parametrize("file", LIBRARY, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lower_layers_never_import_upper_ones(file: Path) -> None:
    """A network that knew its weights' origin, or a zoo that knew its trainer, could not be replaced one at a time."""
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = ALLOWED[own] | {own}
    for name in imported_modules(file):
        if any(name == plain or name.startswith(f"{plain}.") for plain in PLAIN_DATA):
            continue
        if name == "deeplabzoo.__version__":
            continue
        assert name.split(".")[1] in allowed, f"{file.name} ({own}) imports {name}"


@pytest.mark.parametrize(
    "file",
    sorted(
        p
        for p in PACKAGE.rglob("*.py")
        if p.relative_to(PACKAGE).with_suffix("").parts[0] not in {"train"} | PUBLISHING | BENCHMARKING
    ),
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_nothing_imports_the_trainer(file: Path) -> None:
    """Whoever only predicts never pays for training code; the library and its trainer are siblings."""
    assert not {name for name in imported_modules(file) if name.startswith("deeplabzoo.train")}


@pytest.mark.parametrize(
    "file",
    sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).with_suffix("").parts[0] not in PUBLISHING),
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_nothing_imports_publishing(file: Path) -> None:
    """It reads finished runs, so it stands above the trainer; only its own command knows it."""
    assert not {name for name in imported_modules(file) if name.startswith("deeplabzoo.publish")}


@pytest.mark.parametrize(
    "file",
    sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).with_suffix("").parts[0] not in BENCHMARKING),
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_nothing_imports_benchmarking(file: Path) -> None:
    """It compares everything with other libraries, so it stands above all; only its own command knows it."""
    assert not {name for name in imported_modules(file) if name.startswith("deeplabzoo.benchmark")}


def test_the_check_sees_the_package() -> None:
    """A test over an empty list of files would prove nothing."""
    assert {p.relative_to(PACKAGE).parts[0] for p in LIBRARY} >= {"models", "zoo", "data", "inference"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_holds_one_idea(file: Path) -> None:
    """A file that outgrows about four screens holds two ideas (docs/architecture.md)."""
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 350
