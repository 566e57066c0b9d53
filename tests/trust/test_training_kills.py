"""`kill -9` at any moment of a run, from its start to its release: the next call ends with what an undisturbed run ends with.

Weights, average, optimizer, facts and the metrics log are compared to the bit, and the folder must hold nothing else.
"""

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import Driver, Run, assert_same, finished, names_in
from trust_record import TrustRecord, write_record

KILL = "SIGKILL"
RANDOM_KILLS, SEED = 50, 20261121
ORPHANS_S = 15
"""A worker looks every 5 s whether its run is still there."""
WEIGHTS = Path(__file__).resolve().parents[2] / "weights"

Aim = tuple[str, int, str, str, str]


def aim(function: str, number: int, when: str = "before", word: str = "") -> Aim:
    """Return a kill before or after the `number`-th call of a function (on a file whose path holds `word`)."""
    return (function, number, when, KILL, word)


AIMED: dict[str, list[Aim]] = {
    "start: before the data are opened": [aim("deeplabzoo.training.train:open_splits", 1)],
    "start: the recipe half written": [aim("io:open", 1, "after", ".recipe.json.")],
    "start: the recipe written, no log yet": [aim("os:replace", 1, "after")],
    "start: the log opened": [aim("io:open", 1, "after", "log.jsonl")],
    "first step: before its line": [aim("deeplabzoo.training.logger:RunLog.step", 1)],
    "step: after its line": [aim("deeplabzoo.training.logger:RunLog.step", 7, "after")],
    "weights: the file opened": [aim("io:open", 3, "after", ".last.safetensors.")],
    "weights: before the rename": [aim("os:replace", 1, "before", ".best.safetensors.")],
    "weights: the last written, its state not": [aim("os:replace", 2, "after", ".last.safetensors.")],
    "state: the folder made": [aim("deeplabzoo.training.run_dir:save_file", 4)],
    "state: the optimizer's file written": [aim("deeplabzoo.training.run_dir:save_file", 5, "after")],
    "state: the facts opened": [aim("io:open", 2, "after", "facts.json")],
    "state: before its name": [aim("pathlib:Path.rename", 2, "before", ".writing_")],
    "state: after its name": [aim("pathlib:Path.rename", 3, "after", ".writing_")],
    "state: the oldest renamed": [aim("pathlib:Path.rename", 1, "after", "step_")],
    "evaluation: before a picture": [aim("deeplabzoo.evaluation.evaluate:predict_labels", 4)],
    "evaluation: before its line": [aim("deeplabzoo.training.logger:RunLog.evaluation", 2)],
    "evaluation: after its line": [aim("deeplabzoo.training.logger:RunLog.evaluation", 2, "after")],
    "report: before it is measured": [aim("deeplabzoo.training.train:evaluate", 1)],
    "report: half written": [aim("io:open", 1, "after", ".report.json.")],
    "report: before the curves": [aim("deeplabzoo.training.train:draw_curves", 1)],
    "report: the curves half written": [aim("io:open", 1, "after", ".curves.png.")],
    "resume: the log opened to be cut back": [
        aim("deeplabzoo.training.logger:RunLog.step", 6),
        aim("io:open", 2, "after", "log.jsonl"),
    ],
    "resume: in the first step after it": [
        aim("deeplabzoo.training.logger:RunLog.step", 5),
        aim("deeplabzoo.training.logger:RunLog.step", 1, "after"),
    ],
    "resume: three times at the same state": [aim("deeplabzoo.training.run_dir:save_file", number) for number in (8, 2, 2)],
}
"""Moments at which nothing but order and atomic renames protects a run; each process of a list is killed, then one ends."""

QUICK = ["resume: the log opened to be cut back"]

