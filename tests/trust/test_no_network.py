"""Nothing is fetched and nothing is reported: imports, bundled weights and predictions with every way to the network shut."""

import ast
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "deeplabzoo"
REFUSED = Path(__file__).parent / "refused_network"

CREATE_AND_PREDICT = """
import importlib
import deeplabzoo
for name in ("hub.registry", "hub.factory", "inference.predictor", "cli.evaluate", "cli.predict", "training.train"):
    importlib.import_module(f"deeplabzoo.{name}")
net = deeplabzoo.create("deeplabv3plus_mobilenetv2_voc", pretrained=True)
areas = deeplabzoo.Predictor(net, device="cpu", engine="torch")("docs/images/cat.jpg").areas
print("cat" if areas["cat"] > 0.5 else areas)
"""
OPENVINO = """
from deeplabzoo.optional_imports import require_module
require_module("openvino", extra="openvino", purpose="a test").Core()
print("openvino")
"""
NNCF = """
from deeplabzoo.optional_imports import require_module
require_module("nncf", extra="openvino", purpose="a test")
print("nncf")
"""

RAY = """
from deeplabzoo.optional_imports import require_module
require_module("ray", extra="ray", purpose="a test")
from ray._common.usage.usage_lib import usage_stats_enabled
print("ray" if not usage_stats_enabled() else "ray would report")
"""

NETWORK_MODULES = {"socket", "ssl", "urllib.request", "urllib.error", "http.client", "http.server", "ftplib", "smtplib"}
NETWORK_MODULES |= {"requests", "httpx", "aiohttp", "huggingface_hub", "fsspec", "wandb", "webbrowser"}
REACH_THE_NETWORK = {
    "hub/download.py": {"huggingface_hub"},
    "hub/http_download.py": {"http.client", "urllib.error", "urllib.request"},
    "hub/integrity.py": {"http.client", "urllib.error", "urllib.request"},
    "publish/push_to_hub.py": {"huggingface_hub"},
    "publish/model_card.py": {"huggingface_hub"},
    "demo/server.py": {"http.server", "socket"},
    "offline.py": {"huggingface_hub"},
    "training/logger.py": {"wandb"},
    "training/run_dir.py": {"socket"},
}
"""Every module that could open a connection, with what it would do it by; SECURITY.md says when each does."""


def run_refused(program: str, tmp_path: Path, *before: str, arguments: tuple[str, ...] = ()) -> tuple[str, str]:
    """Run a program that can reach nothing, in a new home; returns what it printed, and what it tried to reach."""
    attempts = tmp_path / "attempts"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CI", "DEEPLABZOO_OFFLINE", "HF_HUB_OFFLINE")
    }
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(REFUSED), str(ROOT)]),
        "REFUSED_ATTEMPTS": str(attempts),
        "HOME": str(tmp_path / "home"),
    }
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [*before, sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, attempts.read_text() if attempts.exists() else ""


def test_bundled_weights_are_used_without_asking_any_network(tmp_path: Path) -> None:
    """Import, create and predict: no connection, name look-up or datagram is tried, with no switch set (asks.md theme H)."""
    printed, tried = run_refused(CREATE_AND_PREDICT, tmp_path)
    assert printed.strip() == "cat"
    assert tried == ""


@pytest.mark.parametrize(
    ("library", "program"),
    [
        ("openvino", OPENVINO),
        pytest.param("nncf", NNCF, marks=pytest.mark.slow),
        pytest.param("ray", RAY, marks=pytest.mark.slow),
    ],
)
def test_optional_libraries_report_nothing_to_their_makers(library: str, program: str, tmp_path: Path) -> None:
    """OpenVINO and NNCF tell Google Analytics of their import, Ray its makers of a run, unless they are kept from it."""
    pytest.importorskip(library, reason="comes with an extra")
    printed, tried = run_refused(program, tmp_path)
    assert printed.strip() == library
    assert tried == ""
    assert not (tmp_path / "home" / "intel").exists()


def test_the_refusal_sees_what_is_tried(tmp_path: Path) -> None:
    """A trap that catches nothing would prove nothing: look-ups and connections are written down, also those of children."""
    program = """
import subprocess, sys, urllib.request, urllib.error
for address in ("http://example.org/", "http://192.0.2.1/"):
    try:
        urllib.request.urlopen(address)
    except urllib.error.URLError as error:
        print(error.reason.errno)
child = "import socket\\ntry: socket.socket().connect(('192.0.2.2', 80))\\nexcept OSError: pass"
subprocess.run([sys.executable, "-c", child], check=True)
"""
    printed, tried = run_refused(program, tmp_path)
    assert printed.split() == ["101", "101"]
    assert [line.split(":")[0] for line in tried.splitlines()] == [
        "socket.getaddrinfo example.org",
        "socket.getaddrinfo 192.0.2.1",
        "socket.connect ('192.0.2.2', 80)",
    ]


@pytest.mark.slow
def test_bundled_weights_are_used_where_there_is_no_network_at_all(tmp_path: Path) -> None:
    """In a network of its own, without even a loopback that is up: what compiled libraries do is held, too."""
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let programs have a network of their own (unshare -rn)")
    printed, tried = run_refused(CREATE_AND_PREDICT, tmp_path, unshare, "-rn")
    assert printed.strip() == "cat"
    assert tried == ""


def test_few_modules_can_reach_the_network() -> None:
    """Each is listed here and in SECURITY.md; a new one is a decision and no accident."""
    found = {
        file.relative_to(PACKAGE).as_posix(): {name for name, _ in _imports(file)} & NETWORK_MODULES
        for file in PACKAGE.rglob("*.py")
    }
    assert {name: modules for name, modules in found.items() if modules} == REACH_THE_NETWORK


def test_the_hub_is_reached_on_demand() -> None:
    """huggingface_hub is imported inside the functions that need it, so that importing deeplabzoo never loads it."""
    at_import = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for name, nested in _imports(file)
        if name == "huggingface_hub" and not nested
    }
    assert at_import <= {"publish/model_card.py"}  # its classes write the model card, on this disk


