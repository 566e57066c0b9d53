"""What the tests of training faults share: tiny runs in processes of their own, and what it means that two ended alike."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.training.logger import read_log

DRIVER = Path(__file__).with_name("kill_driver.py")
STEPS = 12
TINY = [
    *("model=deeplabv3plus_lcnet_050", "encoder_init=false", f"steps={STEPS}", "batch=2", "augmentation.crop=33", "ema=0.9"),
    *("network.head_channels=16", "network.decoder_channels=16", "network.decoder_low_level_channels=8"),
    *("network.dropout=0.1", "warmup_steps=3", "save_every=2", "evaluations=3", "evaluation_images=2", "workers=0"),
]
"""Settings of the recipe `folder`: states at steps 2, 4, 6, 8, 10 and 12, evaluations after 4, 8 and 12."""
PATIENCE_S = 240
"""The longest that one tiny run may take on a machine that is busy with other things."""


def write_images(root: Path, *, train: int = 7, val: int = 2, size: tuple[int, int] = (40, 48)) -> Path:
    """Write a folder of generated pictures and masks: discs that stand for persons; 7 do not divide into batches of 2."""
    for split, count in (("train", train), ("val", val)):
        drawn = SyntheticShapes(split, size, count, classes=2)
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for sample in (drawn[index] for index in range(count)):
            Image.fromarray(sample.image).save(root / split / "images" / f"{sample.name}.png")
            Image.fromarray(sample.labels).save(root / split / "masks" / f"{sample.name}.png")
    (root / "classes.txt").write_text("background\nperson\n")
    return root


@dataclass(frozen=True)
class Run:
    """One process that the driver forked."""

    driver: "Driver"
    pid: int
    output_file: Path
    doing_file: Path
    listener: threading.Thread | None = None
    """Writes what a run prints that can write no file itself."""

    @property
    def logged(self) -> str:
        """What it has printed."""
        if self.listener is not None:
            self.listener.join()
        return self.output_file.read_text(errors="replace")

    @property
    def doing(self) -> str:
        """What it was at last, as the driver's table of phases says."""
        return self.doing_file.read_bytes().decode().strip("\0 ")

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal, None while it runs."""
        return self.driver.answer({"ask": self.pid})

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the process, or to it and all that it started."""
        if self.status is None:
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Return the exit status once it has ended; a run that takes longer than `seconds` is a failure."""
        self.gone_after(seconds)
        status = self.status
        assert status is not None
        return status

    def gone_after(self, at_most: float = PATIENCE_S) -> float:
        """Wait for its end and return the seconds, without pauses in which the machine held run and tests still."""
        seconds, seen = 0.0, time.monotonic()
        while self.status is None:
            if seconds > at_most:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {at_most} s, at '{self.doing}': {self.logged[-2000:]}")
            time.sleep(0.01)
            now = time.monotonic()
            seconds, seen = seconds + min(now - seen, 1.0), now
        return seconds

    @property
    def processor_s(self) -> float:
        """Processor time that the process has used, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def helpers(self) -> list[int]:
        """Processes that it started and that run."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it may end meanwhile
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.pid and state != "Z" and int(stat.parent.name) != self.pid:
                    found.append(int(stat.parent.name))
        return found

    def await_step(self, log: Path, step: int) -> None:
        """Return when the log holds a step; the run must not have ended before."""
        while self.status is None and not (log.exists() and f'"kind": "step", "step": {step},' in log.read_text()):
            time.sleep(0.005)
        assert self.status is None, self.logged


class Driver:
    """The process that forks runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._line() == "ready"

    def answer(self, order: dict[str, Any]) -> Any:
        """Return the driver's answer to one order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def start(self, what: str, words: Sequence[object], **meets: Any) -> Run:
        """Start `train` or `publish` with these words; `meets` is what the driver's docstring lists."""
        self._count += 1
        logged, doing = (self.folder / f"{kind}_{self._count}.txt" for kind in ("told", "doing"))
        logged.touch()
        doing.write_bytes(b" " * 64)
        order = {"run": what, "words": list(map(str, words)), "told": str(logged), "doing": str(doing), **meets}
        if "full_from" not in meets:
            return Run(self, self.answer(order), logged, doing)
        order["told"] = str(logged.with_suffix(".pipe"))
        os.mkfifo(order["told"])
        listener = threading.Thread(target=lambda: logged.write_bytes(Path(order["told"]).read_bytes()))
        listener.start()
        return Run(self, self.answer(order), logged, doing, listener)

    def publish(self, run: Path, data: Path, manifest: Path, *, tag: str = "v1", **meets: Any) -> Run:
        """Start publishing a finished run into its folder and beside a manifest."""
        terms = ["--tag", tag, "--data-license", "drawn by a test"]
        return self.start("publish", [run, "--data", data, "--manifest", manifest, *terms], **meets)

    def train(self, out: Path, data: Path, *settings: str, resume: bool = False, **meets: Any) -> Run:
        """Start the tiny training into `out`, or go on with it by the same command and --resume."""
        words = ["folder", "--data", data, "--out", out, *(["--resume"] if resume else []), "--set", *TINY, *settings]
        return self.start("train", words, **meets)


