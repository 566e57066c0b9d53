"""Training learns: a tiny model on generated pictures, a student from its teacher."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deeplabzoo.cli.train import main
from deeplabzoo.data.transforms import normalize_images
from deeplabzoo.errors import UsageError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.logger import read_log
from deeplabzoo.training.losses import Teacher


def test_a_tiny_model_learns_the_shapes(tmp_path: Path) -> None:
    """The recipe `shapes` as it stands passes 90 % mIoU, in under two minutes on one core."""
    out = tmp_path / "run"
    assert main(["shapes", "--out", str(out), "--set", "workers=0"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["miou"] > 0.9
    assert report["hours"] * 3600 < 120
    losses = [one["loss"] for one in read_log(out / "log.jsonl") if one["kind"] == "step"]
    assert sum(losses[-20:]) < 0.25 * sum(losses[:20])


def test_a_student_follows_its_teacher(tmp_path: Path) -> None:
    """With the labels' loss switched off, only the teacher's answers are learned from; its classes must be the data's."""
    quick = ["steps=30", "batch=4", "workers=0", "evaluations=1", "teacher_scales=1"]
    assert main(["shapes", "--out", str(tmp_path / "teacher"), "--set", *quick]) == 0
    teacher = f"teacher={tmp_path / 'teacher' / 'best.safetensors'}"
    assert main(["shapes", "--out", str(tmp_path / "student"), "--set", *quick, teacher, "loss=ce:0", "seed=1"]) == 0
    losses = [one["loss"] for one in read_log(tmp_path / "student" / "log.jsonl") if one["kind"] == "step"]
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_can_start_from_another_runs_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`init` takes a file; the first loss is where the other run ended, not where an untrained network begins."""
    quick = ["steps=40", "batch=4", "workers=0", "evaluations=1"]
    assert main(["shapes", "--out", str(tmp_path / "one"), "--set", *quick]) == 0
    init = f"init={tmp_path / 'one' / 'last.safetensors'}"
    assert main(["shapes", "--out", str(tmp_path / "two"), "--set", *quick, init, "lr=1e-4"]) == 0
    assert "classifier kept for 4 of 4 classes" in caplog.text
    first, second = (
        [one["loss"] for one in read_log(tmp_path / name / "log.jsonl") if one["kind"] == "step"] for name in ("one", "two")
    )
    assert second[0] < 0.75 * first[0]


def test_a_teacher_sees_the_crop_with_its_own_mean_and_std(tmp_path: Path) -> None:
    """A student with another encoder normalizes pixels with other values; the teacher predicts as on its own input."""
    torch.manual_seed(0)
    config = DeepLabConfig(architecture="deeplabv3plus", encoder="lcnet_050", num_classes=4, head_channels=16)
    own, other = Preprocessing(), Preprocessing(mean=(0.5, 0.4, 0.6), std=(0.5, 0.25, 0.3))
    net = DeepLab(config, preprocessing=own).eval()
    net.save(tmp_path / "teacher.safetensors")
    student = DeepLab(config, preprocessing=other)
    teacher = Teacher(str(tmp_path / "teacher.safetensors"), (1.0,), student, torch.device("cpu"))
    image_BCHW = torch.randint(0, 256, (2, 3, 65, 97), dtype=torch.uint8)
    taught_BCHW = teacher(normalize_images(image_BCHW, other))
    x_BCHW = normalize_images(image_BCHW, own)
    with torch.no_grad():
        expected = (net(x_BCHW).softmax(1) + net(x_BCHW.flip(3)).flip(3).softmax(1)) / 2
    torch.testing.assert_close(taught_BCHW, expected, rtol=1e-4, atol=1e-5)
    student.preprocessing = replace(own, channel_order="BGR")
    with pytest.raises(UsageError, match="reads RGB images and the student BGR"):
        Teacher(str(tmp_path / "teacher.safetensors"), (1.0,), student, torch.device("cpu"))
