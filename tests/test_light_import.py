"""Listing what exists is instant: no torch, timm or numpy is imported before a network is made."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, time
start = time.process_time()
import deeplabzoo
names = deeplabzoo.list_models()
seconds = time.process_time() - start
rows = [str(row) for row in deeplabzoo.list_weights()]
page = str(deeplabzoo.describe(names[0]))
json.dump({"seconds": seconds, "names": len(names), "modules": sorted(sys.modules)}, sys.stdout)
"""


def run() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_listing_models_imports_no_torch_and_is_instant() -> None:
    """Under 0.15 s in a fresh interpreter: of processor time, best of five, so that a busy test machine does not matter.

    Nothing is waited for but a few small files, so on an idle machine that is the time by the clock, too.
    """
    answers = [run() for _ in range(5)]
    modules = answers[0]["modules"]
    assert isinstance(modules, list)
    assert not {"torch", "timm", "numpy", "PIL", "huggingface_hub"} & set(modules)
    assert answers[0]["names"]
    assert min(float(str(answer["seconds"])) for answer in answers) < 0.15


@pytest.mark.parametrize("module", ["errors", "say", "models.config", "models.encoder_table", "data.classes", "zoo.registry"])
def test_plain_data_modules_import_no_torch(module: str) -> None:
    """Any of them may be read where torch is not wanted, such as a documentation build."""
    program = f"import sys, deeplabzoo.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
