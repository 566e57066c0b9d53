"""A side in a process of its own, which works when it is its turn and sleeps else.

One process for all would not be fair: what one library changes for its process (the allocator's habits, thread pools, switches
of torch) would hold for the other too. `python -m deeplabzoo.benchmarking.worker JSON` is that process; it reads a line of JSON
for each thing to do and answers with one.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

import deeplabzoo
from deeplabzoo.benchmarking.memory import peak_of
from deeplabzoo.benchmarking.random_weights import made_pictures
from deeplabzoo.benchmarking.runtimes import RUNTIMES
from deeplabzoo.benchmarking.sides import Side, Task, open_side
from deeplabzoo.benchmarking.turns import every_thread_flushes, turn
from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.inference.denormals import denormals_flushed

_SMALL = 64
"""Side of the picture that lets libraries start before memory is measured."""


class Worker:
    """The parent's end of a side: start it, ask it, end it (a context manager).

    `given` holds `side`, `weights` (a file of ours), `size`, `batch`, `threads`, `device`, `seed`, `peer_precision`, `memory`,
    `calibration`.
    Raises UsageError, with the reason, where the side cannot be opened or its process is lost.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self._name = given["side"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deeplabzoo.benchmarking.worker", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.facts: dict[str, Any] = {}
        """`title`, `start_s` (open and first call), `every_thread_flushes`, and with `memory` what `peak_of` found."""

    def __enter__(self) -> Self:
        try:
            self.facts = self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def turn(self, task: Task) -> float:
        """Return milliseconds a call in one turn of this side."""
        return float(self._ask({"do": "turn", "task": task})["ms"])

    def labels(self) -> Any:
        """Return the labels of the measured pictures, an integer array B x H x W."""
        with tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place:
            file = Path(place) / "labels.npy"
            self._ask({"do": "labels", "file": str(file)})
            return np.load(file)

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a lost process is told by its missing answer
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()  # it writes why after it closed its end
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no word"])[-1]
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


def _opened(given: dict[str, Any]) -> tuple[Side, torch.Tensor, dict[str, Any]]:
    """Return the side, its pictures, and what is known of it; memory is measured on the second call, before anything else."""
    torch.set_num_threads(given["threads"])
    device = torch.device(given["device"])
    net = deeplabzoo.load(given["weights"])
    image_BCHW = made_pictures(given["batch"], tuple(given["size"]), given["seed"], net.config.in_chans).to(device)
    begun = time.perf_counter()
    side = open_side(
        given["side"],
        net,
        image_BCHW,
        threads=given["threads"],
        peer_precision=given["peer_precision"],
        calibration=given["calibration"],
    )
    facts: dict[str, Any] = {"title": side.title, "every_thread_flushes": every_thread_flushes()}
    if given["memory"]:
        if given["side"] not in RUNTIMES:  # those take one shape alone
            side.labels(image_BCHW[:, :, :_SMALL, :_SMALL])
        facts |= peak_of(lambda: side.labels(image_BCHW), device)
    side.labels(image_BCHW)
    return side, image_BCHW, facts | {"start_s": time.perf_counter() - begun}


def _answers(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    side, image_BCHW, facts = _opened(given)
    yield facts
    for line in sys.stdin:
        what = json.loads(line)
        if what["do"] == "turn":
            yield {"ms": turn(side.call(what["task"], image_BCHW), image_BCHW.device)}
        else:
            labels_BHW = side.labels(image_BCHW)
            np.save(what["file"], labels_BHW.cpu().numpy() if isinstance(labels_BHW, torch.Tensor) else labels_BHW)
            yield {}


def main(given: str) -> int:
    """Answer on the stdout that was given; whatever libraries print goes to stderr."""
    logging.getLogger("deeplabzoo").setLevel(logging.WARNING)  # the parent has said what there is to say
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        try:
            with denormals_flushed():
                for answer in _answers(json.loads(given)):
                    print(json.dumps(answer), file=out, flush=True)
        except DeepLabZooError as error:
            print(json.dumps({"error": str(error)}), file=out, flush=True)
            return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
