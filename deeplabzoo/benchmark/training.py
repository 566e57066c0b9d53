"""`python -m deeplabzoo.benchmark --train`: training steps against torchvision's reference recipe.

Both sides train the same model from the same weights on the same generated images at the same batch size, crop, scales and
number of workers. Their rounds are interleaved (A B A B …) in one process; each round begins with warm-up steps, and its data
loader ends with it, so that no prefetching overlaps another side's round. Peak memory is measured in separate processes.
"""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.benchmark import TRAINING_BACKENDS, TRAINING_MODELS, BackendName
from deeplabzoo.benchmark.models import write_synthetic_voc
from deeplabzoo.benchmark.record import conditions, count_noun, table_line
from deeplabzoo.benchmark.training_backends import (
    Settings,
    TrainingBackend,
    open_training_backend,
    write_networks,
)
from deeplabzoo.device import choose_device
from deeplabzoo.errors import TrainingError, UsageError
from deeplabzoo.log import logger

# Peak memory of one side, in a process of its own: `python -m deeplabzoo.benchmark.training FOLDER SIDE STEPS THREADS SETTINGS`
# prints it as JSON.


def memory_of(backend: BackendName, folder: Path, settings: Settings, *, steps: int, threads: int) -> dict[str, Any]:
    """Return the peak memory in bytes of a fresh process during `steps` steps, and its memory before the first.

    On a GPU this is torch's allocated memory, on a CPU the resident memory of the process. Raises TrainingError.
    """
    given = json.dumps(dataclasses.asdict(settings))
    command = [
        sys.executable,
        "-m",
        "deeplabzoo.benchmark.training",
        str(folder),
        backend,
        str(steps),
        str(threads),
        given,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"Memory of {backend} could not be measured: {(done.stderr.strip().splitlines() or ['?'])[-1]}.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(folder: Path, side_name: BackendName, settings: Settings, steps: int, threads: int) -> dict[str, Any]:
    import torch

    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    backend = open_training_backend(side_name, folder, settings)
    on_gpu = torch.device(settings.device).type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else _resident_peak()
    with backend.settings():
        for batch in backend.batches(steps):
            backend.step(batch)
    peak = torch.cuda.max_memory_allocated() if on_gpu else _resident_peak()
    kind = "allocated on the GPU" if on_gpu else "resident, whole process"
    return {"kind": kind, "before_bytes": before, "peak_bytes": peak, "steps": steps}


def _resident_peak() -> int:
    """Return this process's peak resident memory in bytes.

    On Linux it is read from /proc, because `ru_maxrss` of a new process starts at its parent's value.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    if kilobytes:
        return 1024 * kilobytes[0]
    import resource  # POSIX only

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


# The recorded training benchmarks as tables.

BLOCK = "training-table"
_HEADER = (
    "training",
    "images/s, end to end",
    "ratio to torchvision",
    "data wait, ms per step",
    "step, ms",
    "peak memory, MB",
    "MB before the first step",
)


def records_table(folder: Path) -> str:
    """Return the tables of all records of a folder, sorted by file name; raises UsageError for an invalid record."""
    files = sorted(folder.glob("*.json"))
    try:
        tables = [f"`{file.name}`: {record_table(json.loads(file.read_text(encoding='utf-8')))}" for file in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"A file in '{folder}' is not a record of training_step: {error!r}.") from None
    return "\n\n".join(tables) or "No run is recorded yet."


def record_table(record: dict[str, Any]) -> str:
    """Return one record: its conditions, a line per side, and the command that reproduces it."""
    given, machine, versions = record["settings"], record["hardware"], record["versions"]
    where = machine.get("gpu") or machine["cpu"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "deeplabzoo"))
    conditions = (
        f"{record['model']} ({record['same_network']['parameters'] / 1e6:.2f} M parameters), batch {given['batch']}, "
        f"crop {given['crop']}, {given['workers']} workers, {where}, {count_noun(record['threads'], 'thread')}; "
        f"{given['rounds']} rounds of {given['steps']} steps each; {libraries}; {record['date'][:10]}, "
        f"commit {_commit(record['commit'])}."
    )
    lines = [table_line(_HEADER), table_line(["---"] * len(_HEADER))]
    for name, title in TRAINING_BACKENDS.items():
        if name in record["sides"]:
            lines.append(table_line([title, *_cells(record["sides"][name], record["against_torchvision"].get(name))]))
    return "\n".join([conditions, "", *lines, "", f"Reproduce: `{record['command']}`"])


def _cells(backend: dict[str, Any], ratio: dict[str, float] | None) -> list[str]:
    memory = backend["memory"]
    return [
        _spread_cell(backend["images_per_s"], 2),
        _spread_cell(ratio, 2) if ratio else "1",
        _spread_cell(backend["data_ms_per_step"], 0),
        _spread_cell(backend["step_ms"], 0),
        f"{memory['peak_bytes'] / 1e6:.0f}",
        f"{memory['before_bytes'] / 1e6:.0f}",
    ]


def _spread_cell(values: dict[str, float], digits: int) -> str:
    """Return the median with the smallest and largest round."""
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def _commit(text: str | None) -> str:
    commit, _, changes = (text or "unknown").partition(" ")
    return f"{commit[:12]} {changes}".strip()


_BF16_FLAGS = ("avx512_bf16", "amx_bf16")
_MAX_DIFFERENCE = 1e-4


def measure(settings: Settings, sides: Sequence[BackendName]) -> dict[str, Any]:
    """Return the record of a benchmark: conditions, every round of every side, medians and ranges, and memory."""
    device = choose_device(settings.device)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place:
        folder = Path(place)
        write_synthetic_voc(folder, train=settings.images, val=1, seed=settings.seed, longest=settings.longest)
        same = write_networks(folder, settings)
        if same["largest_logit_difference"] > _MAX_DIFFERENCE:
            raise UsageError(f"The two models are not the same: their logits differ by {same['largest_logit_difference']}.")
        memory = {name: memory_of(name, folder, settings, steps=settings.memory_steps, threads=threads) for name in sides}
        opened = {name: open_training_backend(name, folder, settings) for name in sides}
        turns: dict[BackendName, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(settings.rounds):
            for name, backend in opened.items():
                turns[name].append(_run_round(backend, settings, device))
            speeds = ", ".join(f"{name} {turns[name][-1]['images_per_s']:.2f}" for name in sides)
            logger.info(f"round {number + 1} of {settings.rounds}, images per second: {speeds}")
    return {
        "benchmark": "training_step",
        "model": settings.model,
        "torchvision_model": TRAINING_MODELS[settings.model],
        "same_network": same,
        "settings": {
            "device": settings.device,
            "batch": settings.batch,
            "crop": settings.crop,
            "base": settings.base,
            "scales": [0.5, 2.0],
            "workers": settings.workers,
            "seed": settings.seed,
            "photos": settings.images,
            "longest": settings.longest,
            "rounds": settings.rounds,
            "steps": settings.steps,
            "warmup": settings.warmup,
            "flush_denormal": True,
        },
        "sides": {name: {**_summary(turns[name]), "memory": memory[name], "turns": turns[name]} for name in sides},
        "against_torchvision": _ratios(turns),
        **conditions(device),
    }


def _run_round(backend: TrainingBackend, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Train `warmup` + `steps` steps and return the times of the latter: waiting for data, train steps, and the whole."""
    steps, warmup = settings.steps, settings.warmup
    data_s: list[float] = []
    step_times: list[Callable[[], float]] = []
    images, started, seconds = 0, 0.0, 0.0
    with backend.settings():
        loader = iter(backend.batches(warmup + steps))
        for number in range(warmup + steps):
            if number == warmup:
                _finish(device)
                started = time.perf_counter()
            asked = time.perf_counter()
            batch = next(loader)
            given = time.perf_counter()
            with _timed(device) as step_time:
                backend.step(batch)
            if number >= warmup:
                images += backend.num_images(batch)
                data_s.append(given - asked)
                step_times.append(step_time)
        _finish(device)
        seconds = time.perf_counter() - started
        assert next(loader, None) is None, "a round's data loader must end with the round"
    step_s = [read() for read in step_times]
    return {"pictures": images, "seconds": seconds, "images_per_s": images / seconds, "data_s": data_s, "step_s": step_s}


@contextlib.contextmanager
def _timed(device: torch.device) -> Iterator[Callable[[], float]]:
    """Time the block; the yielded function returns its seconds, on a GPU by events."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield lambda: float(begin.elapsed_time(end)) / 1000
        end.record()
        return
    times = [time.perf_counter()]
    yield lambda: times[1] - times[0]
    times.append(time.perf_counter())


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return median, smallest and largest of the rounds; data and step times are means of each round."""
    return {
        "images": sum(turn["pictures"] for turn in turns),
        "images_per_s": _spread([turn["images_per_s"] for turn in turns]),
        "data_ms_per_step": _spread([1000 * statistics.fmean(turn["data_s"]) for turn in turns]),
        "step_ms": _spread([1000 * statistics.fmean(turn["step_s"]) for turn in turns]),
    }


def _ratios(turns: dict[BackendName, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return each side's images per second divided by torchvision's in the same round."""
    if "torchvision" not in turns:
        return {}
    theirs = [turn["images_per_s"] for turn in turns["torchvision"]]
    return {
        name: _spread([turn["images_per_s"] / other for turn, other in zip(own, theirs, strict=True)])
        for name, own in turns.items()
        if name != "torchvision"
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def select_backends(wanted: Sequence[BackendName] | None, device: torch.device) -> list[BackendName]:
    """Return the sides to measure: those given, else all that this machine computes natively."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        flags = []
    native = any(flag in flags for flag in _BF16_FLAGS) if device.type == "cpu" else device.type == "cuda"
    if wanted and "ours_bf16" in wanted and not native:
        raise UsageError(f"This processor has none of {', '.join(_BF16_FLAGS)}; omit ours_bf16.")
    return [name for name in TRAINING_BACKENDS if (name in wanted if wanted else name != "ours_bf16" or native)]


if __name__ == "__main__":
    place, wanted, count, cores, plain = sys.argv[1:]
    print(json.dumps(_measured(Path(place), wanted, Settings(**json.loads(plain)), int(count), int(cores))))  # type: ignore[arg-type]
