"""What a resumed run believes: states that are whole, of this very run, and the newest by step; and what it clears away."""

import dataclasses
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from deeplabzoo.errors import DeepLabZooError, OutputError, TrainingError, UsageError
from deeplabzoo.files import remove_partial_files, write_atomically
from deeplabzoo.publish.release import staged_folder
from deeplabzoo.training.logger import RunLog, read_log
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.run_dir import RunDir, TrainingState, load_state, save_state

RECIPE = Recipe(name="tiny", model="deeplabv3_resnet18", data="shapes", steps=9)
OTHER = dataclasses.replace(RECIPE, lr=0.5)


def a_state(step: int, recipe: Recipe = RECIPE, size: int = 4) -> TrainingState:
    facts = {"recipe_sha256": recipe.digest(), "data_sha256": "d"}
    return TrainingState(
        step, {"net": {"w": torch.full((size,), float(step))}, "optimizer": {"m": torch.ones(size) * step}}, facts
    )


def a_run(out: Path, *steps: int, recipe: Recipe = RECIPE) -> RunDir:
    """Return a folder as a run leaves it that was stopped after the last of `steps`."""
    folder = RunDir(out)
    folder.start(recipe, "d", resume=False)
    folder.log.touch()
    for step in steps:
        save_state(folder.states, a_state(step, recipe))
    return folder


