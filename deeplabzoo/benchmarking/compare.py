"""One network, one input: every side of ours and every peer in turns, after proof that they answer alike."""

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

from deeplabzoo.benchmarking.machine import gflop_of
from deeplabzoo.benchmarking.random_weights import made_pictures
from deeplabzoo.benchmarking.record import Row, Spread
from deeplabzoo.benchmarking.sides import TASKS, Task, require_size
from deeplabzoo.benchmarking.subjects import Subject
from deeplabzoo.benchmarking.turns import alternate
from deeplabzoo.benchmarking.worker import Worker
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.say import say
from deeplabzoo.zoo.exporting import LIBRARIES

_LEAST_AGREEMENT = 0.999
"""Of labels, between two float32 sides: below it they are not the same network (the rest are near ties)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of every network."""

    ours: tuple[str, ...]
    """`ENGINE:PRECISION`."""
    peers: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    tasks: tuple[Task, ...]
    device: torch.device
    threads: int
    pairs: int
    seed: int
    calibration: Path | None = None
    """Folder of photos, for int8."""
    memory: bool = False
    """Also the peak above the loaded network."""
    peer_precision: str = "fp32"
    peaks: dict[str, float]
    """GEMM peak in GFLOP/s by number of threads."""


def peers_of(subject: Subject, peers: Sequence[str]) -> tuple[str, ...]:
    """Return those of the peers that have this network, and say whom that leaves out; raises UsageError where none is left."""
    missing: dict[str, str] = {}
    for peer in peers:
        if peer in LIBRARIES:
            try:
                LIBRARIES[peer](subject.net)
            except WeightsError as error:
                missing[peer] = str(error)
    if missing and len(missing) == len(peers):
        raise UsageError(f"No peer of {', '.join(peers)} has a counterpart of {subject.name}: {' '.join(missing.values())}")
    for peer, reason in missing.items():
        say(f"{subject.name}: without {peer}, which has no counterpart ({reason.rstrip('.')})")
    return tuple(peer for peer in peers if peer not in missing)


def compare(subject: Subject, plan: Plan, size: tuple[int, int], batch: int) -> list[Row]:
    """Return a row for each task, side of ours and peer (or for the side alone, where no peer is asked for).

    Raises UsageError, before anything is timed, where a side cannot be had or where float32 sides label differently.
    """
    for whom in plan.peers:
        require_size(whom, subject.net, size)
    names = (*plan.ours, *plan.peers)
    channels = subject.net.config.in_chans
    gflop = gflop_of(subject.net, made_pictures(batch, size, plan.seed, channels))
    with tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place, contextlib.ExitStack() as stack:
        weights = Path(place) / "weights.safetensors"
        subject.net.save(weights)
        given = {
            "weights": str(weights),
            "size": size,
            "batch": batch,
            "threads": plan.threads,
            "device": str(plan.device),
            "seed": plan.seed,
            "peer_precision": plan.peer_precision,
            "memory": plan.memory,
            "calibration": str(plan.calibration) if plan.calibration else None,
        }
        workers = {name: stack.enter_context(Worker({**given, "side": name})) for name in names}
        agreements = _agreements(subject, plan, workers)
        shared: dict[str, Any] = {
            "name": subject.name,
            "size": size,
            "batch": batch,
            "threads": plan.threads,
            "note": subject.weights,
        }
        rows = []
        for task in plan.tasks if plan.pairs else ():
            title = f"{subject.name} {size[0]}x{size[1]} batch {batch} {TASKS[task]}"
            turns = {name: functools.partial(worker.turn, task) for name, worker in workers.items()}
            times = alternate(turns, plan.pairs, name=title)
            for own, peer in itertools.product(plan.ours, plan.peers or (None,)):
                row = Row.paired(
                    times[own],
                    times[peer] if peer else None,
                    task=TASKS[task],
                    side=workers[own].facts["title"],
                    peer=workers[peer].facts["title"] if peer else None,
                    agreement=agreements[own, peer] if peer else None,
                    figures=_figures(times[own], batch, gflop, plan) | {"start_s": workers[own].facts["start_s"]},
                    **shared,
                )
                rows.append(row)
        if plan.memory:
            facts = {name: worker.facts for name, worker in workers.items()}
            pairs = itertools.product(plan.ours, plan.peers or (None,))
            rows += [Row(**_memory(facts[own], facts[peer] if peer else None), **shared) for own, peer in pairs]
        return rows


def _memory(ours: Mapping[str, Any], peer: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a row says of two sides' memory; the ratio is the peer's peak over ours."""
    figures = {name: ours[name] for name in ("peak_mb", "loaded_mb")}
    values: dict[str, Any] = {"task": "peak memory, image -> labels", "side": ours["title"], "figures": figures}
    if peer is None:
        return values
    figures |= {f"peer_{name}": peer[name] for name in ("peak_mb", "loaded_mb")}
    ratio = Spread.of([peer["peak_mb"] / ours["peak_mb"]]) if ours["peak_mb"] else None
    return values | {"peer": peer["title"], "ratio": ratio}


def _agreements(subject: Subject, plan: Plan, workers: Mapping[str, Worker]) -> dict[tuple[str, str | None], float]:
    labels = {name: worker.labels() for name, worker in workers.items()} if plan.peers else {}
    found: dict[tuple[str, str | None], float] = {}
    for own, peer in itertools.product(plan.ours, plan.peers):
        share = float((labels[own] == labels[peer]).mean())
        if share < _LEAST_AGREEMENT and own.endswith(":fp32") and plan.peer_precision == "fp32":
            raise UsageError(
                f"{subject.name}: {workers[own].facts['title']} and {workers[peer].facts['title']} label only "
                f"{100 * share:.2f} % of the pixels alike, so they are not the same network, and were not timed."
            )
        found[own, peer] = share
    return found


def _figures(ours_ms: Sequence[float], batch: int, gflop: float, plan: Plan) -> dict[str, float]:
    """Return what follows from the median time; `gflop` is of the whole batch."""
    seconds = statistics.median(ours_ms) / 1000
    speed = gflop / seconds
    figures = {"images_per_s": batch / seconds, "gflop": gflop, "gflop_per_s": speed}
    peak = plan.peaks.get(str(plan.threads))
    return figures | ({"share_of_gemm_peak": speed / peak} if peak else {})
