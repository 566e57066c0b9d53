"""What befalls a run from outside: signals, a full disk, pictures and processes that are lost, numbers that are none, clocks.

Each ends in one sentence, and resumed, the run ends as if nothing had been.
"""

import dataclasses
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import STEPS, Driver, assert_same, failed, finished, metrics_of

from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.data.validation import count_labels
from deeplabzoo.errors import DataError, ImageError, StoppedError, TrainingError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.dataloader import Batch, BatchDataset, iterate_batches
from deeplabzoo.training.initialization import estimate_batch_norm_stats
from deeplabzoo.training.logger import RunLog, read_log
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.signals import ImmediateStop, StopRequest

SKIPPING = Recipe(
    name="t", model="-", data="shapes", steps=9, batch=2, augmentation=Augmentation(crop=(16, 24)), unreadable="skip"
)
STOPPING = dataclasses.replace(SKIPPING, unreadable="stop")


class Spoilt(SyntheticShapes):
    """Seven pictures, some of which cannot be read."""

    def __init__(self, *unreadable: int) -> None:
        super().__init__("train", (16, 24), 7, classes=2)
        self.unreadable = unreadable

    def __getitem__(self, index: int) -> Sample:
        if index in self.unreadable:
            raise ImageError(f"'{self.names[index]}' is damaged.")
        return super().__getitem__(index)

    def read_labels(self, index: int) -> np.ndarray:
        return self[index].labels


class Deadly(SyntheticShapes):
    """Pictures one of which kills the process that reads it, as a system does that has no memory left."""

    def __init__(self, deadly: int) -> None:
        super().__init__("train", (16, 24), 9)
        self.deadly = deadly

    def __getitem__(self, index: int) -> Sample:
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as a terminal gives it, whatever started these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stream_of(data: SyntheticShapes, recipe: Recipe = SKIPPING) -> BatchDataset:
    return BatchDataset(data, recipe, Preprocessing())


def all_batches(data: SyntheticShapes, workers: int = 0, start: int = 0) -> list[Batch]:
    return list(iterate_batches(stream_of(data), start, 9, workers=workers))


def test_skipping_is_a_function_of_the_step() -> None:
    """The same pictures take the places of the missing ones, whoever reads them and wherever a run is taken up again."""
    spoilt = Spoilt(1, 4)
    whole = all_batches(spoilt)
    missed = [tuple(batch.skipped.tolist()) for batch in whole]
    assert sum(map(len, missed)) > 4
    assert {index for one in missed for index in one} == {1, 4}
    for again, start in ((all_batches(spoilt, workers=1), 0), (all_batches(spoilt, start=5), 5)):
        for ours, theirs in zip(again, whole[start:], strict=True):
            assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True))


def test_skipping_touches_no_other_image() -> None:
    """Batches without a missing picture are those of a run in which none is missing."""
    untouched = [
        (ours, its) for ours, its in zip(all_batches(Spoilt(3)), all_batches(Spoilt()), strict=True) if not len(ours.skipped)
    ]
    assert 0 < len(untouched) < 9
    assert all(torch.equal(ours.image_BCHW, its.image_BCHW) for ours, its in untouched)


def test_images_that_are_all_unreadable_end_the_run() -> None:
    """Skipping must not go round for ever."""
    with pytest.raises(DataError, match="None of the 7 images of shapes train can be read"):
        all_batches(Spoilt(*range(7)))


def test_statistics_of_batchnorms_are_not_measured_on_fewer_images_in_silence() -> None:
    """An unreadable picture stops `recalibrate_norms` too, unless the recipe skips it."""
    torch.manual_seed(0)
    net = DeepLab(DeepLabConfig(architecture="deeplabv3plus", encoder="resnet18", num_classes=2, head_channels=8))
    with pytest.raises(ImageError, match="is damaged"):
        estimate_batch_norm_stats(net, dataclasses.replace(STOPPING, recalibrate_norms=8), Spoilt(1, 2, 3))


def test_masks_that_cannot_be_read_are_named_and_not_counted() -> None:
    """Or stop the run before its first step, as the recipe says."""
    logged: list[str] = []
    assert count_labels(Spoilt(2, 5), skipped=lambda error: logged.append(str(error))).images == 5
    assert logged == ["'train_00002' is damaged.", "'train_00005' is damaged."]
    with pytest.raises(ImageError, match="train_00002"):
        count_labels(Spoilt(2, 5))


