"""Graphs that engines run, written once per network and kept in the package's cache: a second start reads a file."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

import deeplabzoo
from deeplabzoo.inference.onnx_graph import OPSET, Runner, onnx_bytes, require_parity
from deeplabzoo.inference.report import tensors_sha256
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.output import ensure_folder, write_atomically
from deeplabzoo.say import say
from deeplabzoo.zoo.hub import cache_folder

_LAYOUT = 1
"""Raised when the graph of an unchanged network is written differently."""


def cached_graph(net: DeepLab, runner_of: Callable[[bytes], Runner]) -> Path:
    """Return the file of the network's low-resolution graph (`onnx_graph.GraphForm`, output `low`).

    Written where it is not there yet, after `runner_of` has run it and it agreed with the network; one line says so, with the
    time that it took. Raises what `onnx_bytes` and `require_parity` raise, OutputError where the cache cannot be written.
    """
    path = cache_folder() / "graphs" / f"{graph_key(net)}.onnx"
    if path.is_file():
        return path
    ensure_folder(path.parent)
    started = time.perf_counter()
    model = onnx_bytes(net, "low")
    apart = require_parity(net, runner_of(model), "low")
    write_atomically(path, lambda file: file.write(model))
    seconds = time.perf_counter() - started
    say(f"ONNX graph written in {seconds:.1f} s, {apart:.0e} from the network (kept as {path})")
    return path


def graph_key(net: DeepLab) -> str:
    """Return a name for the graph of this network: equal for equal weights and configuration, under the same versions."""
    facts = {
        "tensors": tensors_sha256(net),
        "config": net.config.to_dict(),
        "versions": [_LAYOUT, OPSET, deeplabzoo.__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