AIMED_AT_PUBLISHING: dict[str, Aim] = {
    "weights of the release half written": aim("io:open", 1, "after", "person.v1.safetensors"),
    "golden logits written": aim("deeplabzoo.publish.publish:save_golden", 1, "after"),
    "before the card": aim("deeplabzoo.publish.publish:_write_card", 1),
    "the release before its name": aim("pathlib:Path.rename", 1, "before", ".release."),
    "the release after its name": aim("pathlib:Path.rename", 1, "after", ".release."),
    "a file beside the manifest half written": aim("io:open", 1, "after", "/weights/.deeplabv3plus"),
    "the files beside the manifest, before its row": aim("os:replace", 1, "before", ".manifest.json."),
    "after the row": aim("os:replace", 1, "after", ".manifest.json."),
}


@pytest.fixture(scope="module")
def released(runs: Driver, pictures: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the undisturbed run, published."""
    folder = tmp_path_factory.mktemp("released")
    run, manifest = project(reference, folder)
    finished(runs.publish(run, pictures, manifest))
    return folder


def project(reference: Path, folder: Path) -> tuple[Path, Path]:
    """Return a copy of the run, and a manifest that lists nothing yet."""
    manifest = folder / "project" / "weights" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    everything = json.loads((WEIGHTS / "manifest.json").read_text())
    manifest.write_text(json.dumps({**everything, "rows": []}))
    return Path(shutil.copytree(reference, folder / "run")), manifest


def killed_there(run: Run) -> None:
    """The process must have died of the kill that was aimed, at the moment that it names."""
    assert run.wait() == -signal.SIGKILL, run.logged


def chain(runs: Driver, pictures: Path, out: Path, aims: list[Aim]) -> None:
    """Let process after process be killed, then one end."""
    for number, one in enumerate(aims):
        killed_there(runs.train(out, pictures, resume=number > 0, aim=one))
        assert not (out / "curves.png").exists()
    finished(runs.train(out, pictures, resume=True))


@pytest.mark.parametrize("moment", QUICK)
def test_a_kill_at_this_moment_costs_nothing(
    runs: Driver, pictures: Path, reference: Path, tmp_path: Path, moment: str
) -> None:
    """No line of the log is lost when the process that cuts it back is killed; half a file is swept away."""
    chain(runs, pictures, tmp_path / "run", AIMED[moment])
    assert_same(tmp_path / "run", reference)


def assert_same_release(folder: Path, expected: Path) -> None:
    """The release, the manifest and what lies beside it are those of a publication that nothing disturbed."""
    ours, theirs = folder / "run" / "release", expected / "run" / "release"
    assert names_in(ours) == names_in(theirs)
    for one in theirs.glob("*.safetensors"):
        assert (ours / one.name).read_bytes() == one.read_bytes(), one.name
    assert names_in(folder / "run") == names_in(expected / "run")
    beside, there = folder / "project" / "weights", expected / "project" / "weights"
    assert names_in(beside) == names_in(there)
    (mine,), (its,) = (json.loads((one / "manifest.json").read_text())["rows"] for one in (beside, there))
    assert mine.keys() == its.keys()
    assert all(mine[key] == its[key] for key in its if key not in ("metrics", "training"))  # these two hold dates


def publish_again(runs: Driver, pictures: Path, run: Path, manifest: Path) -> None:
    """Publish once more after a kill; where the row was written already, the command says that it is released."""
    again = runs.publish(run, pictures, manifest)
    listed = bool(json.loads(manifest.read_text())["rows"])
    assert again.wait() == (2 if listed else 0), again.logged
    assert ("is released already" in again.logged) == listed


def killed_after(start: Callable[[], Run], at_s: float) -> Run:
    """Start a process, kill it when it has used so much processor time, and return it."""
    run = start()
    while run.status is None and run.processor_s < at_s:
        time.sleep(0.005)
    run.send(signal.SIGKILL)
    killed_there(run)
    return run


def processor_time(run: Run) -> float:
    """Return what a run uses from its start to its end, but for the last moments, in seconds."""
    used = 0.0
    while run.status is None:
        used = run.processor_s
        time.sleep(0.005)
    finished(run)
    return 0.97 * used


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_fifty_kills_at_random_moments(runs: Driver, pictures: Path, reference: Path, released: Path, tmp_path: Path) -> None:
    """Moments drawn over the processor time of training and publishing; every third training has two workers."""
    started, draw, came_down = time.monotonic(), random.Random(SEED), Counter[str]()
    training_s = processor_time(runs.train(tmp_path / "timed", pictures))
    run, manifest = project(reference, tmp_path / "timed_release")
    publishing_s = processor_time(runs.publish(run, pictures, manifest))
    for number in range(RANDOM_KILLS):
        at_s, place = draw.uniform(0, training_s + publishing_s), tmp_path / str(number)
        if at_s < training_s:
            out, settings = place / "run", ["workers=2"] if number % 3 == 0 else []
            killed = killed_after(lambda: runs.train(out, pictures, *settings), at_s)  # noqa: B023
            finished(runs.train(out, pictures, *settings, resume=True))
            assert_same(out, reference)
        else:
            run, manifest = project(reference, place)
            killed = killed_after(lambda: runs.publish(run, pictures, manifest), at_s - training_s)  # noqa: B023
            publish_again(runs, pictures, run, manifest)
            assert_same_release(place, released)
        came_down[killed.doing] += 1
        assert_no_orphans(killed)
        shutil.rmtree(place)
    write_record(
        TrustRecord(
            name="training_kills",
            area="training",
            what="Training and publishing killed by SIGKILL at random moments, then called again: the same bits in the end.",
            command="pytest -m soak tests/trust/test_training_kills.py -k random",
            seconds=round(time.monotonic() - started, 1),
            faults=RANDOM_KILLS,
            survived=sum(came_down.values()),
            details={
                "seed": SEED,
                "came_down_in": dict(sorted(came_down.items())),
                "training_processor_s": round(training_s, 2),
                "publishing_processor_s": round(publishing_s, 2),
            },
        )
    )


def assert_no_orphans(killed: Run) -> None:
    """No process that reads pictures outlives its run for long."""
    end = time.monotonic() + ORPHANS_S
    while killed.helpers and time.monotonic() < end:
        time.sleep(0.2)
    assert not killed.helpers


@pytest.mark.soak
@pytest.mark.timeout(2 * 3600)
def test_kills_at_every_weak_moment(runs: Driver, pictures: Path, reference: Path, released: Path, tmp_path: Path) -> None:
    """Each moment of the two lists above, and the one between a release put aside and the new one in its place."""
    started = time.monotonic()
    for number, aims in enumerate(AIMED.values()):
        chain(runs, pictures, tmp_path / str(number), aims)
        assert_same(tmp_path / str(number), reference)
    for number, one in enumerate(AIMED_AT_PUBLISHING.values()):
        place = tmp_path / f"published_{number}"
        run, manifest = project(reference, place)
        killed_there(runs.publish(run, pictures, manifest, aim=one))
        publish_again(runs, pictures, run, manifest)
        assert_same_release(place, released)
    place = Path(shutil.copytree(released, tmp_path / "replaced"))
    run, manifest = place / "run", place / "project" / "weights" / "manifest.json"
    killed_there(runs.publish(run, pictures, manifest, tag="v2", aim=aim("pathlib:Path.rename", 1, "after", "release")))
    finished(runs.publish(run, pictures, manifest, tag="v2"))
    assert names_in(run) == names_in(released / "run")
    assert [row["tag"] for row in json.loads(manifest.read_text())["rows"]] == ["v1", "v2"]
    kills = sum(map(len, AIMED.values())) + len(AIMED_AT_PUBLISHING) + 1
    write_record(
        TrustRecord(
            name="training_aimed_kills",
            area="training",
            what="Training and publishing killed by SIGKILL between two writes, at each moment that only their order protects.",
            command="pytest -m soak tests/trust/test_training_kills.py -k weak",
            seconds=round(time.monotonic() - started, 1),
            faults=kills,
            survived=kills,
            details={"moments": [*AIMED, *AIMED_AT_PUBLISHING, "a release put aside, the new one without its name"]},
        )
    )
