"""Stopping costs nothing: whatever kills a run, `--resume` ends with the weights of a run that was never stopped."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deeplabzoo.training.logger import read_log
from deeplabzoo.training.run_dir import TrainingState, load_state, save_state

DRIVER = Path(__file__).resolve().parents[1] / "helpers" / "train_driver.py"
STEPS = 7
TINY = [
    *("model=deeplabv3plus_lcnet_050", f"steps={STEPS}", "augmentation.crop=33", "batch=4", "accumulate=2", "workers=2"),
    *("ema=0.9", "save_every=2", "evaluations=2", "evaluation_images=2", "network.dropout=0.1", "warmup_steps=3"),
]


def _train(out: Path, *arguments: str, moment: str = "never", processes: int = 1) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(DRIVER), moment, "shapes", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def _losses(out: Path) -> list[tuple[int, float, float]]:
    return [(one["step"], one["loss"], one["lr"]) for one in read_log(out / "log.jsonl") if one["kind"] == "step"]


def _assert_same(out: Path, reference: Path) -> None:
    ours, theirs = load_file(out / "last.safetensors"), load_file(reference / "last.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    best, expected = load_file(out / "best.safetensors"), load_file(reference / "best.safetensors")
    assert all(torch.equal(best[name], expected[name]) for name in best)
    assert _losses(out) == _losses(reference)
    assert [step for step, _, _ in _losses(out)] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "reference"
    finished = _train(out, "--set", *TINY)
    assert finished.returncode == 0, finished.stderr
    return out


def test_a_run_leaves_its_folder(reference: Path) -> None:
    """recipe.json, log.jsonl, state/, last and best weights, report.json and curves.png, and nothing half-written."""
    names = {path.name for path in reference.iterdir()}
    assert names == {"recipe.json", "log.jsonl", "state", "last.safetensors", "best.safetensors", "report.json", "curves.png"}
    report = json.loads((reference / "report.json").read_text())
    facts = json.loads((reference / "state" / "step_00000007" / "facts.json").read_text())["facts"]
    kept = {6, 7, facts["best"]["step"]}
    assert {path.name for path in (reference / "state").iterdir()} == {f"step_{step:08d}" for step in kept}
    assert report["recipe"] == "shapes"
    assert report["val"]["images"] == 64
    assert 0 <= report["miou"] <= 1


@pytest.mark.posix
@pytest.mark.parametrize("moment", ["step:3", "state:4:net", "state:6:optimizer", "rename:4", "drop:6"])
def test_resume_equals_never_stopping(reference: Path, tmp_path: Path, moment: str) -> None:
    """`kill -9` between steps, in the middle of a checkpoint write, before its rename: the final weights are bit-identical.

    With two workers, an average of weights and accumulation on (yassouali#32, mmsegmentation#1800).
    """
    out = tmp_path / "run"
    killed = _train(out, "--set", *TINY, moment=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "report.json").exists()
    resumed = _train(out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step" in resumed.stderr
    _assert_same(out, reference)


@pytest.mark.posix
def test_a_run_killed_before_its_first_state_starts_again(reference: Path, tmp_path: Path) -> None:
    """With nothing saved, --resume says so and begins at step 0."""
    out = tmp_path / "run"
    _train(out, "--set", *TINY, moment="step:1")
    resumed = _train(out, "--resume")
    assert "starting at step 0" in resumed.stderr
    _assert_same(out, reference)


def test_workers_do_not_change_the_weights(reference: Path, tmp_path: Path) -> None:
    """Results are a function of the recipe, not of how many processes read pictures."""
    out = tmp_path / "run"
    finished = _train(out, "--set", *TINY, "workers=0")
    assert finished.returncode == 0, finished.stderr
    _assert_same(out, reference)


def test_sigterm_saves_and_leaves(reference: Path, tmp_path: Path) -> None:
    """A batch system's SIGTERM ends the run after the present step, with its state, one sentence and 143; resume is exact."""
    out = tmp_path / "run"
    run = _train(out, "--set", *TINY, "save_every=100", moment="sigterm:1")
    assert run.returncode == 143
    assert "error: Stopped by SIGTERM after step 2" in run.stderr
    state = load_state(out / "state")
    assert state is not None
    assert state.step == 2, "no step is lost, and no other state was due before the signal"
    assert _train(out, "--resume").returncode == 0
    _assert_same(out, reference)


@pytest.mark.posix
def test_a_changed_recipe_is_refused_unless_asked_for(reference: Path, tmp_path: Path) -> None:
    """Another rate or length on resume is named and refused with status 2; `allow_change=true` goes on."""
    out = tmp_path / "run"
    _train(out, "--set", *TINY, moment="step:5")
    before = sorted(path.name for path in (out / "state").iterdir())
    refused = _train(out, "--resume", "--set", "lr=0.5")
    assert refused.returncode == 2
    assert "lr: 0.02 -> 0.5" in refused.stderr
    assert "allow_change=true" in refused.stderr
    assert sorted(path.name for path in (out / "state").iterdir()) == before
    repeated = _train(out, "--resume", "--set", *TINY, "steps=9", "allow_change=true")
    assert repeated.returncode == 0, repeated.stderr
    assert _losses(out)[-1][0] == 9
    starts = [line["step"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if line["kind"] == "start"]
    assert json.loads((out / "report.json").read_text())["changed_after"] == starts[1:], "published rows tell it"
    again = _train(out, "--set", *TINY)
    assert again.returncode == 2
    assert "--resume" in again.stderr


def test_a_loss_that_is_no_number_stops_with_a_sentence(tmp_path: Path) -> None:
    """The last good state stays; nothing after it is written."""
    out = tmp_path / "run"
    failed = _train(out, "--set", *TINY, "lr=1e30", "optimizer=sgd", "ema=0", "save_every=1", "warmup_steps=0")
    assert failed.returncode == 1
    assert "error: The " in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "lower lr" in failed.stderr
    state = load_state(out / "state")
    assert state is None or all(torch.isfinite(tensor).all() for tensor in state.tensors["net"].values())


@pytest.mark.posix
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step:3", "state:4:net"])
def test_two_processes_resume_exactly(tmp_path: Path, moment: str) -> None:
    """The same under torchrun: rank 0 killed, all started again with --resume, weights bit-identical."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert _train(whole, "--set", *TINY, processes=2).returncode == 0
    assert _train(stopped, "--set", *TINY, moment=moment, processes=2).returncode != 0
    assert not (stopped / "report.json").exists()
    resumed = _train(stopped, "--resume", processes=2)
    assert resumed.returncode == 0, resumed.stderr
    _assert_same(stopped, whole)


def test_states_are_whole_or_passed_over(tmp_path: Path) -> None:
    """Two are kept, and that of the best score; a newest one that is damaged in any file is passed over."""
    for step in (1, 2, 3, 4, 5):
        save_state(
            tmp_path, TrainingState(step, {"net": {"w": torch.full((4,), float(step))}}, {"best": step}), best=min(step, 2)
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000004", "step_00000005"]
    shutil.rmtree(tmp_path)
    for step in (1, 2, 3):
        save_state(tmp_path, TrainingState(step, {"net": {"w": torch.full((4,), float(step))}}, {"best": step}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    newest = load_state(tmp_path)
    assert newest is not None
    assert (newest.step, newest.facts["best"], newest.tensors["net"]["w"].tolist()) == (3, 3, [3, 3, 3, 3])
    shutil.copy(tmp_path / "step_00000002" / "net.safetensors", tmp_path / "step_00000003")  # whole, but of another step
    older = load_state(tmp_path)
    assert older is not None
    assert older.step == 2
    os.truncate(tmp_path / "step_00000003" / "net.safetensors", 20)
    older = load_state(tmp_path)
    assert older is not None
    assert older.step == 2
    (tmp_path / "step_00000002" / "facts.json").write_text("{")
    assert load_state(tmp_path) is None


def test_weights_files_are_bit_identical_too(reference: Path) -> None:
    """Not only tensors: writing the same network twice gives the same bytes, so a hash identifies weights."""
    from deeplabzoo.hub.factory import load

    copies = []
    for number in range(3):
        copy = reference.parent / f"copy{number}.safetensors"
        load(reference / "last.safetensors").save(copy, extra={"a": 1, "b": 2})
        copies.append(hashlib.sha256(copy.read_bytes()).hexdigest())
    assert len(set(copies)) == 1
