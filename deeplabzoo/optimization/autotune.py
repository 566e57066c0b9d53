"""`engine="auto"`: the installed engines timed on one image, and the answer kept for next time."""

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.errors import DeepLabZooError
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.hub.download import cache_folder
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.optimized_model import OptimizedDeepLab, build_optimized, optimize, unsupported_reason

_CANDIDATES = {"torch": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
"""Engine -> the module that it needs; `compiled` is left out, as its start-up outlasts most work."""
_ROUNDS = 5
_VERSIONED_PACKAGES = ("deeplabzoo", "torch", "onnxruntime", "openvino")
_build_lock = threading.Lock()


@dataclass(frozen=True)
class EngineTime:
    """How long one engine took from tensor to labels; `milliseconds` is None, and `refused` says why, where it cannot run."""

    engine: str
    milliseconds: float | None
    """Median."""
    start_up_seconds: float
    refused: str | None = None


def measure_engines(
    net: DeepLab, size: tuple[int, int] | None = None, precision: str = "fp32", *, rounds: int = _ROUNDS
) -> list[EngineTime]:
    """Time every installed engine on one image of `size` (height, width), from tensor to labels, fastest first.

    The engines take turns, so that what else the machine does meets all of them; `compiled` is not among them. An engine that
    cannot run this network or precision is listed last with its reason.
    """
    height, width = size or net.preprocessing.size
    image_BCHW = torch.randn(1, net.config.in_chans, height, width, generator=torch.Generator().manual_seed(0))
    image_BCHW = image_BCHW.to(net.device)
    ready: dict[str, tuple[OptimizedDeepLab, float]] = {}
    refused: list[EngineTime] = []
    for engine in _installed_engines(net):
        started = time.perf_counter()
        try:
            fast = optimize(net, engine, precision=precision)
            fast.predict_labels(image_BCHW)  # the first call packs, plans and fills caches
            fast.predict_labels(image_BCHW)
        except DeepLabZooError as error:
            refused.append(EngineTime(engine, None, time.perf_counter() - started, str(error)))
        else:
            ready[engine] = (fast, time.perf_counter() - started)
    times: dict[str, list[float]] = {engine: [] for engine in ready}
    for _ in range(rounds):
        for engine, (fast, _start_up) in ready.items():
            started = time.perf_counter()
            fast.predict_labels(image_BCHW).cpu()
            times[engine].append(1000 * (time.perf_counter() - started))
    measured = [EngineTime(engine, statistics.median(times[engine]), start_up) for engine, (_, start_up) in ready.items()]
    return sorted(measured, key=lambda one: one.milliseconds or 0.0) + refused


def fastest_engine(net: DeepLab, size: tuple[int, int] | None = None, precision: str = "fp32") -> str:
    """Return the fastest installed engine, measured now or, by the cache, before; says which and how fast.

    Raises DeepLabZooError where none can run.
    """
    known = cached_engine(net, size, precision)
    if known is not None:
        return known
    table = measure_engines(net, size, precision)
    best = table[0] if table else None
    if best is None or best.milliseconds is None:
        reasons = " ".join(one.refused or "" for one in table)
        raise DeepLabZooError(f"No installed engine runs this network in {precision}: {reasons}")
    shown = ", ".join(f"{one.engine} {one.milliseconds:.0f} ms" for one in table if one.milliseconds is not None)
    height, width = size or net.preprocessing.size
    logger.info(f"engine auto: {best.engine} ({shown}; {precision}, {width} x {height}, {torch.get_num_threads()} threads)")
    row = {"engine": best.engine, "milliseconds": {one.engine: one.milliseconds for one in table}}
    content = (json.dumps(row, indent=2) + "\n").encode()
    path = _cache_file(net, size, precision)
    try:
        ensure_folder(path.parent)
        write_atomically(path, lambda file: file.write(content))
    except DeepLabZooError as error:
        logger.info(f"engine auto: the choice is not kept for next time ({error})")
    return best.engine


def cached_engine(net: DeepLab, size: tuple[int, int] | None = None, precision: str = "fp32") -> str | None:
    """Return what an earlier measurement chose for this network, size, precision, thread count, versions and machine."""
    try:
        engine = json.loads(_cache_file(net, size, precision).read_text(encoding="utf-8"))["engine"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return engine if engine in _installed_engines(net) else None


def _installed_engines(net: DeepLab) -> list[str]:
    present = [engine for engine, module in _CANDIDATES.items() if importlib.util.find_spec(module) is not None]
    return present if net.device.type == "cpu" else ["torch"]


def _cache_file(net: DeepLab, size: tuple[int, int] | None, precision: str) -> Path:
    key: dict[str, Any] = {
        "config": net.config.to_dict(),
        "size": list(size or net.preprocessing.size),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "device": str(net.device),
        "versions": {name: _version(name) for name in _VERSIONED_PACKAGES},
        "machine": [platform.node(), platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "engines" / f"{digest[:32]}.json"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class OptimizedModelCache:
    """A network's inference form that follows the network: made at the first use, and again after its weights changed.

    Any number of threads may ask for it: one makes it, and those that come meanwhile wait for that one.

    `auto` means the engine of an earlier measurement, else torch: whoever labels one photo waits for no measurement. A network
    that answers in its own way runs as it is.
    """

    def __init__(self, net: DeepLab, engine: str, precision: str) -> None:
        self.net, self.precision = net, precision
        self.engine = engine
        self._made: OptimizedDeepLab | None = None
        self._logged = ""

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without the form: engines stay where they are, and it is made again there."""
        return {**self.__dict__, "_made": None}

    def current(self) -> DeepLab | OptimizedDeepLab:
        """Return the optimized model of the current weights, or the model itself where it cannot be optimized."""
        made = self._made
        if made is not None and made.current:  # without the lock: a process forked now would inherit it, held
            return made
        if reason := unsupported_reason(self.net):
            if reason != self._logged:
                logger.warning(f"running the model without layer fusion, since {reason}")
                self._logged = reason
            return self.net
        with _build_lock:
            if self._made is None or not self._made.current:
                engine = self.engine
                if engine == "auto":
                    engine = cached_engine(self.net, None, self.precision) or "torch"
                self._made = build_optimized(self.net, engine, precision=self.precision)
            return self._made
