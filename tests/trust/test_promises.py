"""docs/promises.md names a test for each promise: each of them exists, can run, and every theme of asks.md stands there."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from promise_mutations import mutations

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = re.split(r"\n(?=- )|\n\n", PAGE.partition("## Asked for, and not promised")[0])
"""The list items of the page, and the paragraphs between them."""
NO_MUTATION = {
    "- The command given with a metric reproduces it": "slow: needs the data sets of $DEEPLABZOO_DATA",
    "- Five commands lead from masks to a published model": "slow: each of the five commands has tests of its own above",
    "- Building a release reproduces the published wheel": "its test compares two builds of the same files",
    "- The pages of the site load nothing from other hosts": "slow: builds the site, which needs the extra docs",
}
"""Begin of a promise without a wrong change in promise_mutations.toml -> why."""
NAMED = re.findall(r"`((?:\w+/)*test_\w+\.py::test_\w+)`", PAGE)


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Return a file's syntax; most are asked for more than once."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _path(file: str, tests: Path = TESTS) -> Path:
    """Return where a named test lies: below `tests/`, or beside the benchmarks that it tests."""
    return tests.parent / file if file.startswith("benchmarks/") else tests / file


def complaint(name: str, tests: Path = TESTS) -> str:
    """Return why pytest would not run a test of this name on every machine that has the extras, or nothing."""
    file, _, function = name.partition("::")
    path = _path(file, tests)
    if not path.is_file():
        return f"{name}: there is no such file"
    found = [node for node in parsed(path).body if isinstance(node, ast.FunctionDef) and node.name == function]
    if len(found) != 1:
        return f"{name}: {'no such test' if not found else 'written twice, and the second hides the first'}"
    if any("mark.skip(" in ast.unparse(one) or "mark.xfail" in ast.unparse(one) for one in found[0].decorator_list):
        return f"{name}: never runs, or may fail"
    return ""


def test_every_named_test_exists_and_can_run() -> None:
    """A promise whose test was renamed or taken away is no promise."""
    assert [why for name in NAMED if (why := complaint(name))] == []


def test_every_promise_names_a_test() -> None:
    """Each line of a list above the last heading, which lists what is not promised, names at least one test."""
    kept, _, _ = PAGE.partition("## Asked for, and not promised")
    promises = re.split(r"\n(?=- )", kept)[1:]
    assert len(promises) > 80
    assert [promise for promise in promises if "::test_" not in promise] == []
    assert re.findall(r"^\*\*([A-Z])\. ", kept, flags=re.MULTILINE) == list("ABCDEFGHIJKLMNOP")


def test_every_promise_has_a_wrong_change_that_its_test_must_notice() -> None:
    """`make promises` makes these changes and runs the tests; a promise without one is listed above with the reason."""
    broken = {one.test for one in mutations()}
    without = [row for row in ROWS if row.startswith("- ") and not any(f"`{name}`" in row for name in broken)]
    assert [row for row in without if not row.startswith(tuple(NO_MUTATION))] == []
    assert [begin for begin in NO_MUTATION if sum(row.startswith(begin) for row in without) != 1] == []


def test_every_wrong_change_can_be_made() -> None:
    """Its text occurs exactly once in its file, and its test is one that the page names."""
    listed = mutations()
    assert [one.test for one in listed if one.test not in NAMED] == []
    texts = {one.file: (TESTS.parent / one.file).read_text(encoding="utf-8") for one in listed}
    assert [(one.test, one.file, one.old) for one in listed if texts[one.file].count(one.old) != 1 or one.old == one.new] == []


def test_what_is_marked_is_called_so() -> None:
    """A reader who sees no word about it may take it that CI runs the test."""
    named = {name: _marks(name) for name in NAMED}
    outside = {name for name, marks in named.items() if marks & {"slow", "soak"}}
    said = {name for name in NAMED if re.search(rf"\b(slow|soak)\b[^`]{{0,40}}`{re.escape(name)}`", PAGE)}
    assert outside == said


def _marks(name: str) -> set[str]:
    file, _, function = name.partition("::")
    tree = parsed(_path(file))
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    of_module = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
    text = " ".join(ast.unparse(one) for one in (*found.decorator_list, *of_module) if "parametrize" not in ast.unparse(one))
    return set(re.findall(r"mark\.(\w+)", text))


def test_the_check_sees_dead_names(tmp_path: Path) -> None:
    """A check that finds nothing wrong with anything would prove nothing."""
    assert complaint("models/test_atrous_rates.py::test_rates_are_the_papers") == ""
    assert "no such file" in complaint("test_nowhere.py::test_x")
    assert "no such test" in complaint("models/test_atrous_rates.py::test_that_is_gone")
    (tmp_path / "test_skipped.py").write_text("@pytest.mark.skip(reason='later')\ndef test_skipped(): ...\n")
    assert "never runs" in complaint("test_skipped.py::test_skipped", tmp_path)


@pytest.mark.slow
def test_pytest_collects_every_named_test() -> None:
    """The same, asked of pytest itself, with everything imported."""
    files = sorted({name.partition("::")[0] for name in NAMED})
    words = ["--collect-only", "-q", "-m", "", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *(str(_path(file)) for file in files)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    collected = {re.sub(r"\[.*", "", line).removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line}
    assert set(NAMED) - collected == set()
