"""`python -m deeplabzoo.predict`: what it writes where, what it says, and how it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.color_net import PALETTE, ColorNet
from PIL import Image

import deeplabzoo.cli.predict as predict_module
from deeplabzoo.cli.predict import main
from deeplabzoo.data.image_sources import Source, find_images
from deeplabzoo.hub.factory import load_named_model


def save_scene(path: Path, side: int = 60) -> Path:
    """A black image whose top left quarter is red."""
    image = np.zeros((side, side, 3), np.uint8)
    image[: side // 2, : side // 2, 0] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A model that needs no weights, in the place of the zoo's; what was asked for is noted."""
    calls: list[tuple[str, str | None]] = []

    def load_named_model(model: str, weights: str | None) -> ColorNet:
        calls.append((model, weights))
        return ColorNet()

    monkeypatch.setattr(predict_module, "load_named_model", load_named_model)
    return calls


@pytest.fixture
def real_zoo(asked: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real models again, for tests of their errors."""
    monkeypatch.setattr(predict_module, "load_named_model", load_named_model)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_one_image_into_a_folder_gives_all_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole job in one line: "how do I run one image and save an overlay?" (jfzhang95#107)."""
    photo = save_scene(tmp_path / "scene.png")
    assert main([str(photo), "--out", str(tmp_path / "out")]) == 0
    assert names(tmp_path / "out") == ["scene.json", "scene_labels.png", "scene_overlay.png"]
    with Image.open(tmp_path / "out" / "scene_labels.png") as labels:
        assert labels.size == (60, 60)
        assert labels.getpixel((5, 5)) == 1
        assert labels.convert("RGB").getpixel((5, 5)) == PALETTE[1]
    facts = json.loads((tmp_path / "out" / "scene.json").read_text())
    assert facts["image"] == str(photo)
    assert facts["weights"] == ColorNet().weights_source
    assert facts["model"] == "deeplabv3_colors"
    assert [one["name"] for one in facts["classes"]] == ["background", "red"]
    said = capsys.readouterr().out
    assert said.startswith("scene.png: background 7")
    assert "red 2" in said
    assert f"-> {tmp_path / 'out' / 'scene_overlay.png'}" in said


@pytest.mark.parametrize(
    ("out", "flags", "expected"),
    [
        ("seen.png", [], ["seen.png"]),
        ("seen.jpg", ["--overlay"], ["seen.jpg"]),
        ("seen.webp", [], ["seen.webp"]),
        ("seen.png", ["--labels"], ["seen.png"]),
        ("seen.json", [], ["seen.json"]),
        ("seen.json", ["--json"], ["seen.json"]),
        ("seen.jpg", ["--overlay", "--json"], ["seen.jpg", "seen.json"]),
        ("seen.png", ["--labels", "--json"], ["seen.json", "seen.png"]),
        ("deep/er/seen.png", [], ["deep/er/seen.png"]),
        ("folder", ["--labels"], ["folder/scene_labels.png"]),
        ("folder.v2", ["--overlay", "--json"], ["folder.v2/scene.json", "folder.v2/scene_overlay.png"]),
        ("slash.png/", ["--json"], ["slash.png/scene.json"]),
    ],
)
def test_out_and_flags_say_what_is_written(tmp_path: Path, out: str, flags: list[str], expected: list[str]) -> None:
    """A file name with a suffix is one file; anything else is a folder; flags combine."""
    photo = save_scene(tmp_path / "in" / "scene.png")
    results = tmp_path / "results"
    assert main([str(photo), "--out", f"{results}/{out}", *flags]) == 0
    assert names(results) == expected
    for name in expected:
        if name.endswith(".json"):
            json.loads((results / name).read_text())
        else:
            with Image.open(results / name) as picture:
                assert picture.mode == ("P" if "--labels" in flags else "RGB")


def test_no_legend_keeps_the_images_size(tmp_path: Path) -> None:
    """For people who lay the overlay over something else."""
    photo = save_scene(tmp_path / "scene.png")
    assert main([str(photo), "--out", str(tmp_path / "o.png"), "--no-legend", "--alpha", "1"]) == 0
    with Image.open(tmp_path / "o.png") as overlay:
        assert overlay.size == (60, 60)
        assert overlay.getpixel((5, 5)) == PALETTE[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scene.png"], "--out"),
        (["--out", "x.png"], "IMAGE"),
        (["scene.png", "--out", "x.jpg", "--labels"], "lossy"),
        (["scene.png", "--out", "x.png", "--json"], ".json"),
        (["scene.png", "--out", "x.json", "--overlay"], "overlay"),
        (["scene.png", "--out", "x.png", "--overlay", "--labels"], "give a folder"),
        (["scene.png", "other.png", "--out", "x.png"], "2 images; give a folder"),
        (["scene.png", "--out", "x.png", "--alpha", "3"], "--alpha"),
        (["scene.png", "--out", "x.png", "--alpha", "half"], "--alpha"),
        (["scene.png", "--out", "x.png", "--overlai"], "Did you mean '--overlay'"),
        (["scene.png", "--out", "x.png", "--over"], "--over"),
        (["scene.png", "--out", "scene.png"], "overwrite the image"),
        ([".", "--out", "."], "folder of the images"),
        (["scene.png", "--out", "x.png", "--device", "gpu"], "gpu"),
    ],
)
def test_wrong_calls_are_one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """Nothing is written, the image is untouched, and the sentence says what to do."""
    monkeypatch.chdir(tmp_path)
    save_scene(tmp_path / "scene.png")
    save_scene(tmp_path / "other.png")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert said in error
    assert "Traceback" not in error
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.jpg", "--out", "x.png"], "'missing.jpg' does not exist"),
        (["*.gif", "--out", "out"], "No file matches the pattern '*.gif'"),
        (["empty", "--out", "out"], "has no images"),
        (["text.jpg", "--out", "x.png"], "not an image"),
        (["scene.png", "--out", "text.jpg/under/x.png"], "Cannot write into"),
        (["scene.png", "--out", "text.jpg/folder"], "Cannot write into"),
        (["scene.png", "--out", "taken", "--json"], "a folder of that name"),
    ],
)
def test_failed_work_is_one_sentence_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """Missing, empty, unreadable, unwritable."""
    monkeypatch.chdir(tmp_path)
    save_scene(tmp_path / "scene.png")
    (tmp_path / "text.jpg").write_text("words")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken" / "scene.json").mkdir(parents=True)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert said in error
    assert not (tmp_path / "x.png").exists()


