"""Listing what exists is instant: no torch, timm or numpy is imported before a network is made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
before, opened = set(sys.modules), []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
import deeplabzoo
names = deeplabzoo.list_models()
files = [name for name in opened if not name.endswith((".py", ".pyc"))]
rows = [str(row) for row in deeplabzoo.list_weights()]
page = str(deeplabzoo.describe(names[0]))
json.dump({"files": files, "names": len(names), "modules": sorted(set(sys.modules) - before)}, sys.stdout)
"""


def run() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_listing_models_imports_no_torch_and_is_instant() -> None:
    """In a fresh interpreter: the standard library, a few modules of ours, and the few small files that hold the names."""
    answer = run()
    modules, files = answer["modules"], answer["files"]
    assert isinstance(modules, list)
    assert isinstance(files, list)
    ours = [name for name in modules if name.partition(".")[0] == "deeplabzoo"]
    assert {name.partition(".")[0] for name in modules} <= {"deeplabzoo", *sys.stdlib_module_names}
    assert len(ours) <= 40
    assert answer["names"]
    assert 0 < len(files) <= 10
    assert sum(Path(name).stat().st_size for name in files) < 2_000_000


@pytest.mark.parametrize("module", ["errors", "log", "models.config", "models.encoder_table", "data.classes", "hub.registry"])
def test_plain_data_modules_import_no_torch(module: str) -> None:
    """Any of them may be read where torch is not wanted, such as a documentation build."""
    program = f"import sys, deeplabzoo.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
