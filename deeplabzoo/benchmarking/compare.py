"""One network, one input: every side of ours and every peer in turns, after proof that they answer alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deeplabzoo.benchmarking.machine import gflop_of
from deeplabzoo.benchmarking.random_weights import made_pictures
from deeplabzoo.benchmarking.record import Row
from deeplabzoo.benchmarking.sides import TASKS, Side, Task, open_side
from deeplabzoo.benchmarking.subjects import Subject
from deeplabzoo.benchmarking.turns import in_turns
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
    net = subject.net
    image_BCHW = made_pictures(batch, size, plan.seed, net.config.in_chans).to(plan.device)
    names = (*plan.ours, *plan.peers)
    sides = {name: open_side(name, net, image_BCHW, threads=plan.threads, peer_precision=plan.peer_precision) for name in names}
    agreements = _agreements(subject, plan, sides, image_BCHW)
    gflop = gflop_of(net, image_BCHW)
    rows = []
    for task in plan.tasks:
        calls = {name: side.call(task, image_BCHW) for name, side in sides.items()}
        title = f"{subject.name} {size[0]}x{size[1]} batch {batch} {TASKS[task]}"
        times = in_turns(calls, plan.pairs, device=plan.device, name=title)
        for own in plan.ours:
            for peer in plan.peers or (None,):
                row = Row.paired(
                    times[own],
                    times[peer] if peer else None,
                    name=subject.name,
                    task=TASKS[task],
                    side=sides[own].title,
                    peer=sides[peer].title if peer else None,
                    size=size,
                    batch=batch,
                    threads=plan.threads,
                    agreement=agreements[own, peer] if peer else None,
                    figures=_figures(times[own], batch, gflop, plan),
                    note=subject.weights,
                )
                rows.append(row)
    return rows


def _agreements(
    subject: Subject, plan: Plan, sides: dict[str, Side], image_BCHW: torch.Tensor
) -> dict[tuple[str, str | None], float]:
    labels = {name: _array(side.labels(image_BCHW)) for name, side in sides.items()}
    found: dict[tuple[str, str | None], float] = {}
    for own in plan.ours:
        for peer in plan.peers:
            share = float((labels[own] == labels[peer]).mean())
            if share < _LEAST_AGREEMENT and own.endswith(":fp32") and plan.peer_precision == "fp32":
                raise UsageError(
                    f"{subject.name}: {sides[own].title} and {sides[peer].title} label only {100 * share:.2f} % of the pixels "
                    "alike, so they are not the same network, and were not timed."
                )
            found[own, peer] = share
    return found


def _figures(ours_ms: Sequence[float], batch: int, gflop: float, plan: Plan) -> dict[str, float]:
    """Return what follows from the median time; `gflop` is of the whole batch."""
    seconds = float(np.median(ours_ms)) / 1000
    speed = gflop / seconds
    figures = {"images_per_s": batch / seconds, "gflop": gflop, "gflop_per_s": speed}
    peak = plan.peaks.get(str(plan.threads))
    return figures | ({"share_of_gemm_peak": speed / peak} if peak else {})


def _array(labels_BHW: Any) -> Any:
    return labels_BHW.cpu().numpy() if isinstance(labels_BHW, torch.Tensor) else labels_BHW
