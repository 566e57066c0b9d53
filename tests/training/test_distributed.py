"""Several processes are one run: the loss curve of one process, and a clear end when one of them dies."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deeplabzoo.training.distributed import DistributedContext, SyncBatchNormMode
from deeplabzoo.training.logger import read_log

DRIVER = Path(__file__).resolve().parents[1] / "helpers" / "train_driver.py"
TINY = [
    *("model=deeplabv3plus_lcnet_050", "steps=6", "augmentation.crop=65", "batch=8", "workers=0", "ema=0.9", "evaluations=1"),
    *(
        "evaluation_images=5",
        "loss=ce,lovasz",
        "class_weights=enet",
        "network.aux_head=true",
        "network.dropout=0",
        "clip_norm=5",
    ),
    *("optimizer=sgd", "lr=0.05", "network.pooling_norm=false"),
]


def _command(out: Path, *settings: str, processes: int, moment: str = "never") -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"] if processes > 1 else []
    return [sys.executable, *torchrun, str(DRIVER), moment, "shapes", "--out", str(out), "--set", *TINY, *settings]


def _run(out: Path, *settings: str, processes: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = _command(out, *settings, processes=processes, moment="double")
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr


def _curve(out: Path) -> list[float]:
    return [one["loss"] for one in read_log(out / "log.jsonl") if one["kind"] == "step"]


def test_two_processes_follow_the_curve_of_one(tmp_path: Path) -> None:
    """Same global batch, same losses, same weights, same evaluation (5 pictures, shared 3 and 2).

    With batch norms over the whole batch, losses divided by the whole batch's sums, an auxiliary head and clipping. In float64:
    batch norms of a few values magnify float32's rounding a thousandfold. A run without synchronized batch norms differs, so
    the comparison can fail.
    """
    _run(tmp_path / "one", processes=1)
    _run(tmp_path / "two", processes=2)
    _run(tmp_path / "apart", "sync_norms=false", processes=2)
    one, two, apart = (_curve(tmp_path / name) for name in ("one", "two", "apart"))
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-6)
    assert apart[0] != pytest.approx(one[0], rel=1e-3)
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=1e-5)
    scores = [[r for r in read_log(tmp_path / name / "log.jsonl") if r["kind"] == "evaluation"][-1] for name in ("one", "two")]
    assert scores[0]["images"] == scores[1]["images"] == 5
    assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-5)


def test_accumulated_pieces_are_the_slices_of_processes(tmp_path: Path) -> None:
    """One process in two pieces and two processes with norms apart see the same batch norms: the same curve."""
    _run(tmp_path / "pieces", "accumulate=2", processes=1)
    _run(tmp_path / "apart", "sync_norms=false", processes=2)
    assert _curve(tmp_path / "apart") == pytest.approx(_curve(tmp_path / "pieces"), rel=1e-6)


@pytest.mark.posix
def test_a_killed_process_stops_the_other_with_a_sentence(tmp_path: Path) -> None:
    """SIGKILL to one of two: the other ends by itself within seconds and says why, without a traceback."""
    out = tmp_path / "run"
    port = str(29400 + os.getpid() % 500)
    base = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = _command(out, "steps=100000", "evaluations=1", processes=1)
    runs = [
        subprocess.Popen(command, env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    log = out / "log.jsonl"
    while all(run.poll() is None for run in runs) and (not log.exists() or '"step": 3,' not in log.read_text()):
        time.sleep(0.1)
    runs[1].send_signal(signal.SIGKILL)
    _, logged = runs[0].communicate(timeout=60)
    runs[1].communicate()
    assert runs[0].returncode == 1
    assert "error: Process 0 of 2 lost the others" in logged
    assert "--resume" in logged
    assert "Traceback" not in logged


@pytest.mark.parametrize(("items", "count"), [(0, 3), (1, 2), (7, 3), (8, 4)])
def test_shards_are_exact(items: int, count: int) -> None:
    """Every picture is evaluated once, by one process (pytorch#25162: padded shards count some twice)."""
    shares = [list(DistributedContext(rank, count, torch.device("cpu")).shard(items)) for rank in range(count)]
    assert sorted(itertools.chain(*shares)) == list(range(items))


def test_synchronised_batchnorm_of_one_process_is_torchs() -> None:
    """In a world of one, output, gradient and running statistics are those of torch's batch norm."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        ours, theirs = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        nn.init.normal_(ours.weight)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(3, 5, 4, 6) * 3 + 1
        results = []
        for norm, context in ((ours, SyncBatchNormMode()), (theirs, torch.enable_grad())):
            leaf = x.clone().requires_grad_()
            with context:
                y = norm(leaf)
            (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
            assert leaf.grad is not None
            assert norm.weight.grad is not None
            results.append((y, leaf.grad, norm.weight.grad, norm.running_mean, norm.running_var))
        for mine, its in zip(*results, strict=True):
            torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-4)
        with SyncBatchNormMode():
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    finally:
        torch.distributed.destroy_process_group()
