"""Interleaved timing, peak memory and FLOP counts; each backend runs in a worker process of its own.

Separate processes keep what a library changes in its process (allocator, thread pools, switches of torch) from the others.
`python -m deeplabzoo.benchmark.timing JSON` is a worker; it reads one line of JSON per request and answers with one.
"""

import contextlib
import ctypes
import functools
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import deeplabzoo
from deeplabzoo.benchmark import Task
from deeplabzoo.benchmark.backends import RUNTIMES, Backend, open_backend
from deeplabzoo.benchmark.models import synthetic_images
from deeplabzoo.benchmark.record import all_threads_flush_denormals
from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.optimization.cpu_runtime import flush_denormals

# Interleaved times A B A B …, so that drift of the machine's speed affects all sides alike.

_SETTLE_S = 0.02
"""Pause before each run: worker threads of the previous side (OpenMP, ONNX Runtime) spin for a while."""
_MIN_TIMING_S = 0.1
"""Shorter calls are repeated until a run takes this long; its time is the mean per call."""
_MAX_CALLS = 1000


def interleave_timings(
    timers: Mapping[str, Callable[[], float]], pairs: int, *, name: str = "measure"
) -> dict[str, list[float]]:
    """Return the times of each side; each of `pairs` rounds runs every side once, in the given order.

    Raises UsageError for less than one pair.
    """
    if pairs < 1:
        raise UsageError(f"--pairs must be at least 1, not {pairs}.")
    times: dict[str, list[float]] = {side: [] for side in timers}
    with tqdm(total=len(timers) * pairs, desc=name, unit="run", leave=False, disable=None) as progress:
        for _ in range(pairs):
            for side, take in timers.items():
                progress.set_postfix_str(side)
                times[side].append(take())
                progress.update()
    return times


def interleave(
    functions: Mapping[str, Callable[[], object]], pairs: int, *, device: torch.device | None = None, name: str = "measure"
) -> dict[str, list[float]]:
    """Return milliseconds per call, one value per run, of functions of this process; each is called once for warm-up.

    Raises UsageError for less than one pair.
    """
    for call in functions.values():
        call()
    timers = {side: functools.partial(time_call, call, device) for side, call in functions.items()}
    return interleave_timings(timers, pairs, name=name)


