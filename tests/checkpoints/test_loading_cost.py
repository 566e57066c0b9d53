"""Loading costs what the weights cost: no second copy of them, no network drawn at random first."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deeplabzoo
from deeplabzoo.models.deeplab import DeepLab

PEAK = """
import json, resource, sys, torch
from deeplabzoo.hub import factory
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
net = factory.load(sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
held = sum(t.numel() * t.element_size() for t in net.state_dict().values())
print(json.dumps({"above": (peak - before) * 1024, "held": held}))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loading_holds_the_weights_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Peak memory of `load` above what the process had: the weights in float32 and little else, not two copies."""
    path = tmp_path / "big.safetensors"
    deeplabzoo.create("deeplabv3plus_resnet50").save(path, dtype=dtype)
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["held"] > 90e6
    assert measured["above"] < 1.4 * measured["held"]


def test_a_loaded_model_owns_its_tensors(tmp_path: Path) -> None:
    """Parameters can be trained, and writing to them changes neither the file nor one another."""
    net = deeplabzoo.create("deeplabv3plus_resnet18", num_classes=3)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state["head.aspp.branches.0.norm.weight"] = state["head.aspp.branches.0.norm.bias"]
    again = DeepLab.from_weights(net.config, state)
    assert all(parameter.requires_grad for parameter in again.parameters())
    addresses = [tensor.data_ptr() for tensor in again.state_dict().values()]
    assert len(set(addresses)) == len(addresses)
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])