def test_unwritable_output_is_found_before_the_model_is_loaded(tmp_path: Path, asked: list[tuple[str, str | None]]) -> None:
    """Minutes of work must not end in "permission denied"."""
    photo = save_scene(tmp_path / "scene.png")
    (tmp_path / "file").touch()
    assert main([str(photo), "--out", str(tmp_path / "file" / "x.png")]) == 1
    assert asked == []


def test_one_bad_image_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a thousand images the broken one is named, the rest is done, and the exit status tells."""
    for name in ("a.png", "b.png", "c.png"):
        save_scene(tmp_path / "in" / name)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--json"]) == 1
    assert names(tmp_path / "out") == ["a.json", "b.json", "c.json"]
    error = capsys.readouterr().err
    assert "bad.jpg" in error
    assert "1 of 4 images could not be read" in error


def test_folders_are_searched_as_asked_and_keep_their_shape(tmp_path: Path) -> None:
    """Only images, hidden files left out; folders below only with --recursive, and then results lie as images do."""
    save_scene(tmp_path / "in" / "a.png")
    save_scene(tmp_path / "in" / "B.JPG")
    save_scene(tmp_path / "in" / "trip" / "a.png")
    save_scene(tmp_path / "in" / ".hidden.png")
    (tmp_path / "in" / "notes.txt").write_text("x")
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "flat"), "--json"]) == 0
    assert names(tmp_path / "flat") == ["B.json", "a.json"]
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "deep"), "--json", "--recursive"]) == 0
    assert names(tmp_path / "deep") == ["B.json", "a.json", "trip/a.json"]


def test_patterns_are_resolved_where_the_shell_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted, or on Windows; and a file whose name has brackets is a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("one.png", "two.png", "x[1].png"):
        save_scene(tmp_path / name)
    assert [source.name.name for source in find_images(["*o*.png"])] == ["one", "two"]
    assert [source.name.name for source in find_images(["x[1].png"])] == ["x[1]"]


def test_results_of_two_images_never_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal names from two folders, or with two suffixes, are distinguished; the same image twice is done once."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/cat.jpg", "b/cat.jpg", "b/Cat.png", "dog.jpg"):
        save_scene(tmp_path / name)
    found = find_images(["a/cat.jpg", "b/cat.jpg", "dog.jpg", "./dog.jpg"])
    assert [str(one.name) for one in found] == ["a/cat", "b/cat", "dog"]
    assert [str(one.name) for one in find_images(["b"])] == ["Cat_png", "cat_jpg"]
    everything = find_images(["a", "b/cat.jpg", "b/Cat.png"])
    assert len({str(one.name).casefold() for one in everything}) == 3
    save_scene(tmp_path / "c" / "cat_jpg.png")
    for name in ("cat.jpg", "cat.png", "A.JPG", "a.jpg"):
        save_scene(tmp_path / "c" / name)
    assert [str(one.name) for one in find_images(["c"])] == ["A_jpg", "a_jpg_2", "cat_jpg", "cat_png", "cat_jpg_2"]


def test_planning_does_not_compare_every_image_with_every_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 000 names that all clash are distinguished through dictionaries; comparing them in pairs took minutes."""
    monkeypatch.setattr(Source, "__eq__", lambda *_: pytest.fail("two sources were compared"))
    names = [f"{tmp_path}/{number}{suffix}" for number in range(2000) for suffix in (".jpg", ".png")]
    found = find_images(names)
    assert len({str(one.name) for one in found}) == len(names)
    assert str(found[0].name) == "0_jpg"


