"""ExecuTorch files, for phones and boards: one fixed size, computed by XNNPACK where it can; the description lies beside them.

ExecuTorch is not one of deeplabzoo's extras: each of its releases asks for certain releases of torch.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.errors import DeepLabZooError
from deeplabzoo.inference.onnx_graph import Runner


def write_executorch(program: Any, path: Path, facts: Mapping[str, str]) -> None:
    """Lower an exported program for XNNPACK into `path`, with its description beside it; raises DeepLabZooError."""
    lowering, xnnpack = _library("executorch.exir"), _library("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    lowered = lowering.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    add_facts_beside(path, facts)


def add_facts_beside(path: Path, facts: Mapping[str, str]) -> None:
    """Put facts into the JSON file beside a .pte, which itself has no room for words."""
    beside = path.with_suffix(".json")
    known = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    beside.write_text(json.dumps({**known, **facts}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def executorch_runner(path: Path) -> Runner:
    """Open a .pte in ExecuTorch's own runtime for Python."""
    method = _library("executorch.runtime").Runtime.get().load_program(path).load_method("forward")
    return lambda image: method.execute([torch.from_numpy(image)])[0].numpy()


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise DeepLabZooError(
            "Writing ExecuTorch needs executorch; install it with `pip install executorch` (it may ask for another torch)."
        ) from None
