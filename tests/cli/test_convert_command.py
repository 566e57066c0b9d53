"""`python -m deeplabzoo.convert`: says what a file is, writes it as one of ours, and proves what it wrote."""

import re
from pathlib import Path

import pytest
import torch
from helpers.parity import random_images, randomised
from PIL import Image

import deeplabzoo
from deeplabzoo.checkpoints import conversion
from deeplabzoo.cli import convert
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torchvision's smallest DeepLab, with the auxiliary head that cannot be kept."""
    segmentation = pytest.importorskip("torchvision").models.segmentation
    torch.manual_seed(0)
    net = segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    file = tmp_path_factory.mktemp("theirs") / "old.pth"
    torch.save(randomised(net).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def bare_state_dict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own names without the metadata that says which network they are of."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("bare") / "bare.pth"
    torch.save(DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="resnet18", num_classes=3)).state_dict(), file)
    return file


def test_a_foreign_file_becomes_ours(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says origin, network, classes and what was dropped, and the written file gives the very same logits."""
    out = tmp_path / "ours.safetensors"
    assert convert.main([str(theirs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for phrase in (
        "torchvision, sha256 ",
        "deeplabv3_mobilenetv3, 11.0",
        "output stride 16, atrous rates 12, 24, 36",
        "21: background, aeroplane",
        "auxiliary head (it reads a map inside a stage) dropped",
        "every tensor and every logit is the same",
    ):
        assert phrase in said
    assert out.read_bytes()[8:9] == b"{"
    ours, before = deeplabzoo.load(out), deeplabzoo.load(theirs)
    with torch.inference_mode():
        assert torch.equal(ours(random_images(1, 65)), before(random_images(1, 65)))
    assert (ours.config, ours.classes, ours.preprocessing) == (before.config, before.classes, before.preprocessing)
    assert ours.weights_source["trained"]["origin"] == "torchvision"
    assert [path.name for path in tmp_path.iterdir()] == ["ours.safetensors"]


def test_half_precision_reports_its_error(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "half.safetensors"
    assert convert.main([str(theirs), "--out", str(out), "--precision", "fp16"]) == 0
    said = capsys.readouterr().out
    assert "of their spread" in said
    assert "% of the labels are the same" in said
    assert out.stat().st_size < 0.6 * theirs.stat().st_size


def test_values_that_half_precision_cannot_hold_are_refused(theirs: Path, tmp_path: Path) -> None:
    net = deeplabzoo.load(theirs)
    next(net.buffers()).fill_(1e6)
    with pytest.raises(deeplabzoo.errors.WeightsError, match="values above 65504"):
        conversion.write_verified_checkpoint(net, tmp_path / "half.safetensors", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_labelled_with_the_written_file(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((96, 64), 60).convert("RGB").save(tmp_path / "photo.jpg")
    out = tmp_path / "ours.safetensors"
    assert convert.main([str(theirs), "--out", str(out), "--image", str(tmp_path / "photo.jpg")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("image")]
    assert re.fullmatch(r"image     photo\.jpg: \w+ [\d.]+ ?%.* -> .*ours_overlay\.png", line)
    with Image.open(tmp_path / "ours_overlay.png") as overlay:
        assert overlay.width >= 96  # the legend may be wider than so small a photo


def test_a_bare_state_dict_needs_a_model_name(
    bare_state_dict: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ours.safetensors"
    assert convert.main([str(bare_state_dict), "--out", str(out)]) == 1
    assert "not which model they are of" in capsys.readouterr().err
    assert convert.main([str(bare_state_dict), "--out", str(out), "--name", "deeplabv3_resnet50"]) == 1
    assert convert.main([str(bare_state_dict), "--out", str(out), "--name", "deeplabv3_resnt18"]) == 2
    assert not out.exists()
    assert convert.main([str(bare_state_dict), "--out", str(out), "--name", "deeplabv3_resnet18"]) == 0
    assert deeplabzoo.load(out).num_classes == 3


@pytest.mark.parametrize(
    ("out", "status", "sentence"),
    [
        ("missing/ours.safetensors", 1, "does not exist; create it"),
        ("ours.pth", 2, "must end in .safetensors"),
        ("", 1, "is a folder; name a file in it"),
    ],
)
def test_places_that_cannot_be_written_are_refused_first(
    out: str, status: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the file is read: it does not even exist here."""
    assert convert.main(["no-such-file.pth", "--out", str(tmp_path / out)]) == status
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_input_is_never_overwritten(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither under its own name nor through a link or a folder."""
    ours = tmp_path / "model.safetensors"
    assert convert.main([str(theirs), "--out", str(ours)]) == 0
    before = ours.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(ours)
    for source, out in ((ours, ours), (ours, link), (link, ours), (tmp_path, ours)):
        assert convert.main([str(source), "--out", str(out)]) == 2
        assert "would overwrite an input" in capsys.readouterr().err
    assert ours.read_bytes() == before


def test_a_file_that_came_out_different_is_not_kept(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that alters one value is noticed before the new file takes the place of the old one."""
    out = tmp_path / "ours.safetensors"
    out.write_bytes(b"old")
    read = conversion.read_checkpoint

    def altered(path: Path, *, dtype: torch.dtype | None) -> object:
        checkpoint = read(path, dtype=dtype)
        checkpoint.state_dict["head.classifier.bias"][0] += 1e-6
        return checkpoint

    monkeypatch.setattr(conversion, "read_checkpoint", altered)
    assert convert.main([str(theirs), "--out", str(out)]) == 1
    assert "came out different" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]
