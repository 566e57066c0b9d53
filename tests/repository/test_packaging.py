"""What is installed is what is here: the manifest is found in an editable install, in a built wheel and in an sdist."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import deeplabzoo, sys
from deeplabzoo.hub.manifest import weights_folder
rows = deeplabzoo.list_weights()
names = deeplabzoo.list_models()
assert "torch" not in sys.modules
print(deeplabzoo.__file__, weights_folder(), len(rows), len(names), sep="\\n")
"""


def run(*command: str | Path, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Run a command without the repository on its path; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and with the wheel that was built from that sdist, without any network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean folder with the wheel installed in it."""
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def test_a_wheel_brings_its_manifest(installed: Path, tmp_path: Path) -> None:
    """Names and weights are listed from the installed files alone, away from the repository."""
    file, folder, rows, models = run(sys.executable, "-c", PROGRAM, cwd=tmp_path, path=installed).split()
    assert Path(file) == installed / "deeplabzoo" / "__init__.py"
    assert Path(folder) == installed / "deeplabzoo" / "hub" / "released"
    assert int(rows) >= 1
    assert int(models) >= 2
    names = {path.name for path in (ROOT / "weights").iterdir()}
    assert names >= {"manifest.json", "manifest.schema.json"}
    for name in names:  # bundled weights, their golden logits and cards, too
        assert (Path(folder) / name).read_bytes() == (ROOT / "weights" / name).read_bytes()


def test_a_wheel_brings_its_commands_and_types(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "deeplabzoo = deeplabzoo.cli.main:main" in archive.read(entry_points).decode()
    assert {"deeplabzoo/py.typed", "deeplabzoo/models/encoder_table.json"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "weights", "docs"))]


def test_an_installed_wheel_runs_its_command(installed: Path, tmp_path: Path) -> None:
    lines = run(sys.executable, "-m", "deeplabzoo.weights", "list", cwd=tmp_path, path=installed).splitlines()
    assert any(line.startswith("deeplabv3_mobilenetv2_voc.coral") for line in lines)


def test_an_sdist_holds_what_the_wheel_is_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"weights/manifest.json", "weights/manifest.schema.json", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert {f"weights/{path.name}" for path in (ROOT / "weights").iterdir()} <= names
    assert "tests/repository/test_packaging.py" in names


def test_the_source_tree_finds_its_top_level_manifest() -> None:
    """In an editable install (how the tests run) the one manifest is the repository's own, which people edit."""
    file, folder, *_ = run(sys.executable, "-c", PROGRAM, path=ROOT).split()
    assert Path(file) == ROOT / "deeplabzoo" / "__init__.py"
    assert Path(folder) == ROOT / "weights"