@contextmanager
def driver(folder: Path) -> Iterator[Driver]:
    """Give a driver whose process ends with the block."""
    one = Driver(folder)
    try:
        yield one
    finally:
        assert one.process.stdin is not None
        one.process.stdin.close()
        one.process.wait()
        assert one.process.stdout is not None
        one.process.stdout.close()


def finished(run: Run) -> Run:
    """Wait for a run that is meant to end well."""
    assert run.wait() == 0, run.logged
    return run


def failed(run: Run, status: int = 1) -> str:
    """Wait for a run that is meant to end with an error of ours and return the sentence: one line, no traceback."""
    ended = run.wait()
    logged = run.logged
    assert ended == status, logged
    assert "Traceback" not in logged, logged
    sentences = [line for line in logged.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, logged
    return sentences[0]


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """Return the log without the lines that tell of a start: every step and every evaluation, in order."""
    return [record for record in read_log(out / "log.jsonl") if record["kind"] != "start"]


def assert_same(out: Path, reference: Path, steps: int = STEPS) -> None:
    """Weights, average, optimizer, facts and metrics are equal to the bit; no step is lost or doubled; nothing is left over."""
    for name in ("last", "best"):
        assert (out / f"{name}.safetensors").read_bytes() == (reference / f"{name}.safetensors").read_bytes(), name
    ours, theirs = metrics_of(out), metrics_of(reference)
    assert [one["step"] for one in ours if one["kind"] == "step"] == list(range(1, steps + 1))
    assert ours == theirs
    ending = f"state/step_{steps:08d}"
    tensors = sorted(path.name for path in (reference / ending).glob("*.safetensors"))
    assert tensors == ["average.safetensors", "net.safetensors", "optimizer.safetensors"]
    for name in tensors:
        mine, its = load_file(out / ending / name), load_file(reference / ending / name)
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[key], its[key]) for key in its), name
    assert _facts(out / ending) == _facts(reference / ending)
    assert _report(out) == _report(reference)
    assert names_in(out) - {"state"} == names_in(reference) - {"state"}
    assert not [path.name for path in (out / "state").iterdir() if not path.name.startswith("step_")]


def names_in(folder: Path) -> set[str]:
    """Names of what lies in a folder, hidden files included."""
    return {path.name for path in folder.iterdir()}


def _facts(state: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((state / "facts.json").read_text())["facts"]
    return {key: value for key, value in facts.items() if key != "seconds"}


def _report(out: Path) -> dict[str, Any]:
    """Return what a report says about the result, without times and the way there."""
    report = json.loads((out / "report.json").read_text())
    val = {key: report["val"][key] for key in ("miou", "pixel_accuracy", "per_class", "images", "weights")}
    return {**{key: report[key] for key in ("recipe", "steps", "seed", "miou", "changed_after")}, "val": val}
