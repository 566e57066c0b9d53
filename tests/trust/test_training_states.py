"""What a resumed run believes: states that are whole, of this very run, and the newest by step; and what it clears away."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from training_runs import write_images

from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.errors import DeepLabZooError, OutputError, TrainingError, UsageError
from deeplabzoo.files import remove_partial_files, write_atomically
from deeplabzoo.publish.release import staged_folder
from deeplabzoo.training.logger import RunLog, read_log
from deeplabzoo.training.recipe import ModelOptions, Recipe
from deeplabzoo.training.run_dir import RunDir, TrainingState, load_state, save_state
from deeplabzoo.training.train import train

RECIPE = Recipe(name="tiny", model="deeplabv3_resnet18", data="shapes", steps=9)
OTHER = dataclasses.replace(RECIPE, lr=0.5)
DATA = {"data_sha256": "d"}


def a_state(step: int, recipe: Recipe = RECIPE, size: int = 4) -> TrainingState:
    facts = {"recipe_sha256": recipe.digest(), "data_sha256": "d"}
    return TrainingState(
        step, {"net": {"w": torch.full((size,), float(step))}, "optimizer": {"m": torch.ones(size) * step}}, facts
    )


def a_run(out: Path, *steps: int, recipe: Recipe = RECIPE) -> RunDir:
    """Return a folder as a run leaves it that was stopped after the last of `steps`."""
    folder = RunDir(out)
    folder.start(recipe, DATA, resume=False)
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
        folder.start(RECIPE, DATA, resume=True)
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
        folder.start(RECIPE, DATA, resume=True)
    with pytest.raises(UsageError, match="the list of training images"):
        folder.start(RECIPE, {"data_sha256": "e"}, resume=True)
    assert folder.start(dataclasses.replace(RECIPE, allow_change=True), DATA, resume=True) is not None


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
    folder.start(RECIPE, DATA, resume=True)
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
    assert "there is none before it, so start again" in folder.resume_advice(3)
    save_state(folder.states, a_state(5))
    assert "The last good state is that of step 5," in folder.resume_advice(7)
    assert "The state of step 5," in folder.resume_advice(5)
    assert "remove it to go on from that of step 3" in folder.resume_advice(5)


def test_a_second_run_into_one_folder_is_refused(tmp_path: Path) -> None:
    """Two runs would mix logs, states and weights; the lock ends with the process that holds it, even when it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from deeplabzoo.training.run_dir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).lock(): print('locked', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder, holder.stdout as said:
        assert said.readline() == "locked\n"
        with pytest.raises(UsageError, match=rf"process {holder.pid} on .* or choose another --out"), RunDir(tmp_path).lock():
            pass
        holder.kill()
    with RunDir(tmp_path).lock():
        with pytest.raises(UsageError, match="by this process"), RunDir(tmp_path).lock():
            pass
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.posix
def test_workers_that_outlive_a_killed_run_do_not_keep_its_folder_locked(tmp_path: Path) -> None:
    """Forked processes inherit open files, but not the lock: `--resume` directly after `kill -9` is not refused."""
    folder = RunDir(tmp_path)
    with folder.lock():
        parent = os.getpid()
        child = os.fork()
        if child == 0:  # holds a copy of the lock's file handle
            os.close(os.dup(0))
            signal.pause()
            os._exit(0)
    try:
        assert os.getpid() == parent
        with folder.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_damaged_recipe_file_is_taken_from_the_state(tmp_path: Path) -> None:
    """A power cut may leave recipe.json empty; states hold the recipe, too. Without them a sentence says what to do."""
    folder = a_run(tmp_path, 2)
    folder.recipe_file.write_text("")
    with pytest.raises(TrainingError, match="repeat the run's first --set settings together with --resume"):
        folder.start(RECIPE, DATA, resume=True)
    save_state(folder.states, dataclasses.replace(a_state(4), facts={**a_state(4).facts, "recipe": RECIPE.to_dict()}))
    assert folder.recipe_to_resume() == RECIPE
    assert folder.start(RECIPE, DATA, resume=True) is not None
    assert folder.recipe() == RECIPE
    shutil.rmtree(folder.states)
    folder.log.unlink()
    folder.recipe_file.write_text("")
    assert folder.start(RECIPE, DATA, resume=True) is None, "nothing was begun, so nothing is lost"


def test_what_a_run_writes_is_flushed_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was renamed but not flushed is cut or empty after a power cut."""
    flushed: set[int] = set()
    renamed: dict[str, bool] = {}
    states: dict[str, bool] = {}
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def watched_fsync(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def watched_replace(old: str | Path, new: str | Path) -> None:
        if Path(new).parent == tmp_path:
            renamed[Path(new).name] = os.stat(old).st_ino in flushed
        replace(old, new)

    def watched_rename(old: str | Path, new: str | Path) -> None:
        if Path(old).name.startswith(".writing_"):
            states.update({f"{new}/{file.name}": file.stat().st_ino in flushed for file in Path(old).iterdir()})
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(os, "rename", watched_rename)
    train(tiny(), None, tmp_path)
    del renamed["curves.png"]  # drawn again by `--resume`
    assert renamed == dict.fromkeys(("recipe.json", "log.jsonl", "last.safetensors", "best.safetensors", "report.json"), True)
    assert len(states) > 2
    assert all(states.values())


def tiny(**settings: Any) -> Recipe:
    small = ModelOptions(head_channels=8, decoder_channels=8, decoder_low_level_channels=8)
    fields: dict[str, Any] = {"steps": 2, "batch": 2, "evaluations": 2, "evaluation_images": 1, "workers": 0, "ema": 0.9}
    augmentation = Augmentation(crop=(33, 33))
    model = "deeplabv3plus_lcnet_050"
    return Recipe(name="tiny", model=model, data="shapes", network=small, augmentation=augmentation, **{**fields, **settings})


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "gone"])
def test_damaged_weights_are_written_again_from_the_states(tmp_path: Path, damage: str) -> None:
    """A power cut that damages best and last weights costs nothing while the states hold the same tensors."""
    train(tiny(), None, tmp_path)
    folder = RunDir(tmp_path)
    whole = {path: path.read_bytes() for path in (folder.best, folder.last)}
    for path, content in whole.items():
        half = len(content) // 2
        new = {"cut": content[:half], "empty": b"", "zeros": content[:half] + bytes(len(content) - half), "gone": None}[damage]
        path.unlink()
        if new is not None:
            path.write_bytes(new)
    train(tiny(), None, tmp_path, resume=True)
    assert {path: path.read_bytes() for path in whole} == whole


def test_the_host_program_keeps_its_random_state_and_modes(tmp_path: Path) -> None:
    """`train` seeds torch and sets its deterministic mode for itself alone."""
    torch.manual_seed(5)
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.get_rng_state()
    try:
        train(tiny(), None, tmp_path)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.use_deterministic_algorithms(False)


def folder_run(tmp_path: Path) -> tuple[Path, Path]:
    """Return data and run of a `folder` recipe that has ended."""
    data, out = write_images(tmp_path / "data", train=3, val=1), tmp_path / "run"
    train(dataclasses.replace(tiny(), data="folder"), data, out)
    return data, out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("reordered classes", "classes: background, person -> person, background"),
        ("another image", "the files of the training or validation images or masks"),
        ("another mask", "the files of the training or validation images or masks"),
        ("another val image", "the files of the training or validation images or masks"),
        ("a name more", "the list of training images"),
    ],
)
def test_data_that_changed_since_the_state_are_refused(tmp_path: Path, change: str, named: str) -> None:
    """Equal names do not make equal data; and swapped class names would be saved with weights of the old order."""
    data, out = folder_run(tmp_path)
    recipe = dataclasses.replace(tiny(), data="folder")
    images, masks = (sorted((data / "train" / kind).iterdir()) for kind in ("images", "masks"))
    if change == "reordered classes":
        (data / "classes.txt").write_text("person\nbackground\n")
    elif change == "a name more":
        shutil.copy(images[0], images[0].with_name("new.png"))
        shutil.copy(masks[0], masks[0].with_name("new.png"))
    else:
        path = {"another image": images[1], "another mask": masks[1]}.get(change)
        path = path or next((data / "val" / "images").iterdir())
        ImageOps.mirror(Image.open(path)).save(path)
    with pytest.raises(UsageError, match=named):
        train(recipe, data, out, resume=True)
    train(dataclasses.replace(recipe, allow_change=True), data, out, resume=True)
    if change == "reordered classes":  # allowed once is not allowed for good
        (data / "classes.txt").write_text("background\nperson\n")
    assert RunDir(out).recipe() == recipe
    assert not json.loads((out / "recipe.json").read_text())["allow_change"]


def test_runs_of_older_versions_are_resumed(tmp_path: Path) -> None:
    """Their states hold neither recipe nor classes nor file contents; class names are then compared with the weights file."""
    data, out = folder_run(tmp_path)
    for facts in out.glob("state/*/facts.json"):
        written = json.loads(facts.read_text())
        for key in ("recipe", "classes", "data_contents_sha256"):
            del written["facts"][key]
        facts.write_text(json.dumps(written))
    recipe = dataclasses.replace(tiny(), data="folder")
    train(recipe, data, out, resume=True)
    (data / "classes.txt").write_text("person\nbackground\n")
    with pytest.raises(UsageError, match="classes: background, person -> person, background"):
        train(recipe, data, out, resume=True)
