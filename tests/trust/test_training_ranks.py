"""Two processes that are one run, and one of them is lost or stopped: the other ends soon, and both resume to the same bits."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training_runs import STEPS, TINY, Driver, Run, assert_same, failed, finished
from trust_record import TrustRecord, write_record

from deeplabzoo.training.logger import read_log

pytestmark = [pytest.mark.soak, pytest.mark.timeout(2 * 3600)]

ENDS_S = 30
"""What docs/reproduce.md states: by then the processes that are left have ended by themselves, or torchrun ends them."""
TOGETHER = ["batch=4"]

LOST = {
    "rank 1 in a step": (1, "deeplabzoo.training.trainer:Trainer.train_step", 5),
    "rank 0 in a step": (0, "deeplabzoo.training.trainer:Trainer.train_step", 7),
    "rank 1 between two steps": (1, "deeplabzoo.training.trainer:ModelEma.update", 9),
    "rank 0 while it writes a state": (0, "deeplabzoo.training.run_dir:save_file", 5),
    "rank 1 in an evaluation": (1, "deeplabzoo.evaluation.evaluate:predict_labels", 2),
    "rank 0 in an evaluation": (0, "deeplabzoo.evaluation.evaluate:predict_labels", 2),
    "rank 0 in the report": (0, "deeplabzoo.training.train:evaluate", 1),
    "rank 1 while it waits for the report": (1, "deeplabzoo.training.distributed:DistributedContext.barrier", 2),
}


def both(
    runs: Driver, out: Path, data: Path, *settings: str, resume: bool = False, meets: dict[int, Any] | None = None
) -> list[Run]:
    """Start both processes of a run as torchrun does; `meets` says what befalls which."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [{**base, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [
        runs.train(out, data, *TOGETHER, *settings, resume=resume, environment=environment, **(meets or {}).get(rank, {}))
        for rank, environment in enumerate(environments)
    ]


def both_finished(processes: list[Run]) -> None:
    for one in processes:
        finished(one)


@pytest.mark.parametrize("norms", ["sync_norms=true", "sync_norms=false"])
def test_lost_ranks(runs: Driver, pictures: Path, tmp_path: Path, norms: str) -> None:
    """SIGKILL to one of two at each kind of moment; the other says so with status 1. Batch norms together, and apart."""
    started = time.monotonic()
    whole = tmp_path / "whole"
    both_finished(both(runs, whole, pictures, norms))
    moments = LOST if norms == "sync_norms=true" else dict(list(LOST.items())[3:5])
    seconds: dict[str, float] = {}
    for number, (moment, (rank, function, calls)) in enumerate(moments.items()):
        out = tmp_path / str(number)
        processes = both(runs, out, pictures, norms, meets={rank: {"aim": (function, calls, "before", "SIGKILL", "")}})
        assert processes[rank].wait() == -signal.SIGKILL, processes[rank].logged
        seconds[moment] = round(processes[1 - rank].gone_after(), 1)
        sentence = failed(processes[1 - rank])
        assert f"Process {1 - rank} of 2 lost the others" in sentence
        assert "--resume" in sentence
        assert seconds[moment] < ENDS_S
        both_finished(both(runs, out, pictures, norms, resume=True))
        assert_same(out, whole)
    write_record(
        TrustRecord(
            name="training_lost_ranks" if norms == "sync_norms=true" else "training_lost_ranks_norms_apart",
            area="training",
            what=f"One of two processes of a run killed by SIGKILL, {norms}.",
            command=f"pytest -m soak tests/trust/test_training_ranks.py -k 'lost_ranks and {norms.partition('=')[2]}'",
            seconds=round(time.monotonic() - started, 1),
            faults=len(moments),
            survived=len(seconds),
            details={"seconds_until_the_other_ended": seconds},
        )
    )


@pytest.mark.parametrize("asked", [[0, 1], [1]])
def test_sigterm_to_ranks(runs: Driver, pictures: Path, tmp_path: Path, asked: list[int]) -> None:
    """To all as torchrun passes it on, or to one alone: they agree on the step, save once, and leave with 143."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    both_finished(both(runs, whole, pictures))
    aim = {"aim": ("deeplabzoo.training.trainer:ModelEma.update", 6, "after", "SIGTERM", "")}
    for one in both(runs, out, pictures, meets=dict.fromkeys(asked, aim)):
        assert re.search(f"Stopped by SIGTERM after step [67] of {STEPS}", failed(one, 143))
    both_finished(both(runs, out, pictures, resume=True))
    assert_same(out, whole)


def torchrun(out: Path, data: Path, *words: str) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "deeplabzoo.train"]
    command = [*launch, "folder", "--data", str(data), "--out", str(out), *words, "--set", *TINY, *TOGETHER]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def process_of(rank: int, launcher: int) -> int:
    """Return the process that torchrun started for a rank."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            variables = (stat.parent / "environ").read_bytes().split(b"\0") if parent == launcher else []
        except OSError:  # it ended meanwhile
            continue
        if f"RANK={rank}".encode() in variables:
            return int(stat.parent.name)
    raise AssertionError(f"torchrun has no process of rank {rank}")


def reached(out: Path, step: int, *, starts: int) -> bool:
    """Whether a run that was started so often has made a step since; an earlier one may have come further."""
    records = read_log(out / "log.jsonl")
    last = [one["kind"] for one in records].count("start") == starts and records[-1]
    return bool(last) and last["kind"] != "start" and last["step"] >= step


def test_under_torchrun(runs: Driver, pictures: Path, tmp_path: Path) -> None:
    """A rank killed under the real launcher, then the launcher itself asked to stop: it ends, and the run resumes exactly."""
    started = time.monotonic()
    whole, out = tmp_path / "whole", tmp_path / "out"
    both_finished(both(runs, whole, pictures))
    seconds = {}
    for what, step, words in (("rank 1 killed", 3, ()), ("SIGTERM to torchrun", 8, ("--resume",))):
        launcher = torchrun(out, pictures, *words)
        while launcher.poll() is None and not reached(out, step, starts=len(seconds) + 1):
            time.sleep(0.02)
        if what == "rank 1 killed":
            os.kill(process_of(1, launcher.pid), signal.SIGKILL)
        else:
            launcher.terminate()
        sent = time.monotonic()
        _, logged = launcher.communicate(timeout=240)
        seconds[what] = round(time.monotonic() - sent, 1)
        assert launcher.returncode != 0, logged
        assert "Process 0 of 2 lost the others" in logged or "Stopped by SIGTERM" in logged
    both_finished(both(runs, out, pictures, resume=True))
    assert_same(out, whole)
    write_record(
        TrustRecord(
            name="training_torchrun",
            area="training",
            what="A rank killed under torchrun, and torchrun asked to stop by SIGTERM; then resumed.",
            command="pytest -m soak tests/trust/test_training_ranks.py -k torchrun",
            seconds=round(time.monotonic() - started, 1),
            faults=2,
            survived=len(seconds),
            details={"seconds_until_torchrun_ended": seconds},
        )
    )
