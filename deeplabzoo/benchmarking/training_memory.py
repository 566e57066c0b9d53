"""Peak memory of training on one side of the benchmark, in a process of its own that does nothing else.

`python -m deeplabzoo.benchmarking.training_memory FOLDER SIDE STEPS THREADS SETTINGS` is that process, and prints JSON.
"""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from deeplabzoo.benchmarking.training_settings import Settings, SideName
from deeplabzoo.benchmarking.training_sides import open_side
from deeplabzoo.errors import TrainingError


def memory_of(side: SideName, folder: Path, settings: Settings, *, steps: int, threads: int) -> dict[str, Any]:
    """Return the bytes that a fresh process needed at most for `steps` steps, and those it held before the first.

    On a GPU these are what torch allocated there, on a CPU the resident memory of the process. Raises TrainingError.
    """
    given = json.dumps(dataclasses.asdict(settings))
    words = [
        sys.executable,
        "-m",
        "deeplabzoo.benchmarking.training_memory",
        str(folder),
        side,
        str(steps),
        str(threads),
        given,
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"Memory of {side} could not be measured: {(done.stderr.strip().splitlines() or ['?'])[-1]}.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(folder: Path, side_name: SideName, settings: Settings, steps: int, threads: int) -> dict[str, Any]:
    import torch

    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    side = open_side(side_name, folder, settings)
    on_gpu = torch.device(settings.device).type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else _resident_peak()
    with side.settings():
        for batch in side.batches(steps):
            side.step(batch)
    peak = torch.cuda.max_memory_allocated() if on_gpu else _resident_peak()
    kind = "allocated on the GPU" if on_gpu else "resident, whole process"
    return {"kind": kind, "before_bytes": before, "peak_bytes": peak, "steps": steps}


def _resident_peak() -> int:
    """Return this process's largest resident size in bytes.

    `ru_maxrss` is the same figure, but on Linux a new process starts with its parent's; the kernel's own line does not.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    if kilobytes:
        return 1024 * kilobytes[0]
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


if __name__ == "__main__":
    place, wanted, count, cores, plain = sys.argv[1:]
    print(json.dumps(_measured(Path(place), wanted, Settings(**json.loads(plain)), int(count), int(cores))))  # type: ignore[arg-type]