@functools.cache
def _imports(file: Path) -> list[tuple[str, bool]]:
    """Return the modules that a file imports, and whether within a function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nested = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in nested) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in nested))
            found += [(f"{node.module}.{alias.name}", id(node) in nested) for alias in node.names]
    return found


OFFLINE_CALLS = """
import contextlib, io, os, sys
from pathlib import Path
os.environ["DEEPLABZOO_OFFLINE"] = "1"
from deeplabzoo.cli.commands import COMMANDS
from deeplabzoo.cli.main import main
import numpy as np
from PIL import Image

folder = Path(sys.argv[1])
for split in ("train", "val"):
    for name in ("images", "masks"):
        (folder / split / name).mkdir(parents=True)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / split / "images" / f"{split}{number}.png")
        Image.fromarray(pixels[..., 0] % 2).save(folder / split / "masks" / f"{split}{number}.png")
(folder / "classes.txt").write_text("background\\nperson\\n")
image, out = str(folder / "val" / "images" / "val0.png"), str(folder / "out")
person = "deeplabv3plus_mobilenetv2_person"
calls = {
    "list": [["list", "*_voc"]],
    "info": [["info", person]],
    "predict": [["predict", image, "--out", out], ["predict", image, "--out", out, "--model", "deeplabv3_resnet50_coco"],
                ["predict", image, "--out", out, "--model", "hf-hub:someone/model"],
                ["predict", "https://example.org/a.jpg", "--out", out]],
    "evaluate": [["evaluate", person, "--data", "folder", "--root", str(folder), "--limit", "1"]],
    "demo": [["demo", "deeplabv3_resnet50_coco", "--port", "not-a-number"]],
    "benchmark": [["benchmark", "deeplabv3_resnet50_coco", "--pairs", "0", "--memory", "--size", "33", "33"]],
    "prepare": [["prepare", "voc", "--root", out], ["prepare", "trainaug", "--root", out]],
    "train": [["train", "folder", "--data", str(folder), "--out", out + "/run", "--set", "steps=1", "batch=2", "workers=0",
               "model=deeplabv3plus_lcnet_050", "augmentation.crop=33"]],
    "convert": [["convert", "hf-hub:someone/model", "--out", out + "/model.safetensors"]],
    "export": [["export", "deeplabv3_resnet50_coco", "--format", "onnx", "--out", str(folder / "model.onnx")]],
    "publish": [["publish", out + "/run", "--hub", "someone/model"]],
    "weights": [["weights", "list"], ["weights", "check", "*_coco"], ["weights", "verify", "deeplabv3_resnet50_coco"]],
    "completion": [["completion", "bash"]],
}
assert set(calls) == set(COMMANDS), set(calls) ^ set(COMMANDS)
for command, forms in calls.items():
    for form in forms:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as log:
            code = main(form)
        assert code in (0, 1, 2), (form, code)
        assert "Traceback" not in log.getvalue(), form
print("offline")
"""


def test_every_command_obeys_the_offline_switch(tmp_path: Path) -> None:
    """`DEEPLABZOO_OFFLINE=1`: no connection, look-up or datagram is tried by any command, also where it needs a download."""
    (tmp_path / "data").mkdir()
    printed, tried = run_refused(OFFLINE_CALLS, tmp_path, arguments=(str(tmp_path / "data"),))
    assert printed.splitlines()[-1] == "offline"
    assert tried == ""


OFFLINE_RECIPES = """
import os
os.environ["DEEPLABZOO_OFFLINE"] = "1"
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.errors import DeepLabZooError
from deeplabzoo.training.initialization import build_model
from deeplabzoo.training.recipes import RECIPES
data = SyntheticShapes("train", size=(40, 40), count=4)
refused = 0
for name, recipe in RECIPES.items():
    try:
        build_model(recipe(), data)
    except DeepLabZooError as error:
        refused += "OFFLINE" in str(error)
print(len(RECIPES), refused)
"""


def test_every_recipe_starts_or_refuses_without_asking_any_network(tmp_path: Path) -> None:
    """Initial weights that are not here end in a sentence that names the switch, or in random initialization with a warning."""
    printed, tried = run_refused(OFFLINE_RECIPES, tmp_path)
    recipes, refused = map(int, printed.split())
    assert recipes > 20
    assert refused > 0
    assert tried == ""
