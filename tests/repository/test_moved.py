"""Old import paths: the same module under both names, one warning that names the new path, and no cost for anyone else."""

import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import deeplabzoo
from deeplabzoo import errors, moved
from deeplabzoo.models import config
from deeplabzoo.moved import MovedModules

PACKAGE = Path(deeplabzoo.__path__[0])
OLD = "deeplabzoo.former"
TABLE = {
    f"{OLD}.sub.failures": "deeplabzoo.errors",
    f"{OLD}.settings": "deeplabzoo.models.config",
    "deeplabzoo.networks": "deeplabzoo.models",
    "deeplabzoo.models.old_settings": "deeplabzoo.models.config",
    f"{OLD}.lost": "deeplabzoo.not_there",
}


@pytest.fixture(autouse=True)
def _finder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a finder with made-up old names, and forget them afterwards."""
    monkeypatch.setattr(sys, "meta_path", [MovedModules(TABLE), *sys.meta_path])
    yield
    for name in [name for name in sys.modules if name.startswith((OLD, "deeplabzoo.networks", "deeplabzoo.models.old_"))]:
        del sys.modules[name]
    for module, name in ((deeplabzoo, "former"), (deeplabzoo, "networks"), (sys.modules["deeplabzoo.models"], "old_settings")):
        vars(module).pop(name, None)


def warned_by(statement: str) -> list[warnings.WarningMessage]:
    """Run an import statement and return the deprecation warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(statement, "someone.py", "exec"), {})
    return [one for one in caught if issubclass(one.category, DeprecationWarning)]


@pytest.mark.parametrize(
    ("statement", "new"),
    [
        (f"import {OLD}.sub.failures", "deeplabzoo.errors"),
        (f"import {OLD}.sub.failures as x; assert x.UsageError", "deeplabzoo.errors"),
        (f"from {OLD}.sub import failures; assert failures.UsageError", "deeplabzoo.errors"),
        (f"from {OLD}.sub.failures import UsageError", "deeplabzoo.errors"),
        (
            f"import {OLD}.settings; assert {OLD}.settings.DeepLabConfig",
            "deeplabzoo.models.config",
        ),
        ("from deeplabzoo.models import old_settings", "deeplabzoo.models.config"),
    ],
)
def test_every_form_of_import_gives_the_module_and_one_warning(statement: str, new: str) -> None:
    """The warning names the new path and points to the line that imports; the second import is silent."""
    [warning] = warned_by(statement)
    assert f"import {new} instead" in str(warning.message)
    assert warning.filename == "someone.py"
    assert warned_by(statement) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_names_are_one_module() -> None:
    """A class imported by its old path is the class, and the module keeps its own name and spec."""
    old = importlib.import_module(f"{OLD}.settings")
    assert old is config
    assert config.__name__ == "deeplabzoo.models.config"
    assert config.__spec__ is not None
    assert config.__spec__.name == "deeplabzoo.models.config"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reload_finds_the_file() -> None:
    """`importlib.reload` of an old name runs the module's file again."""
    old = importlib.import_module(f"{OLD}.sub.failures")
    names = dict(vars(errors))
    try:
        assert importlib.reload(old) is errors
        assert errors.UsageError is not names["UsageError"]
    finally:
        vars(errors).update(names)  # other tests hold the classes of the first import


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pickle_of_an_old_path_can_be_read() -> None:
    """A pickle names the module of a class; one that was written before the move gives today's class."""
    now = pickle.dumps(config.Preprocessing(), protocol=0)
    then = now.replace(b"deeplabzoo.models.config", f"{OLD}.settings".encode())
    assert then != now
    assert pickle.loads(then) == config.Preprocessing()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_of_a_moved_package_are_not_loaded_twice() -> None:
    """`deeplabzoo.networks.config` is not in the table, but its package is."""
    assert importlib.import_module("deeplabzoo.networks.config") is config
    with pytest.raises(ModuleNotFoundError, match=r"deeplabzoo\.networks\.nothing"):
        importlib.import_module("deeplabzoo.networks.nothing")


def test_other_names_are_unknown_as_before() -> None:
    """A package that exists no more holds what the table lists; another name is missing, and a wrong entry names its target."""
    with pytest.raises(ModuleNotFoundError, match=r"deeplabzoo\.former\.other"):
        importlib.import_module(f"{OLD}.other")
    with pytest.raises(ModuleNotFoundError, match=r"deeplabzoo\.not_there"):
        importlib.import_module(f"{OLD}.lost")
    assert MovedModules(TABLE).find_spec("deeplabzoo.models", deeplabzoo.__path__) is None
    assert MovedModules(TABLE).find_spec("json") is None


def test_a_command_may_have_the_name_of_a_former_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty `__path__` in it, old modules below its name are found, and `python -m` still runs the file."""
    (tmp_path / "course.py").write_text("__path__: list[str] = []\nif __name__ == '__main__':\n    print('runs')\n")
    monkeypatch.setattr(deeplabzoo, "__path__", [*deeplabzoo.__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [MovedModules({"deeplabzoo.course.plan": "deeplabzoo.errors"}), *sys.meta_path])
    try:
        with pytest.warns(DeprecationWarning, match=r"deeplabzoo\.errors"):
            assert importlib.import_module("deeplabzoo.course.plan") is errors
    finally:
        for name in ("deeplabzoo.course", "deeplabzoo.course.plan"):
            sys.modules.pop(name, None)
        vars(deeplabzoo).pop("course", None)
    program = (
        "import deeplabzoo, runpy, sys; deeplabzoo.__path__.append(sys.argv[1]); "
        "runpy.run_module('deeplabzoo.course', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "runs\n"


def test_the_hook_is_installed_once_and_light() -> None:
    """`import deeplabzoo` installs it without importlib.abc, which takes longer than the package itself."""
    moved.install()
    assert sum(type(finder) is MovedModules for finder in sys.meta_path) == 2  # the package's and that of this file
    program = "import sys, deeplabzoo; sys.exit(bool({'importlib.abc', 'torch'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-S", "-c", program], check=True, env=environment)  # -S: without what .pth files import


@pytest.mark.parametrize(("old", "new"), moved.MOVED.items())
def test_every_entry_leads_to_a_module(old: str, new: str) -> None:
    """A new path exists, is no old path itself, and no file is left at the old one."""
    assert importlib.util.find_spec(new) is not None
    assert new not in moved.MOVED
    file = PACKAGE.joinpath(*old.split(".")[1:])
    assert not file.with_suffix(".py").exists()
    assert not (file / "__init__.py").exists()
