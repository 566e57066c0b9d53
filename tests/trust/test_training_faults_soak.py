"""Every fault that a training run was promised to survive, injected into real runs and recorded: `make soak`.

After each fault there is one sentence and a stated exit status; then the run is resumed, and must end as the undisturbed one.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from training_runs import STEPS, Driver, assert_same, failed, finished, metrics_of, names_in
from trust_record import TrustRecord, write_record

pytestmark = [pytest.mark.soak, pytest.mark.timeout(2 * 3600)]

LEAVES_S = 60
"""A signalled run must be gone by then, on a machine that does other things; the record has what it took."""
SEED = 20261121


@dataclass
class Tally:
    """What one soak test did, for its record."""

    name: str
    what: str
    started: float = field(default_factory=time.monotonic)
    survived: dict[str, object] = field(default_factory=dict)

    def write(self, **details: object) -> None:
        write_record(
            TrustRecord(
                name=f"training_faults_{self.name}",
                area="training",
                what=self.what,
                command=f"pytest -m soak tests/trust/test_training_faults_soak.py -k {self.name}",
                seconds=round(time.monotonic() - self.started, 1),
                faults=len(self.survived),
                survived=len(self.survived),
                details={"faults": self.survived, **details},
            )
        )


class Bench:
    """A driver, pictures and an undisturbed run, and a place for each fault."""

    def __init__(self, runs: Driver, pictures: Path, reference: Path, folder: Path) -> None:
        self.runs, self.pictures, self.reference, self.folder = runs, pictures, reference, folder
        self._count = 0

    def place(self) -> Path:
        """Return a new folder for a run."""
        self._count += 1
        return self.folder / f"run_{self._count}"

    def resumed(self, out: Path, *settings: str) -> None:
        """Go on with a run after its fault; it must end as if there had been none."""
        finished(self.runs.train(out, self.pictures, *settings, resume=True))
        assert_same(out, self.reference)
        shutil.rmtree(out)

    def stopped_at(self, step: int) -> Path:
        """Return a run that was killed after some steps."""
        out = self.place()
        aim = ("deeplabzoo.training.logger:RunLog.step", step, "after", "SIGKILL", "")
        assert self.runs.train(out, self.pictures, aim=aim).wait() == -signal.SIGKILL
        return out


@pytest.fixture
def bench(runs: Driver, pictures: Path, reference: Path, tmp_path: Path) -> Bench:
    return Bench(runs, pictures, reference, tmp_path)


SIGNALLED = {
    "while the labels are read": ("deeplabzoo.training.trainer:class_weights_from_data", 1),
    "while the network is built": ("deeplabzoo.training.train:build_model", 1),
    "in the first step": ("deeplabzoo.training.trainer:normalize_images", 1),
    "in the optimizer's part of a step": ("deeplabzoo.training.trainer:ModelEma.update", 5),
    "while a line is logged": ("deeplabzoo.training.logger:RunLog.step", 6),
    "in an evaluation": ("deeplabzoo.evaluation.evaluate:predict_labels", 1),
    "in the last evaluation": ("deeplabzoo.evaluation.evaluate:predict_labels", 6),
    "while weights are written": ("deeplabzoo.training.trainer:Trainer.save_weights", 3),
    "while a state is written": ("deeplabzoo.training.run_dir:save_file", 5),
    "after the last step": ("deeplabzoo.training.run_dir:save_state", 6),
    "while the report is measured": ("deeplabzoo.training.train:evaluate", 1),
    "while the curves are drawn": ("deeplabzoo.training.train:draw_curves", 1),
}


def test_signals(bench: Bench) -> None:
    """SIGTERM and SIGINT at aimed moments, and to the whole group as systemd and Slurm do, at random ones: 143 and 130."""
    tally = Tally("signals", "SIGTERM and SIGINT at aimed and random moments, to the process and to its whole group.")
    for place, (moment, (function, number)) in enumerate(SIGNALLED.items()):
        name, status = ("SIGINT", 130) if place % 3 == 2 else ("SIGTERM", 143)
        out = bench.place()
        run = bench.runs.train(out, bench.pictures, aim=(function, number, "before", name, ""))
        assert f"error: Stopped by {name}" in failed(run, status)
        bench.resumed(out)
        tally.survived[f"{name} {moment}"] = status
    draw, seconds = random.Random(SEED), []
    for number in range(8):
        out, group = bench.place(), number % 2 == 1
        run = bench.runs.train(out, bench.pictures, "workers=2")
        run.await_step(out / "log.jsonl", draw.randint(1, STEPS - 2))
        time.sleep(draw.uniform(0, 0.3))
        run.send(signal.SIGTERM, group=group)
        seconds.append(run.gone_after())
        assert "error: Stopped by SIGTERM" in failed(run, 143)
        assert seconds[-1] < LEAVES_S
        bench.resumed(out, "workers=2")
        tally.survived[f"SIGTERM {number} at random, {'the whole group' if group else 'the process'}, two workers"] = 143
    tally.write(longest_until_gone_s=round(max(seconds), 1), seed=SEED)


FULL = {
    "the first line of the log": ("deeplabzoo.training.logger:RunLog.start", 1, 100),
    "a step's line": ("deeplabzoo.training.logger:RunLog.step", 7, 300),
    "the best weights": ("deeplabzoo.training.trainer:Trainer.save_weights", 2, 100_000),
    "the last weights": ("deeplabzoo.training.trainer:Trainer.save_weights", 3, 100_000),
    "the network of a state": ("deeplabzoo.training.run_dir:save_file", 7, 100_000),
    "the optimizer of a state": ("deeplabzoo.training.run_dir:save_file", 8, 1_500_000),
    "the report": ("deeplabzoo.training.train:evaluate", 1, 1000),
    "the curves": ("deeplabzoo.training.train:draw_curves", 1, 10_000),
}


def test_full_disk(bench: Bench) -> None:
    """At each file of a run by a limit on its size, and for real: a file system of a few megabytes, smaller and larger."""
    tally = Tally("full_disk", "A disk that is full when a certain file is written, and real ones of 1 to 13 MB.")
    for what, (function, number, size) in FULL.items():
        out = bench.place()
        run = bench.runs.train(out, bench.pictures, full_from=[function, number], largest_file_bytes=size)
        sentence = failed(run)
        assert "File too large" in sentence
        before = names_in(out / "state") if (out / "state").exists() else set()
        assert all(name.startswith("step_") for name in before)
        assert not [name for name in names_in(out) if name.endswith(".part")]
        bench.resumed(out)
        tally.survived[what] = sentence.partition("'")[0].removeprefix("error: ").strip()
    for kilobytes in range(1000, 14_000, 1700):
        with small_disk(bench.place()) as (disk, resize):
            resize(kilobytes)
            out = disk / "run"
            run = bench.runs.train(out, bench.pictures)
            if run.wait() == 0:
                assert kilobytes > 10_000, "a run keeps two states or three, and one more while it writes it"
                continue
            assert "No space left on device" in failed(run)
            resize(100_000)
            finished(bench.runs.train(out, bench.pictures, resume=True))
            assert_same(out, bench.reference)
            tally.survived[f"a disk of {kilobytes} kB"] = "No space left on device"
    tally.write()


@contextmanager
def small_disk(place: Path) -> Iterator[tuple[Path, Callable[[int], object]]]:
    """Give a file system in memory, and the function that sets its size in kB; skip where none can be mounted."""
    place.mkdir()

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(place)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")

    mount("size=1m")
    try:
        yield place, lambda kilobytes: mount("remount", f"size={kilobytes}k")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def spoil(file: Path) -> Path:
    """Cut a picture short."""
    os.truncate(file, file.stat().st_size // 2)
    return file


def test_unreadable(bench: Bench, tmp_path: Path) -> None:
    """Stop by name, or skip and count, in training; always stop where a score is measured; both resume to the same bits."""
    tally = Tally("unreadable", "Pictures and masks cut short during a run: stopped by name, or skipped and counted.")
    for what in ("train/images/train_00003.png", "train/masks/train_00003.png", "val/images/val_00001.png"):
        data = Path(shutil.copytree(bench.pictures, tmp_path / "spoilt"))
        out = bench.place()
        failed(bench.runs.train(out, data, aim=("deeplabzoo.training.logger:RunLog.step", 1, "after", "SIGTERM", "")), 143)
        spoil(data / what)
        sentence = failed(bench.runs.train(out, data, "workers=1", resume=True))
        assert f"{Path(what).stem}.png' is damaged or cut short" in sentence
        shutil.copy(bench.pictures / what, data / what)
        finished(bench.runs.train(out, data, resume=True))
        assert_same(out, bench.reference)
        shutil.rmtree(data)
        tally.survived[f"stopped by {what}"] = sentence.rpartition(" is damaged")[2]
    data = Path(shutil.copytree(bench.pictures, tmp_path / "spoilt"))
    spoil(data / "train/images/train_00003.png")
    spoil(data / "train/masks/train_00005.png")
    whole, cut, switched = (bench.place() for _ in range(3))
    logged = finished(bench.runs.train(whole, data, "unreadable=skip")).logged
    skipped = {name for one in metrics_of(whole) for name in one.get("skipped", ())}
    assert skipped == {"train_00003", "train_00005"}
    assert all(logged.count(f"'{name}' cannot be read; another") == 1 for name in skipped)
    assert "2 training images could not be read and were skipped" in logged
    aim = ("deeplabzoo.training.logger:RunLog.step", 7, "after", "SIGKILL", "")
    assert bench.runs.train(cut, data, "workers=1", "unreadable=skip", aim=aim).wait() == -signal.SIGKILL
    finished(bench.runs.train(cut, data, "workers=2", "unreadable=skip", resume=True))
    assert_same(cut, whole)
    tally.survived["skipped, killed and resumed"] = sorted(skipped)
    shutil.copy(bench.pictures / "train/masks/train_00005.png", data / "train/masks/train_00005.png")
    failed(bench.runs.train(switched, data))
    finished(bench.runs.train(switched, data, "unreadable=skip", resume=True))
    from_the_start = bench.place()
    finished(bench.runs.train(from_the_start, data, "unreadable=skip"))
    assert_same(switched, from_the_start)
    tally.survived["stopped, then resumed with unreadable=skip"] = ["train_00003"]
    tally.write()


def test_lost_workers(bench: Bench) -> None:
    """A process that reads pictures is killed at six random moments: one sentence with what to do, status 1, resumable."""
    tally = Tally("lost_workers", "Processes that read pictures, killed by SIGKILL at random moments.")
    draw, seconds = random.Random(SEED), []
    for number in range(6):
        out = bench.place()
        run = bench.runs.train(out, bench.pictures, "workers=2", "steps=400", "evaluations=1", "save_every=100")
        run.await_step(out / "log.jsonl", draw.randint(1, 20))
        os.kill(draw.choice(run.helpers), signal.SIGKILL)
        seconds.append(run.gone_after())
        sentence = failed(run)
        assert "A process that reads training images was killed" in sentence
        assert "--resume" in sentence
        done = [one["step"] for one in metrics_of(out)]
        assert names_in(out / "state") == {f"step_{done[-1]:08d}"}, "what was trained until then is saved"
        settings = ["workers=2", "steps=400", "evaluations=1", f"save_every={done[-1] + 1}"]
        aim = ("deeplabzoo.training.logger:RunLog.step", 1, "after", "SIGTERM", "")
        failed(bench.runs.train(out, bench.pictures, *settings, resume=True, aim=aim), 143)
        straight = bench.place()
        aim = ("deeplabzoo.training.logger:RunLog.step", done[-1] + 1, "after", "SIGTERM", "")
        failed(bench.runs.train(straight, bench.pictures, *settings, aim=aim), 143)
        assert metrics_of(out) == metrics_of(straight)
        assert (out / "last.safetensors").read_bytes() == (straight / "last.safetensors").read_bytes()
        tally.survived[f"killed {number} after step {done[-1]}"] = "resumed"
    tally.write(longest_until_the_sentence_s=round(max(seconds), 1), seed=SEED)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut to nothing": lambda file: os.truncate(file, 0),
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "one bit turned": lambda file: _turn_a_bit(file),
    "that of the state before": lambda file: shutil.copy(file.parent.with_name("step_00000006") / file.name, file),
    "gone": lambda file: file.unlink(),
}


def _turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-len(content) // 3] ^= 1
    file.write_bytes(content)


def test_damaged_states(bench: Bench, tmp_path: Path) -> None:
    """Each file of the newest state, damaged in each way: the state before is used. Weights beside it are never needed."""
    tally = Tally("damaged_states", "Files of the newest state cut, changed, removed or mixed with another state's.")
    stopped = bench.stopped_at(9)
    assert names_in(stopped / "state") >= {"step_00000006", "step_00000008"}
    for name in ("net.safetensors", "average.safetensors", "optimizer.safetensors", "facts.json"):
        for way, damage in DAMAGE.items():
            out = Path(shutil.copytree(stopped, bench.place()))
            damage(out / "state" / "step_00000008" / name)
            run = finished(bench.runs.train(out, bench.pictures, resume=True))
            step = 8 if (name, way) == ("facts.json", "one bit turned") and "after step 8" in run.logged else 6
            assert f"going on after step {step}" in run.logged
            assert_same(out, bench.reference)
            shutil.rmtree(out)
            tally.survived[f"{name}: {way}"] = f"resumed from step {step}"
    other = bench.place()
    aim = ("deeplabzoo.training.logger:RunLog.step", 5, "after", "SIGKILL", "")
    assert bench.runs.train(other, bench.pictures, "lr=0.5", aim=aim).wait() == -signal.SIGKILL
    for name in ("last.safetensors", "best.safetensors"):
        out = Path(shutil.copytree(stopped, bench.place()))
        shutil.copy(other / name, out / name)
        if name == "last.safetensors":
            bench.resumed(out)
            tally.survived["last.safetensors: that of another run"] = "not needed"
    out = Path(shutil.copytree(stopped, bench.place()))
    shutil.rmtree(out / "state")
    shutil.copytree(other / "state", out / "state")
    refused = failed(bench.runs.train(out, bench.pictures, resume=True), 2)
    assert "the state of step 4 is that of another recipe" in refused
    tally.survived["state: that of another run"] = "refused"
    out = Path(shutil.copytree(stopped, bench.place()))
    for state in (out / "state").iterdir():
        os.truncate(state / "net.safetensors", 100)
    assert "None of the states in" in failed(bench.runs.train(out, bench.pictures, resume=True))
    tally.survived["every state damaged"] = "refused, never begun anew"
    tally.write()


def test_wrong_clocks(bench: Bench) -> None:
    """A clock that loses a minute or a year at every look, or leaps ahead; files whose times say the opposite of the truth."""
    tally = Tally("wrong_clocks", "Runs with a clock that goes back or leaps, resumed with another one.")
    for number, seconds in enumerate((-60.0, -3e7, 1e8)):
        out = bench.place()
        aim = ("deeplabzoo.training.logger:RunLog.step", 9, "after", "SIGKILL", "")
        assert bench.runs.train(out, bench.pictures, aim=aim, clock_s=seconds).wait() == -signal.SIGKILL
        for age, path in enumerate([*sorted((out / "state").iterdir()), *out.iterdir()]):
            os.utime(path, (1e9 - 1e6 * age, 1e9 - 1e6 * age))
        run = finished(bench.runs.train(out, bench.pictures, resume=True, clock_s=-seconds / (number + 2)))
        assert "going on after step 8" in run.logged
        assert_same(out, bench.reference)
        tally.survived[f"{seconds:+.0f} s at every look"] = "the same bits"
    tally.write()


def test_diverging(bench: Bench) -> None:
    """A run whose numbers leave the range, at three rates: the sentences, followed as they stand, lead to a sound state.

    Finite states of hundredfold weights are saved on the way, so one of them may have to go before the next; that of the best
    score was measured and stays.
    """
    tally = Tally("diverging", "Losses, gradients and weights that are no numbers.")
    good = ["optimizer=sgd", "lr=0.01", "loss=ce", "save_every=1", "allow_change=true"]
    for rate in ("1e20", "1e30", "3e38"):
        out = bench.place()
        aim = ("deeplabzoo.training.logger:RunLog.step", 6, "after", "SIGTERM", "")
        failed(bench.runs.train(out, bench.pictures, *good, aim=aim), 143)
        sentence = failed(bench.runs.train(out, bench.pictures, *good, f"lr={rate}", "loss=ce:1000", resume=True))
        assert "lower lr" in sentence
        removed: list[str] = []
        while (run := bench.runs.train(out, bench.pictures, *good, resume=True)).wait():
            found = re.search(r"The state of step (\d+), in .*, leads straight to this; remove it", failed(run))
            assert found, run.logged
            removed.append(f"step_{int(found[1]):08d}")
            shutil.rmtree(out / "state" / removed[-1])
        assert [one["step"] for one in metrics_of(out) if one["kind"] == "step"] == list(range(1, STEPS + 1))
        tally.survived[f"lr={rate}"] = f"{sentence.removeprefix('error: ').partition(',')[0]}; {len(removed)} states removed"
        shutil.rmtree(out)
    tally.write()