def test_each_missing_image_is_logged_once_and_always_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the run that meets it first; a resumed one knows from the log that it was said."""
    lines = {"loss": 1.0, "lr": 0.1, "gradient_norm": 1.0}
    with RunLog(tmp_path, SKIPPING, 0, ()) as log:
        for step, skipped in ((1, ["a"]), (2, ["a", "b", "a"]), (3, [])):
            log.step(step, **lines, skipped=skipped)
    with RunLog(tmp_path, SKIPPING, 2, ()) as log:
        log.step(3, **lines, skipped=["b", "c"])
    logged = capsys.readouterr().err
    assert [logged.count(f"'{name}' cannot be read; another image takes its place") for name in "abc"] == [1, 1, 1]
    assert [one.get("skipped") for one in read_log(tmp_path / "log.jsonl")] == [["a"], ["a", "b", "a"], ["b", "c"]]


@pytest.mark.parametrize("deadly", [0, 5])
def test_a_worker_that_is_killed_is_one_sentence(monkeypatch: pytest.MonkeyPatch, deadly: int) -> None:
    """It says what to do, and comes when a batch is missing, never inside an update: torch's handler is not left installed."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    before = signal.getsignal(signal.SIGCHLD)
    arriving = iterate_batches(stream_of(Deadly(deadly)), 0, 9, workers=1)
    with pytest.raises(TrainingError, match=r"was killed, usually because memory ran out; lower workers .* --resume"):
        list(arriving)
    assert signal.getsignal(signal.SIGCHLD) is before


def asked_to_stop(number: signal.Signals) -> None:
    """Get a signal while a picture is read."""
    try:
        signal.raise_signal(number)
    except Exception as error:
        raise ImageError("It cannot be opened.") from error


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_of_the_steps_is_answered_on_the_spot(
    interruptible: None, number: signal.Signals, status: int
) -> None:
    """While data are looked at or the report is measured; `except Exception` of a picture's reader does not swallow it."""
    with pytest.raises(StoppedError, match=f"Stopped by {number.name}; .*--resume") as stopped, StopRequest():
        asked_to_stop(number)
    assert stopped.value.exit_status == status
    assert TrainingError.exit_status == 1


def a_loop_that_is_stopped(reached: list[object]) -> None:
    """Do as the training loop does, with a signal in the middle of a step."""
    with StopRequest() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        reached.append((stop.signal, signal.getsignal(signal.SIGTERM)))
        with pytest.raises(ImmediateStop), stop.immediate():
            reached.append("measuring")
        reached.append("saved")


def test_a_signal_between_steps_waits_for_the_loop() -> None:
    """An update is never left half made; what only measures is; a signal at the very end counts, and a second one kills."""
    reached: list[object] = []
    with pytest.raises(StoppedError):
        a_loop_that_is_stopped(reached)
    assert reached == [(signal.SIGTERM, signal.SIG_DFL), "saved"]


def test_a_signal_that_the_shell_ignores_stays_ignored() -> None:
    """Ctrl-C for the command in front does not stop a run that was started with `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_in_an_evaluation_leaves_at_once(runs: Driver, pictures: Path, reference: Path, tmp_path: Path) -> None:
    """With its step saved; the resumed run evaluates anew, and measures and trains the same. last.safetensors is not needed."""
    out = tmp_path / "run"
    moment = ("deeplabzoo.evaluation.evaluate:predict_labels", 4, "before", "SIGTERM", "")
    sentence = failed(runs.train(out, pictures, aim=moment), 143)
    assert sentence == f"error: Stopped by SIGTERM after step 8 of {STEPS}; --resume goes on from there."
    assert [one["kind"] for one in metrics_of(out)][-1] == "step"
    (out / "last.safetensors").unlink()
    finished(runs.train(out, pictures, resume=True))
    assert_same(out, reference)


@pytest.mark.parametrize(
    ("settings", "saved", "sentence"),
    [
        (
            "loss=ce:1000",
            False,
            "has non-finite values after step 1, so that step was not saved; .* No state was saved before.",
        ),
        ("loss=ce", True, "The loss is nan at step 1 .* The state of step 1, in .*, leads straight to this; there is none"),
        (f"evaluations={STEPS}", False, "The validation loss is nan after step 1, so that step was not saved; .* No state was"),
    ],
)
def test_a_state_that_is_no_good_is_not_called_good(
    runs: Driver, pictures: Path, tmp_path: Path, settings: str, saved: bool, sentence: str
) -> None:
    """A step can end in infinite weights, or in such that the next loss is none, with a loss of its own that was fine."""
    out = tmp_path / "run"
    diverging = ["optimizer=sgd", "lr=3e38", "warmup_steps=0", "save_every=1", settings]
    assert re.search(sentence, failed(runs.train(out, pictures, *diverging)))
    assert (out / "state").exists() == saved
    assert (out / "last.safetensors").exists() == saved
    assert not (out / "best.safetensors").exists(), "argmax of nan has a score, too"
