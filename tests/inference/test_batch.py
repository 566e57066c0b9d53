"""`predict` over many photos: what is done is left out, what is not is never taken for done, from folders, lists and URLs."""

import io
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from helpers.color_net import ColorNet
from PIL import Image

import deeplabzoo.cli.predict as predict_module
from deeplabzoo.cli.predict import main
from deeplabzoo.data import image_sources
from deeplabzoo.data.image_sources import Source, find_images
from deeplabzoo.errors import DeepLabZooError, ImageError, OutputError
from deeplabzoo.inference import batch
from deeplabzoo.inference.batch import OutputOptions, label_image_files, settings_hash
from deeplabzoo.inference.inputs import job_for_folder
from deeplabzoo.inference.large_predict import predict_to_files
from deeplabzoo.inference.predictor import Predictor

OPTIONS = OutputOptions(0.5, True, {})


class PickyNet(ColorNet):
    """Ends its process at a white image, as the system does when memory runs out."""

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        if image_BCHW.amin(dim=(2, 3)).min() == image_BCHW.amax(dim=(2, 3)).min() and image_BCHW.mean() > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward_low_resolution(image_BCHW)


class FullNet(ColorNet):
    """Ends its process after a white image in the middle of the next write, as a limit of file sizes does."""

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        if image_BCHW.amin(dim=(2, 3)).min() == image_BCHW.amax(dim=(2, 3)).min() and image_BCHW.mean() > 0:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        return super().forward_low_resolution(image_BCHW)


def image_bytes(red: int = 255) -> bytes:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:20, :30, 0] = red
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.png").write_bytes(image_bytes())
    return folder


@pytest.fixture(autouse=True)
def net(monkeypatch: pytest.MonkeyPatch) -> ColorNet:
    """The model that the command is given; a test may change it between two calls."""
    known = ColorNet()
    monkeypatch.setattr(predict_module, "load_named_model", lambda model, weights: known)
    return known


