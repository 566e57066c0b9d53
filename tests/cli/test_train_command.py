"""`python -m deeplabzoo.train`: its options are frozen, its refusals are sentences, its list is light."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplabzoo.cli.train import build_parser, main
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes

QUICK = ["steps=2", "batch=2", "workers=0", "evaluations=1", "augmentation.crop=65", "model=deeplabv3plus_lcnet_050"]


def test_the_options_are_frozen() -> None:
    """A new knob belongs into a recipe; an option that goes or changes its name breaks other people's scripts."""
    options = {tuple(action.option_strings) or action.dest for action in build_parser()._actions}
    assert options == {("-h", "--help"), "recipe", ("--root",), ("--data",), ("--out",), ("--resume",), ("--set",), ("--list",)}


def test_listing_imports_no_torch() -> None:
    """`--list` answers at once, with a line for every recipe."""
    code = "import sys; from deeplabzoo.cli.train import main; main(['--list']); assert 'torch' not in sys.modules"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "shapes " in listed
    assert "deeplabv3plus_resnet101_voc " in listed


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["shapes"], 2, "--out DIR is missing"),
        ([], 2, "RECIPE is missing"),
        (["shape", "--out", "OUT"], 2, "Did you mean 'shapes'"),
        (["shapes", "--out", "OUT", "--set", "stepps=3"], 2, "Did you mean 'steps'"),
        (["shapes", "--out", "OUT", "--set", "model=deeplabv3plus_resnet5"], 2, "resnet50"),
        (["shapes", "--out", "OUT", "--set", "loss=dicee"], 2, "'dice'"),
        (["shapes", "--out", "OUT", "--set", "class_weights=1,2"], 2, "4 classes"),
        (["shapes", "--out", "OUT", "--set", "amp=fp16"], 2, "fp16 trains on GPUs"),
        (["shapes", "--out", "OUT", "--set", "freeze_stages=9"], 2, "freeze_stages is 9"),
        (["deeplabv3plus_mobilenetv2_voc", "--out", "OUT"], 2, "needs --data"),
        (["folder", "--data", "absent", "--out", "OUT"], 1, "does not exist"),
        (["shapes", "--out", "OUT", "--sett", "a=b"], 2, "--set"),
    ],
)
def test_wrong_calls_end_in_a_sentence(
    arguments: list[str], status: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, the right status, and no run's folder that a correct call would then stumble over."""
    out = tmp_path / "run"
    assert main([str(out) if one == "OUT" else one for one in arguments]) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not (out / "log.jsonl").exists()
    assert not (out / "state").exists()


def _write_folder(root: Path, count: int = 6) -> None:
    for split, pictures in (("train", count), ("val", 2), ("test", 2)):
        data = SyntheticShapes("train" if split == "train" else "val", (70, 60), pictures, classes=2)
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(pictures):
            sample = data[index]
            Image.fromarray(sample.image).save(root / split / "images" / f"{split}{index}.jpg", quality=95)
            Image.fromarray((sample.labels == 1).astype(np.uint8) * 255).save(root / split / "masks" / f"{split}{index}.png")
    (root / "classes.txt").write_text("background\ndisc\n")


def test_ones_own_masks_can_be_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`train folder --data my_data --set model=…` with binary 0/255 masks; the report holds val and test, Dice and IoU."""
    _write_folder(tmp_path / "data")
    out = tmp_path / "run"
    settings = [*QUICK, "encoder_init=false", "pictures=1", "crop_val=48", "class_weights=median_frequency"]
    assert main(["folder", "--data", str(tmp_path / "data"), "--out", str(out), "--set", *settings]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["val"]["images"] == report["test"]["images"] == 2
    assert set(report["test"]["per_class"]) == {"background", "disc"}
    assert "6 training images" in caplog.text
    assert "disc" in caplog.text  # the histogram of classes


def test_images_in_two_splits_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture that is trained on cannot be measured on."""
    _write_folder(tmp_path / "data")
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        source = tmp_path / "data" / "train" / kind / f"train0.{suffix}"
        (tmp_path / "data" / "val" / kind / source.name).write_bytes(source.read_bytes())
    assert main(["folder", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 1
    assert "'train0'" in capsys.readouterr().err


def test_a_label_outside_the_classes_stops_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file and the value are named, on any device."""
    _write_folder(tmp_path / "data")
    Image.fromarray(np.full((70, 60), 100, np.uint8)).save(tmp_path / "data" / "train" / "masks" / "train3.png")
    out = tmp_path / "run"
    call = ["folder", "--data", str(tmp_path / "data"), "--out", str(out), "--set", *QUICK, "encoder_init=false"]
    assert main(call) == 1
    logged = capsys.readouterr().err
    assert "train3" in logged
    assert "100" in logged
    assert not (out / "log.jsonl").exists()


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_gets_curves_rates_and_images(tmp_path: Path) -> None:
    """Loss, learning rate, val scores, and photo beside truth and prediction."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    assert main(["shapes", "--out", str(out), "--set", *QUICK, "tensorboard=true", "log_every=1", "pictures=2"]) == 0
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "val/miou", "val/loss"} <= set(events.Tags()["scalars"])
    assert len(events.Tags()["images"]) == 2