def time_call(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Return milliseconds per call: a pause, one warm-up call, then timed calls (by events on a GPU)."""
    time.sleep(_SETTLE_S)
    call()
    if device is not None and device.type == "cuda":
        return _on_gpu(call, device)
    begun = time.perf_counter()
    call()
    once = time.perf_counter() - begun
    more = min(_MAX_CALLS, int(_MIN_TIMING_S / max(once, 1e-9)))
    begun_again = time.perf_counter()
    for _ in range(more):
        call()
    seconds = once + (time.perf_counter() - begun_again)
    return 1000 * seconds / (1 + more)


def _on_gpu(call: Callable[[], object], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    calls = 1
    while True:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        milliseconds = float(begin.elapsed_time(end))
        if milliseconds >= 1000 * _MIN_TIMING_S or calls >= _MAX_CALLS:
            return milliseconds / calls
        calls = min(_MAX_CALLS, max(2 * calls, int(calls * 1000 * _MIN_TIMING_S / max(milliseconds, 1e-3))))


# Peak memory of a call: resident memory on a CPU, torch's allocations on a GPU.

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_of(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return `loaded_mb` (before the call) and `peak_mb` (above it); libraries should have been used before.

    Freed memory is returned to the system first, or the call could reuse what loading left behind. Raises UsageError on a CPU
    if the system does not report a process's peak.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return _megabytes(before, torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, AttributeError):  # only glibc keeps freed memory
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident("VmRSS")
    _CLEAR.write_text(_RESET_PEAK)
    call()
    return _megabytes(before, _resident("VmHWM"))


def _megabytes(before: int, peak: int) -> dict[str, float]:
    return {"loaded_mb": before / 1e6, "peak_mb": (peak - before) / 1e6}


def _resident(field: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        raise UsageError("Peak memory is read from /proc/self/status, which only Linux has; omit --memory.") from None


_SMALL = 64
"""Side of the warm-up image before memory is measured."""


class Worker:
    """The parent's end of a worker process (a context manager).

    `given` holds `side`, `weights` (a file of ours), `size`, `batch`, `threads`, `device`, `seed`, `peer_precision`, `memory`,
    `calibration`.
    Raises UsageError with the reason if the backend cannot be opened or its process died.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self._name = given["side"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deeplabzoo.benchmark.timing", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.facts: dict[str, Any] = {}
        """`title`, `start_s` (open and first call), `all_threads_flush_denormals`, and with `memory` what `peak_of` found."""

    def __enter__(self) -> Self:
        try:
            self.facts = self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def time_call(self, task: Task) -> float:
        """Return milliseconds a call in one turn of this side."""
        return float(self._ask({"do": "turn", "task": task})["ms"])

    def labels(self) -> Any:
        """Return the labels of the measured images, an integer array B x H x W."""
        with tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place:
            file = Path(place) / "labels.npy"
            self._ask({"do": "labels", "file": str(file)})
            return np.load(file)

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead process is detected by its missing answer
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()  # it writes its error after closing the pipe
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise UsageError(f"The process of {self._name} ended early: {last}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise UsageError(found["error"])
        return found

    def _end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()
        self._errors.close()


def _opened(given: dict[str, Any]) -> tuple[Backend, torch.Tensor, dict[str, Any]]:
    """Return the backend, its images and facts about it; memory is measured first, on the second call."""
    torch.set_num_threads(given["threads"])
    device = torch.device(given["device"])
    net = deeplabzoo.load(given["weights"])
    image_BCHW = synthetic_images(given["batch"], tuple(given["size"]), given["seed"], net.config.in_chans).to(device)
    begun = time.perf_counter()
    backend = open_backend(
        given["side"],
        net,
        image_BCHW,
        threads=given["threads"],
        peer_precision=given["peer_precision"],
        calibration=given["calibration"],
    )
    facts: dict[str, Any] = {"title": backend.title, "all_threads_flush_denormals": all_threads_flush_denormals()}
    if given["memory"]:
        if given["side"] not in RUNTIMES:  # those have a fixed shape
            backend.labels(image_BCHW[:, :, :_SMALL, :_SMALL])
        facts |= peak_of(lambda: backend.labels(image_BCHW), device)
    backend.labels(image_BCHW)
    return backend, image_BCHW, facts | {"start_s": time.perf_counter() - begun}


def _answers(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    backend, image_BCHW, facts = _opened(given)
    yield facts
    for line in sys.stdin:
        what = json.loads(line)
        if what["do"] == "turn":
            yield {"ms": time_call(backend.call(what["task"], image_BCHW), image_BCHW.device)}
        else:
            labels_BHW = backend.labels(image_BCHW)
            np.save(what["file"], labels_BHW.cpu().numpy() if isinstance(labels_BHW, torch.Tensor) else labels_BHW)
            yield {}


def main(given: str) -> int:
    """Serve requests on the original stdout; what libraries print goes to stderr."""
    logging.getLogger("deeplabzoo").setLevel(logging.WARNING)  # the parent has logged it
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        try:
            with flush_denormals():
                for answer in _answers(json.loads(given)):
                    print(json.dumps(answer), file=out, flush=True)
        except DeepLabZooError as error:
            print(json.dumps({"error": str(error)}), file=out, flush=True)
            return error.exit_status
    return 0


# Peak arithmetic of the machine and FLOPs of a model.

_SIDE = 1536
"""Of the square matrices: large enough to be bound by arithmetic."""
_SIDE_GPU = 8192
_SIDE_CONV = 48
"""Of the feature map of the same product as a 1x1 convolution: 48 x 48 x 1536."""
_REPEATS = 7


def gemm_peak(device: torch.device, threads: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the median GFLOP/s of a large matrix product.

    On a CPU it is that of `threads` threads, and the better of a matrix product (MKL, slow on processors of other vendors) and
    the same product as a 1x1 convolution (oneDNN). On a GPU `threads` is ignored.
    """
    side = _SIDE_GPU if device.type == "cuda" else _SIDE
    left, right = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    products: list[tuple[float, Callable[[], object]]] = [(2 * side**3, lambda: left @ right)]
    if device.type == "cpu":
        image = torch.rand(1, side, _SIDE_CONV, _SIDE_CONV, dtype=dtype).contiguous(memory_format=torch.channels_last)
        products.append((2 * side**2 * _SIDE_CONV**2, lambda: F.conv2d(image, left[:, :, None, None])))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return max(flop / _median_seconds(product, device) for flop, product in products) / 1e9
    finally:
        torch.set_num_threads(before)


def gemm_peaks(device: torch.device, threads: int) -> dict[str, float]:
    """Return the float32 peak by number of threads: for one thread and for `threads`."""
    counts = {1, threads} if device.type == "cpu" else {threads}
    return {str(count): round(gemm_peak(device, count), 1) for count in sorted(counts) if count <= (os.cpu_count() or count)}


@torch.no_grad()
def gflop_of(net: nn.Module, image_BCHW: torch.Tensor) -> float:
    """Return GFLOPs of one forward pass (a multiply-add is two), as torch counts them.

    Taps of atrous convolutions on padding are counted, although good kernels skip them.
    """
    with FlopCounterMode(display=False) as counter:
        net(image_BCHW)
    return float(counter.get_total_flops()) / 1e9


def _median_seconds(product: Callable[[], object], device: torch.device) -> float:
    seconds = []
    with torch.inference_mode():
        for _ in range(_REPEATS + 1):
            begun = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