@pytest.mark.posix
def test_links_that_lead_to_themselves_cost_no_other_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among images, as a folder below them, as the image itself and as --out: a sentence or a result, never a traceback."""
    monkeypatch.chdir(tmp_path)
    save_scene(tmp_path / "in" / "a.png")
    for link, target in (("in/loop.png", "loop.png"), ("in/folder", "folder"), ("in/up", "."), ("out", "out")):
        Path(link).symlink_to(target)
    assert main(["in", "--recursive", "--out", "results", "--json"]) == 1
    assert "1 of 2 images could not be read: 'in/loop.png'" in capsys.readouterr().err
    assert names(tmp_path / "results") == ["a.json"]
    assert main(["in/loop.png", "--out", "x.json"]) == 1
    assert capsys.readouterr().err.count("error: ") == 1
    assert main(["in/a.png", "--out", "out"]) == 1
    assert "Cannot write into 'out'" in capsys.readouterr().err


def test_a_file_whose_name_looks_like_a_url_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cat::1.jpg` exists, so it is read; it is a URL only where no such file exists."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat::1.png", "we::ird/a.png"):
        save_scene(Path(name))
    assert main(["cat::1.png", "we::ird", "--out", "out", "--json"]) == 0
    assert names(tmp_path / "out") == ["a.json", "cat::1.json"]


def test_earlier_results_are_not_taken_for_images(tmp_path: Path) -> None:
    """A folder of results inside the folder of images is left out the next time."""
    save_scene(tmp_path / "a.png")
    for _ in range(2):
        assert main([str(tmp_path), "--out", str(tmp_path / "results"), "--recursive"]) == 0
    assert names(tmp_path / "results") == ["a.json", "a_labels.png", "a_overlay.png"]


def test_an_interrupted_run_leaves_whole_files_and_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C is not a bug: no traceback, and what was written is complete."""
    for name in ("a.png", "b.png"):
        save_scene(tmp_path / "in" / name)
    plain, calls = ColorNet.forward_low_resolution, []

    def interrupted(self: ColorNet, image: object) -> object:
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, image)

    monkeypatch.setattr(ColorNet, "forward_low_resolution", interrupted)
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 130
    assert names(tmp_path / "out") == ["a.json", "a_labels.png", "a_overlay.png"]
    assert capsys.readouterr().err.strip().endswith("interrupted")


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What we did not foresee must not be dressed up as the user's mistake."""
    monkeypatch.setattr(ColorNet, "forward_low_resolution", lambda self, image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(save_scene(tmp_path / "a.png")), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("deeplabv3plus_mobilenetv2_voc", None)),
        (["--weights", "v1"], ("deeplabv3plus_mobilenetv2_voc", "v1")),
        (["--model", "deeplabv3_resnet50_voc"], ("deeplabv3_resnet50_voc", None)),
        (
            ["--model", "deeplabv3_resnet50_voc", "--weights", "mine.safetensors"],
            ("deeplabv3_resnet50_voc", "mine.safetensors"),
        ),
        (["--weights", "mine.safetensors"], ("mine.safetensors", None)),
    ],
)
def test_a_weights_file_alone_names_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, str | None]], arguments: list[str], expected: tuple
) -> None:
    """Our checkpoints say what they are; asking for the name once more would only allow a contradiction."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").touch()
    save_scene(tmp_path / "a.png")
    assert main(["a.png", "--out", "x.png", *arguments]) == 0
    assert asked == [expected]


@pytest.mark.usefixtures("real_zoo")
def test_own_checkpoint_predicts(tmp_path: Path) -> None:
    """`net.save` and `--weights FILE` meet: classes and colours come with the file."""
    import deeplabzoo

    net = deeplabzoo.create("deeplabv3_resnet18", num_classes=3)
    net.save(tmp_path / "mine.safetensors")
    photo = save_scene(tmp_path / "scene.png")
    assert main([str(photo), "--out", str(tmp_path / "x.json"), "--weights", str(tmp_path / "mine.safetensors")]) == 0
    facts = json.loads((tmp_path / "x.json").read_text())
    assert {one["name"] for one in facts["classes"]} <= set(net.classes)
    assert facts["weights"]["source"] == "mine.safetensors"
    assert len(facts["weights"]["sha256"]) == 64


@pytest.mark.usefixtures("real_zoo")
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--model", "deeplabv3_mobilenetv2_vok"], 2, "voc"),
        (["--weights", "empty.safetensors"], 1, "empty.safetensors"),
        (["--weights", "no_such_tag"], 2, "no_such_tag"),
        (["--model", "empty.safetensors", "--weights", "coral"], 2, "leave --weights out"),
    ],
)
def test_unusable_models_and_weights_are_sentences(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    """A typing mistake and a damaged file, each in one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.safetensors").touch()
    save_scene(tmp_path / "a.png")
    assert main(["a.png", "--out", "x.png", *arguments]) == status
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert said in error


def test_the_documented_command_runs(tmp_path: Path, shared_data: Path) -> None:
    """As a user types it, with published weights from a local file; nothing but the report on stdout."""
    photo = Path(__file__).resolve().parents[2] / "docs" / "images" / "cat.jpg"
    weights = shared_data / "tflite" / "deeplabv3_mnv2_pascal_quant.tflite"
    done = subprocess.run(
        [sys.executable, "-m", "deeplabzoo.predict", photo, "--out", tmp_path, "--weights", weights],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cat.jpg: cat 8")
    assert done.stdout.count("\n") == 1
    assert names(tmp_path) == ["cat.json", "cat_labels.png", "cat_overlay.png"]