@contextmanager
def full_disk(largest_file_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", ["net.safetensors", "optimizer.safetensors"])
def test_a_file_of_another_state_is_noticed(tmp_path: Path, file: str) -> None:
    """Of the same size and whole, it would resume half of one step and half of another."""
    folder = a_run(tmp_path, 2, 4)
    shutil.copy(folder.states / "step_00000002" / file, folder.states / "step_00000004" / file)
    state = load_state(folder.states)
    assert state is not None
    assert state.step == 2


@pytest.mark.parametrize("facts", ["[]", '{"step": 4}', '{"step": 4, "sha256": [], "facts": {}}', "\xff", ""])
def test_facts_of_any_wrong_form_are_passed_over(tmp_path: Path, facts: str) -> None:
    """JSON that is no object, or one without its fields, is damage like any other."""
    folder = a_run(tmp_path, 2, 4)
    (folder.states / "step_00000004" / "facts.json").write_text(facts, encoding="latin-1")
    state = load_state(folder.states)
    assert state is not None
    assert state.step == 2


def test_nothing_whole_is_never_a_fresh_start(tmp_path: Path) -> None:
    """A run of days whose states were all damaged is not begun again at step 0 as if nothing had been."""
    folder = a_run(tmp_path, 2, 4)
    for state in folder.states.iterdir():
        os.truncate(state / "net.safetensors", 10)
    folder.log.write_text('{"kind": "step", "step": 1}\n')
    with pytest.raises(TrainingError, match=r"None of the states in .* is whole; restore one, or remove that folder"):
        folder.start(RECIPE, "d", resume=True)
    assert folder.log.read_text() == '{"kind": "step", "step": 1}\n'


@pytest.mark.parametrize("recipe_file", [True, False])
def test_states_of_another_run_are_refused(tmp_path: Path, recipe_file: bool) -> None:
    """A state folder swapped with another run's is named; with recipe.json gone, too; `allow_change` goes on and says so."""
    folder, other = a_run(tmp_path / "one", 2, 4), a_run(tmp_path / "other", 2, 4, recipe=OTHER)
    shutil.rmtree(folder.states)
    shutil.copytree(other.states, folder.states)
    if not recipe_file:
        folder.recipe_file.unlink()
    with pytest.raises(UsageError, match="the state of step 4 is that of another recipe"):
        folder.start(RECIPE, "d", resume=True)
    with pytest.raises(UsageError, match="the training pictures"):
        folder.start(RECIPE, "e", resume=True)
    assert folder.start(dataclasses.replace(RECIPE, allow_change=True), "d", resume=True) is not None


def test_the_newest_state_is_that_of_the_highest_step(tmp_path: Path) -> None:
    """Whatever their files' times say: clocks go back."""
    folder = a_run(tmp_path, 98, 99_999_999)
    save_state(folder.states, a_state(100_000_000))
    for number, path in enumerate(sorted(folder.states.iterdir(), reverse=True)):
        os.utime(path, (1e9 + number, 1e9 + number))
    state = folder.state()
    assert state is not None
    assert state.step == 100_000_000
    assert sorted(path.name for path in folder.states.iterdir()) == ["step_100000000", "step_99999999"]


def test_files_of_others_in_the_folder_stop_no_run(tmp_path: Path) -> None:
    """A file browser leaves .DS_Store, a network drive .nfs0012_34: neither is ours to remove, nor a reason to end."""
    folder = a_run(tmp_path, 2)
    for name in (".DS_Store", ".nfs0012_34", "._step_00000002"):
        (folder.states / name).touch()
    save_state(folder.states, a_state(4))
    assert load_state(folder.states) is not None
    assert {".DS_Store", ".nfs0012_34", "._step_00000002"} < {path.name for path in folder.states.iterdir()}


def test_a_state_that_is_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    """A step can be saved again, by a run that was stopped, resumed and stopped before its next step."""
    folder = a_run(tmp_path, 2, 4)
    save_state(folder.states, a_state(4, size=7))
    assert sorted(path.name for path in folder.states.iterdir()) == ["step_00000002", "step_00000004"]
    state = folder.state()
    assert state is not None
    assert len(state.tensors["net"]["w"]) == 7


def test_a_full_disk_leaves_the_former_state_and_no_half_one(tmp_path: Path) -> None:
    """One sentence, no file that keeps the disk full, and the state before is the newest."""
    folder = a_run(tmp_path, 2)
    with (
        full_disk(2000),
        pytest.raises(OutputError, match=r"state of step 4 cannot .*; make room there and go on with --resume"),
    ):
        save_state(folder.states, a_state(4, size=1000))
    state = folder.state()
    assert state is not None
    assert state.step == 2
    assert [path.name for path in folder.states.iterdir()] == ["step_00000002"]


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    """Neither a traceback, nor a half line that a resume would trip over."""
    with RunLog(tmp_path, RECIPE, 0, ()) as log:
        log.step(1, loss=1.0, lr=0.1, gradient_norm=1.0)
        with full_disk(100), pytest.raises(OutputError, match="make room there and go on with --resume"):
            log.step(2, loss=1.0, lr=0.1, gradient_norm=1.0)
    assert [one["step"] for one in read_log(tmp_path / "log.jsonl")] == [1]
    with RunLog(tmp_path, RECIPE, 1, ()) as log:
        log.step(2, loss=1.0, lr=0.1, gradient_norm=1.0)
    assert [one["step"] for one in read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_what_killed_runs_left_half_written_is_removed(tmp_path: Path) -> None:
    """By the next run in the folder, each in its own: fifty kills must not fill the disk with halves of weights."""
    folder = a_run(tmp_path, 2)
    halves = [tmp_path / f".{name}.0123456789ab.part" for name in ("last.safetensors", "log.jsonl", "curves.png")]
    kept = [tmp_path / name for name in ("last.safetensors", ".mine.part", ".mine.0123456789ab.part")]
    for path in (*halves, *kept):
        path.touch()
    folder.start(RECIPE, "d", resume=True)
    assert not any(path.exists() for path in halves)
    assert all(path.exists() for path in kept)


def test_only_halves_of_that_very_file_are_removed(tmp_path: Path) -> None:
    """`a[1].txt` is a name, not a pattern; and what `write_atomically` leaves when it is cut off is what is found."""
    target, half = tmp_path / "a[1].txt", []

    def cut_off(file: object) -> None:
        half.extend(tmp_path.iterdir())
        shutil.copy(half[0], tmp_path / "copy")

    write_atomically(target, cut_off)
    other = tmp_path / half[0].name.replace("a[1]", "a1")
    for path in (half[0], other):
        path.touch()
    remove_partial_files(target)
    assert not half[0].exists()
    assert other.exists()


def test_a_release_put_aside_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    """Killed between its two renames, publishing leaves none in place: the next call restores it, even if that one fails."""
    aside, half = tmp_path / ".release.01234567.before", tmp_path / ".release.89abcdef.part"
    for folder in (aside, half):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    with pytest.raises(DeepLabZooError), staged_folder(tmp_path / "release"):
        raise TrainingError("It failed.")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]
    assert (tmp_path / "release" / "config.json").read_text() == aside.name


def test_the_last_good_state_is_named(tmp_path: Path) -> None:
    """The one from which the failing step was made is not good, however whole it is."""
    folder = RunDir(tmp_path)
    assert folder.resume_advice(3) == "No state was saved before."
    save_state(folder.states, a_state(3))
    assert "there is none before it, so begin anew" in folder.resume_advice(3)
    save_state(folder.states, a_state(5))
    assert "The last good state is that of step 5," in folder.resume_advice(7)
    assert "The state of step 5," in folder.resume_advice(5)
    assert "remove it to go on from that of step 3" in folder.resume_advice(5)