@pytest.fixture
def bucket() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for name in ("a.png", "trip/b.png", ".hidden.png", "notes.txt"):
        files.pipe(f"/bucket/{name}", b"words" if name == "notes.txt" else image_bytes())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def states(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_finished_images_are_skipped_and_logged(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The second run writes nothing, a lost result and a new image are made, and one line tells how many were there."""
    call = [str(photos), "--out", str(tmp_path / "out")]
    assert main(call) == 0
    before = states(tmp_path / "out")
    assert len(before) == 12
    capsys.readouterr()
    assert main(call) == 0
    assert "skipped 4 of 4 images" in caplog.text
    assert capsys.readouterr().out == ""
    assert states(tmp_path / "out") == before
    (tmp_path / "out" / "b_labels.png").unlink()
    (photos / "e.png").write_bytes(image_bytes())
    assert main(call) == 0
    assert "skipped 3 of 5 images" in caplog.text
    caplog.clear()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["b.png", "e.png"]
    assert len(states(tmp_path / "out")) == 15
    assert main([*call, "--overwrite"]) == 0
    assert "skipped" not in caplog.text
    assert capsys.readouterr().out.count("->") == 5


@pytest.mark.parametrize("change", ["weights", "photo", "tile", "overlay", "half", "foreign"])
def test_other_images_weights_and_settings_are_made_again(
    photos: Path, tmp_path: Path, net: ColorNet, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """Old labels under a new setting would be a silent lie; so would a file that something else put there."""
    call, out, again = [str(photos), "--out", str(tmp_path / "out")], tmp_path / "out", 4
    assert main(call) == 0
    capsys.readouterr()
    if change == "weights":
        net.colors.data[1, 0] = 0.9
    elif change == "photo":
        (photos / "a.png").write_bytes(image_bytes(red=254))
        again = 1
    elif change == "tile":
        call += ["--tile", "64"]
    elif change == "overlay":
        call += ["--alpha", "0.7"]
    elif change == "half":
        (out / "a.json").write_bytes((out / "a.json").read_bytes()[:40])
        (out / "b_labels.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        again = 2
    else:
        Image.new("P", (60, 40)).save(out / "a_labels.png")
        again = 1
    assert main(call) == 0
    assert capsys.readouterr().out.count("->") == again


def test_a_choice_of_kinds_is_found_among_all(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever asks for labels alone after all three has them; how an overlay was drawn does not count for labels."""
    assert main([str(photos), "--out", str(tmp_path / "out"), "--alpha", "0.2"]) == 0
    assert main([str(photos), "--out", str(tmp_path / "out"), "--labels", "--json"]) == 0
    assert "skipped 4 of 4 images" in caplog.text


def test_the_next_image_is_read_while_the_model_runs(
    photos: Path, tmp_path: Path, net: ColorNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process keeps the cores busy: the model finds the image behind it already read, and the one before it written."""
    read, seen = threading.Event(), []
    real_read, real_forward = batch.read_image, net.forward_low_resolution

    def reading(path: Path, **options: int) -> object:
        image = real_read(path, **options)
        if path.name == "b.png":
            read.set()
        return image

    def forward(image_BCHW: torch.Tensor) -> torch.Tensor:
        seen.append(read.wait(timeout=20))
        return real_forward(image_BCHW)

    monkeypatch.setattr(batch, "read_image", reading)
    monkeypatch.setattr(net, "forward_low_resolution", forward)
    predictor = Predictor(net, "cpu")
    jobs = [job_for_folder(source, tmp_path, ()) for source in find_images([str(photos)])]
    outcomes = list(label_image_files(predictor, jobs, OPTIONS))
    assert seen == [True] * 4
    assert [outcome.job for outcome in outcomes] == jobs
    assert all(file.is_file() for job in jobs for file in job.files.values())


def test_beside_a_large_image_nothing_else_is_held(
    photos: Path, tmp_path: Path, net: ColorNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is that of one large image: its files are there before the next one is read."""
    monkeypatch.setattr(batch, "MAX_PREFETCH_PIXELS", 100)
    jobs = [job_for_folder(source, tmp_path, ()) for source in find_images([str(photos)])]
    there: list[int] = []
    real = batch.read_image

    def reading(path: Path, **options: int) -> object:
        there.append(sum(file.is_file() for job in jobs for file in job.files.values()))
        return real(path, **options)

    monkeypatch.setattr(batch, "read_image", reading)
    assert len(list(label_image_files(Predictor(net, "cpu"), jobs, OPTIONS))) == 4
    assert there == [0, 3, 6, 9]


def test_what_writing_raises_reaches_the_caller(photos: Path, tmp_path: Path, net: ColorNet) -> None:
    """A full disk ends the run with its sentence, though another thread met it."""
    jobs = [job_for_folder(source, tmp_path / "gone", ()) for source in find_images([str(photos)])]
    with pytest.raises(OutputError):
        list(label_image_files(Predictor(net, "cpu"), jobs, OPTIONS))


def test_one_file_is_always_made(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who names one file for one image wants to see it made."""
    for _ in range(2):
        assert main([str(photos / "a.png"), "--out", str(tmp_path / "x.json")]) == 0
        assert capsys.readouterr().out.startswith("a.png: ")


def test_a_large_image_carries_its_stamp_too(photos: Path, tmp_path: Path) -> None:
    """Row by row or whole, the file says what it was made of, and the stamp leaves the labels alone."""
    predictor = Predictor(ColorNet(), "cpu", tile=64)
    job = job_for_folder(Source(photos / "a.png", Path("a")), tmp_path, ())
    predict_to_files(predictor, photos / "a.png", job.files, stamp="known")
    with Image.open(job.files["labels"]) as labels, Image.open(job.files["overlay"]) as overlay:
        assert labels.info["made_of"] == "known"
        assert overlay.info["made_of"].startswith("known alpha 0.5")
        assert np.asarray(labels)[5, 5] == 1
    assert json.loads(job.files["json"].read_text())["made_of"] == "known"


def test_a_list_in_a_text_file(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand names do not fit into a command line; an empty list is a sentence."""
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("in/b.png\n\nin/a.png\nmemory://x/y.png\n")
    found = find_images(["list.txt", "in/a.png"])
    assert [one.display_name for one in found] == [str(Path("in/b.png")), str(Path("in/a.png")), "memory://x/y.png"]
    Path("list.txt").write_text("\n")
    with pytest.raises(ImageError, match=r"list 'list\.txt' is empty"):
        find_images(["list.txt"])


@pytest.mark.parametrize(
    ("tail", "flags", "expected"),
    [
        ("", [], ["a.json"]),
        ("/", ["--recursive"], ["a.json", "trip/b.json"]),
        ("/*/*.png", [], ["b.json"]),
        ("/trip/b.png", [], ["b.json"]),
    ],
)
def test_images_behind_a_url(bucket: str, tmp_path: Path, tail: str, flags: list[str], expected: list[str]) -> None:
    """Folder, pattern and single image as on the disk; what is done is left out until the image behind the URL changes."""
    call = [bucket + tail, "--out", str(tmp_path), "--json", *flags]
    assert main(call) == 0
    before = states(tmp_path)
    assert sorted(before) == expected
    facts = json.loads((tmp_path / expected[-1]).read_text())
    assert facts["image"].startswith("memory://")
    assert [one["name"] for one in facts["classes"]] == ["background", "red"]
    assert main(call) == 0
    assert states(tmp_path) == before
    fsspec.filesystem("memory").pipe("/bucket/trip/b.png", image_bytes(red=200))
    assert main(call) == 0
    changed = {name for name, time in states(tmp_path).items() if time != before[name]}
    assert changed == {name for name in expected if "b.json" in name}


@pytest.mark.parametrize(
    ("url", "status", "said"),
    [
        ("zip://", 2, "'zip://' cannot be read"),
        ("reference://x", 2, "'reference://x' cannot be read"),
        ("zip://x.jpg::missing.zip", 1, "does not exist"),
        ("memory://bucket/none.png", 1, "'memory://bucket/none.png' does not exist"),
        ("memory://bucket/*.gif", 1, "holds no images"),
        ("nosuch://bucket/a.png", 2, "'nosuch://bucket/a.png' cannot be read"),
        ("memory://bucket/notes.txt", 1, "not an image"),
    ],
)
def test_urls_that_lead_nowhere_are_sentences(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, status: int, said: str
) -> None:
    """Missing, empty, unknown, no image."""
    assert main([url, "--out", str(tmp_path / "out")]) == status
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert said in error


def test_no_more_than_the_limit_is_read_of_a_remote_image(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer without end, or an archive that unpacks to gigabytes, does not fill the memory."""
    monkeypatch.setattr(image_sources, "MAX_REMOTE_BYTES", 50)
    with pytest.raises(ImageError, match="download it and give the file"):
        image_sources.read_url(bucket + "/a.png", max_pixels=10_000)


@pytest.mark.parametrize("how", ["folder", "cp -p", "rename"])
def test_another_image_of_equal_name_size_and_time_is_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """A stamp is of path and content: burst frames and copies that keep their times agree in everything else."""
    files = {}
    for day, red in (("day1", 255), ("day2", 0)):
        image = np.zeros((40, 60, 3), np.uint8)
        image[..., 0] = red
        files[day] = tmp_path / day / "frame.bmp"
        files[day].parent.mkdir()
        Image.fromarray(image).save(files[day])
        os.utime(files[day], ns=(10**18, 10**18))
    assert files["day1"].stat().st_size == files["day2"].stat().st_size
    second = files["day2"]
    out = tmp_path / "out"
    assert main([str(files["day1"]), "--out", str(out), "--json"]) == 0
    if how != "folder":
        (shutil.copy2 if how == "cp -p" else os.replace)(second, files["day1"])
        second = files["day1"]
    capsys.readouterr()
    assert main([str(second), "--out", str(out), "--json"]) == 0
    assert capsys.readouterr().out.startswith("frame.bmp: background 100 %")
    assert main([str(second), "--out", str(out), "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_again_is_the_former_spelling_of_overwrite(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It works and is not shown."""
    call = [str(photos), "--out", str(tmp_path / "out"), "--json"]
    assert main(call) == 0
    capsys.readouterr()
    assert main([*call, "--again"]) == 0
    assert capsys.readouterr().out.count("->") == 4
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--overwrite" in shown
    assert "--again" not in shown


@pytest.mark.posix
def test_what_a_killed_run_left_is_removed_by_the_next_one(photos: Path, tmp_path: Path) -> None:
    """Half-written files of processes that are gone; one that another process is writing, and other files, stay."""
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    out.mkdir()
    orphan, written, foreign = (out / f".{name}.0123456789ab.part" for name in ("a.json", "b.json", "other.json"))
    for path in (orphan, written, foreign):
        path.write_bytes(b"half")
        os.utime(path, (1e9, 1e9))
    with written.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main([str(photos), "--out", str(out), "--json"]) == 0
        assert {path.name for path in out.glob(".*")} == {written.name, foreign.name}
    assert main([str(photos), "--out", str(out), "--json"]) == 0
    assert {path.name for path in out.glob(".*")} == {foreign.name}


def test_workers_do_all_once_and_name_what_failed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The answer of two processes is the answer of one, file by file; a broken image stops nobody."""
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n rest")
    assert main([str(photos), "--out", str(tmp_path / "two"), "--workers", "2"]) == 1
    said = capsys.readouterr()
    assert "1 of 5 images could not be read" in said.err
    assert "broken.png" in said.err
    assert sorted(line[:5] for line in said.out.splitlines()) == ["a.png", "b.png", "c.png", "d.png"]
    assert main([str(photos), "--out", str(tmp_path / "one")]) == 1
    assert set(states(tmp_path / "two")) == set(states(tmp_path / "one"))
    for name in states(tmp_path / "one"):
        if name.endswith(".png"):
            assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert main([str(photos), "--out", str(tmp_path / "two")]) == 1
    assert "skipped 4 of 5 images" in caplog.text
    assert main([str(photos), "--out", str(tmp_path / "two"), "--workers", "0"]) == 2


@pytest.mark.posix
@pytest.mark.parametrize("net_class", [PickyNet, FullNet])
def test_a_killed_worker_is_a_sentence_and_leaves_no_half_file(photos: Path, tmp_path: Path, net_class: type[ColorNet]) -> None:
    """What was finished is kept and whole, so the same call does the rest; also where the worker ends while it writes."""
    predictor = Predictor(net_class(), "cpu")
    options = OutputOptions(0.5, True, {}, settings_hash(predictor))
    out = tmp_path / "out"
    jobs = [job_for_folder(source, out, ["json"]) for source in find_images([str(photos)])]
    out.mkdir()
    Image.new("RGB", (60, 40), "white").save(photos / "c.png")
    with pytest.raises(DeepLabZooError, match="worker process was killed"):
        list(label_image_files(predictor, jobs, options, workers=2))
    assert not (out / "c.json").exists()
    begun = [path.stat().st_size for path in out.glob(".c.json.*")]
    assert len(begun) == (net_class is FullNet)
    assert max(begun, default=0) <= 20
    for path in out.glob("[!.]*"):
        json.loads(path.read_text())
