"""Interleaved comparison of our backends and the peers on one model and input, after a check that their labels agree."""

import contextlib
import functools
import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.benchmark import TASKS, Task
from deeplabzoo.benchmark.backends import require_size
from deeplabzoo.benchmark.models import BenchmarkModel, synthetic_images
from deeplabzoo.benchmark.record import Row, Spread
from deeplabzoo.benchmark.timing import Worker, gflop_of, interleave_timings
from deeplabzoo.checkpoints.conversion import LIBRARIES
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.log import logger

_MIN_AGREEMENT = 0.999
"""Share of equal labels of two float32 backends, below which they are not the same model (the rest are near ties)."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Settings of a comparison, the same for every model."""

    ours: tuple[str, ...]
    """`BACKEND:PRECISION`."""
    peers: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    tasks: tuple[Task, ...]
    device: torch.device
    threads: int
    pairs: int
    seed: int
    calibration: Path | None = None
    """Folder of images for int8."""
    memory: bool = False
    """Whether to measure peak memory above the loaded model."""
    peer_precision: str = "fp32"
    peaks: dict[str, float]
    """GEMM peak in GFLOP/s by number of threads."""


def available_peers(model: BenchmarkModel, peers: Sequence[str]) -> tuple[str, ...]:
    """Return the peers with an equivalent model and warn about the others; raises UsageError if none is left."""
    missing: dict[str, str] = {}
    for peer in peers:
        if peer in LIBRARIES:
            try:
                LIBRARIES[peer](model.net)
            except WeightsError as error:
                missing[peer] = str(error)
    if missing and len(missing) == len(peers):
        raise UsageError(f"No peer of {', '.join(peers)} has a counterpart of {model.name}: {' '.join(missing.values())}")
    for peer, reason in missing.items():
        logger.warning(f"{model.name}: skipping {peer}, which has no counterpart ({reason.rstrip('.')})")
    return tuple(peer for peer in peers if peer not in missing)


def compare(model: BenchmarkModel, config: ComparisonConfig, size: tuple[int, int], batch: int) -> list[Row]:
    """Return a row for each task, backend of ours and peer (without peers, for the backend alone).

    Raises UsageError before timing if a backend is not available or if float32 backends disagree on labels.
    """
    for whom in config.peers:
        require_size(whom, model.net, size)
    names = (*config.ours, *config.peers)
    channels = model.net.config.in_chans
    gflop = gflop_of(model.net, synthetic_images(batch, size, config.seed, channels))
    with tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place, contextlib.ExitStack() as stack:
        weights = Path(place) / "weights.safetensors"
        model.net.save(weights)
        given = {
            "weights": str(weights),
            "size": size,
            "batch": batch,
            "threads": config.threads,
            "device": str(config.device),
            "seed": config.seed,
            "peer_precision": config.peer_precision,
            "memory": config.memory,
            "calibration": str(config.calibration) if config.calibration else None,
        }
        workers = {name: stack.enter_context(Worker({**given, "side": name})) for name in names}
        agreements = _agreements(model, config, workers)
        shared: dict[str, Any] = {
            "name": model.name,
            "size": size,
            "batch": batch,
            "threads": config.threads,
            "note": model.weights,
        }
        rows = []
        for task in config.tasks if config.pairs else ():
            title = f"{model.name} {size[0]}x{size[1]} batch {batch} {TASKS[task]}"
            timers = {name: functools.partial(worker.time_call, task) for name, worker in workers.items()}
            times = interleave_timings(timers, config.pairs, name=title)
            for own, peer in itertools.product(config.ours, config.peers or (None,)):
                row = Row.paired(
                    times[own],
                    times[peer] if peer else None,
                    task=TASKS[task],
                    side=workers[own].facts["title"],
                    peer=workers[peer].facts["title"] if peer else None,
                    agreement=agreements[own, peer] if peer else None,
                    figures=_derived_metrics(times[own], batch, gflop, config) | {"start_s": workers[own].facts["start_s"]},
                    **shared,
                )
                rows.append(row)
        if config.memory:
            facts = {name: worker.facts for name, worker in workers.items()}
            pairs = itertools.product(config.ours, config.peers or (None,))
            rows += [Row(**_memory(facts[own], facts[peer] if peer else None), **shared) for own, peer in pairs]
        return rows


def _memory(ours: Mapping[str, Any], peer: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the memory fields of a row; the ratio is the peer's peak divided by ours."""
    figures = {name: ours[name] for name in ("peak_mb", "loaded_mb")}
    values: dict[str, Any] = {"task": "peak memory, image -> labels", "side": ours["title"], "figures": figures}
    if peer is None:
        return values
    figures |= {f"peer_{name}": peer[name] for name in ("peak_mb", "loaded_mb")}
    ratio = Spread.of([peer["peak_mb"] / ours["peak_mb"]]) if ours["peak_mb"] else None
    return values | {"peer": peer["title"], "ratio": ratio}


def _agreements(
    model: BenchmarkModel, config: ComparisonConfig, workers: Mapping[str, Worker]
) -> dict[tuple[str, str | None], float]:
    labels = {name: worker.labels() for name, worker in workers.items()} if config.peers else {}
    found: dict[tuple[str, str | None], float] = {}
    for own, peer in itertools.product(config.ours, config.peers):
        share = float((labels[own] == labels[peer]).mean())
        if share < _MIN_AGREEMENT and own.endswith(":fp32") and config.peer_precision == "fp32":
            raise UsageError(
                f"{model.name}: {workers[own].facts['title']} and {workers[peer].facts['title']} agree on only "
                f"{100 * share:.2f} % of the labels, so they are not the same model and were not timed."
            )
        found[own, peer] = share
    return found


def _derived_metrics(own_times_ms: Sequence[float], batch: int, gflop: float, config: ComparisonConfig) -> dict[str, float]:
    """Return the values derived from the median time; `gflop` is of the whole batch."""
    seconds = statistics.median(own_times_ms) / 1000
    speed = gflop / seconds
    figures = {"images_per_s": batch / seconds, "gflop": gflop, "gflop_per_s": speed}
    peak = config.peaks.get(str(config.threads))
    return figures | ({"share_of_gemm_peak": speed / peak} if peak else {})
