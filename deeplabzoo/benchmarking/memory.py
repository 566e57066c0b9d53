"""Peak memory of one call above the loaded network, each side in a process of its own that does nothing else.

`python -m deeplabzoo.benchmarking.memory JSON` is that process. On a CPU the figure is how far the resident memory rose
above what it was when the network was loaded and its libraries had started (a small picture had gone through); on a GPU it is
what torch allocated.
"""

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.benchmarking.compare import Plan
from deeplabzoo.benchmarking.random_weights import made_pictures
from deeplabzoo.benchmarking.record import Row, Spread
from deeplabzoo.benchmarking.runtimes import RUNTIMES
from deeplabzoo.benchmarking.sides import open_side
from deeplabzoo.benchmarking.subjects import open_subject
from deeplabzoo.benchmarking.turns import denormals_flushed
from deeplabzoo.errors import UsageError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_SMALL = 64
_CALLS = 2


def compare_memory(name: str, plan: Plan, size: tuple[int, int], batch: int) -> list[Row]:
    """Return a row for each side of ours and each peer: `peak_mb`, `loaded_mb`, and their peak over ours as the ratio.

    Raises UsageError where the system does not say a process's peak, or a side cannot be had.
    """
    found = {side: _of_process(name, side, plan, size, batch) for side in (*plan.ours, *plan.peers)}
    rows = []
    for own in plan.ours:
        for peer in plan.peers or (None,):
            mine, other = found[own], found[peer] if peer else None
            figures = {"peak_mb": mine["peak_mb"], "loaded_mb": mine["loaded_mb"]}
            if other:
                figures |= {"peer_peak_mb": other["peak_mb"], "peer_loaded_mb": other["loaded_mb"]}
            ratio = other["peak_mb"] / mine["peak_mb"] if other and mine["peak_mb"] else None
            row = Row(
                name=name,
                task="peak memory, image -> labels",
                side=mine["title"],
                peer=other["title"] if other else None,
                size=size,
                batch=batch,
                threads=plan.threads,
                ratio=Spread.of([ratio]) if ratio else None,
                figures=figures,
                note="above the loaded network, a process each",
            )
            rows.append(row)
    return rows


def _of_process(name: str, side: str, plan: Plan, size: tuple[int, int], batch: int) -> dict[str, Any]:
    given = {
        "name": name,
        "side": side,
        "size": size,
        "batch": batch,
        "threads": plan.threads,
        "device": str(plan.device),
        "seed": plan.seed,
        "peer_precision": plan.peer_precision,
    }
    words = [sys.executable, "-m", "deeplabzoo.benchmarking.memory", json.dumps(given)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1].removeprefix("error: ")
        raise UsageError(f"Memory of {side} with {name} could not be measured: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(given: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(given["threads"])
    device = torch.device(given["device"])
    net = open_subject(given["name"], given["seed"]).net
    image_BCHW = made_pictures(given["batch"], tuple(given["size"]), given["seed"], net.config.in_chans).to(device)
    side = open_side(given["side"], net, image_BCHW, threads=given["threads"], peer_precision=given["peer_precision"])
    if given["side"] not in RUNTIMES:  # those take one shape alone
        side.labels(image_BCHW[:, :, :_SMALL, :_SMALL])
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        _give_back()
        before = _kilobytes("VmRSS") * 1024
        _CLEAR.write_text(_RESET_PEAK)
    for _ in range(_CALLS):
        side.labels(image_BCHW)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _kilobytes("VmHWM") * 1024
    return {"title": side.title, "loaded_mb": before / 1e6, "peak_mb": (peak - before) / 1e6}


def _give_back() -> None:
    """Return freed memory to the system, so that the call cannot hide in what loading left behind (glibc alone keeps it)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _kilobytes(field: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        raise UsageError("Peak memory is read from /proc/self/status, which only Linux has.") from None


def main(argv: Sequence[str]) -> int:
    """Measure what the JSON in the first argument describes and print the result as JSON."""
    with denormals_flushed():
        print(json.dumps(_measured(json.loads(argv[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
