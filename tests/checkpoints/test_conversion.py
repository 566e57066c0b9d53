"""`python -m deeplabzoo.convert FILE --to LIBRARY`: a file or folder that the library's own loader takes, or a sentence."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.parity import random_images, randomised, require_same_logits
from PIL import Image

import deeplabzoo
from deeplabzoo.checkpoints import conversion
from deeplabzoo.cli import convert
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab


@pytest.fixture(scope="module")
def of_smp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A network of SMP with settings that are not its defaults, and the folder that it saves."""
    library = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    net = library.DeepLabV3("resnet18", encoder_weights=None, encoder_output_stride=16, decoder_channels=32, classes=3)
    folder = tmp_path_factory.mktemp("smp") / "theirs"
    randomised(net).save_pretrained(folder)
    return net, folder


@pytest.mark.parametrize("form", ["folder", "state.pth", pytest.param("state.safetensors", marks=pytest.mark.slow)])
def test_smp_reads_what_was_written(
    of_smp: tuple[Any, Path], form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From SMP through ours and back: the printed line loads it, every tensor is the same, and so are logits."""
    theirs, folder = of_smp
    ours, out = tmp_path / "ours.safetensors", tmp_path / form
    assert convert.main([str(folder), "--out", str(ours)]) == 0
    assert convert.main([str(ours), "--to", "smp", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("load with")]
    expression = line.removeprefix("load with").strip()
    library = pytest.importorskip("segmentation_models_pytorch")
    net = eval(expression, {"segmentation_models_pytorch": library})
    if form == "state.pth":
        net.load_state_dict(torch.load(out, weights_only=True), strict=True)
    elif form == "state.safetensors":
        from safetensors.torch import load_file

        net.load_state_dict(load_file(out), strict=True)
    else:
        assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    assert [name for name, tensor in theirs.state_dict().items() if not torch.equal(net.state_dict()[name], tensor)] == []
    with torch.inference_mode():
        require_same_logits(deeplabzoo.load(ours)(random_images(1, 96)), net.eval()(random_images(1, 96)))


def test_transformers_reads_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`from_pretrained` of a folder with nothing missing or left over, classes by name, and its image processor."""
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    fields = {"encoder": "mobilevit_xxs", "encoder_final_conv": False, "encoder_dilate_local_conv": False}
    config = DeepLabConfig(architecture="deeplabv3", num_classes=2, refine_conv=False, **fields)  # type: ignore[arg-type]
    net = DeepLab(config, classes=("road", "river"))
    randomised(net)
    net.save(tmp_path / "ours.safetensors")
    Image.effect_noise((96, 64), 60).convert("RGB").save(tmp_path / "photo.png")
    call = ["--to", "transformers", "--out", str(tmp_path / "theirs"), "--image", str(tmp_path / "photo.png")]
    assert convert.main([str(tmp_path / "ours.safetensors"), *call]) == 0
    assert "every tensor and every logit is the same" in capsys.readouterr().out
    assert (tmp_path / "theirs_overlay.png").is_file()
    theirs, logged = library.MobileViTForSemanticSegmentation.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(logged[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == {0: "road", 1: "river"}
    with torch.inference_mode():
        require_same_logits(
            net.eval().forward_low_resolution(random_images(1, (64, 320))), theirs(random_images(1, (64, 320))).logits
        )
    with Image.open(tmp_path / "photo.png") as photo:
        fed = library.AutoImageProcessor.from_pretrained(tmp_path / "theirs")(photo, return_tensors="pt")["pixel_values"]
    assert min(fed.shape[2:]) == min(net.preprocessing.size)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (["--to", "torchvision", "--out", "o.pth"], "torchvision has no DeepLab on resnet18; it has resnet50"),
        (["--to", "transformers", "--out", "o"], "transformers has no DeepLab on resnet18"),
        (["--to", "smp", "--out", "o.pth"], r"its model has .*decoder_convs 1.* and this one has .*decoder_convs 2"),
        (["--to", "smp", "--out", "o.pth", "--precision", "fp16"], "omit it with --to"),
        (["--to", "keras", "--out", "o.pth"], "invalid choice"),
        (["--to", "smp", "--out", "full"], "a folder that is not empty"),
    ],
)
def test_what_another_library_cannot_be_is_one_sentence(
    call: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names each difference, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    DeepLab(DeepLabConfig(architecture="deeplabv3plus", encoder="resnet18", num_classes=2)).save("ours.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert convert.main(["ours.safetensors", *call]) != 0
    error = capsys.readouterr().err
    assert re.search(sentence, error)
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"ours.safetensors", "full"}


def test_forms_that_a_library_does_not_read_are_refused(tmp_path: Path) -> None:
    from deeplabzoo.checkpoints.converters.key_mapping import ExportedCheckpoint
    from deeplabzoo.errors import UsageError

    with pytest.raises(UsageError, match="reads state dicts"):
        conversion.write_exported(ExportedCheckpoint(state_dict={}, build="some.Net()"), tmp_path / "folder", "some")
    with pytest.raises(UsageError, match="reads folders"):
        conversion.write_exported(
            ExportedCheckpoint(state_dict={}, folder="some.load({folder})"), tmp_path / "file.pth", "some"
        )


@pytest.mark.slow
def test_another_output_stride_makes_it_torchvisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ResNet-50 with the papers' rates at stride 16 is torchvision's network at stride 8, and only there."""
    segmentation = pytest.importorskip("torchvision").models.segmentation
    net = DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="resnet50", num_classes=2))
    randomised(net)
    net.save(tmp_path / "ours.safetensors")
    out = tmp_path / "theirs.pth"
    assert convert.main([str(tmp_path / "ours.safetensors"), "--to", "torchvision", "--out", str(out)]) == 1
    assert "its model has output_stride 8, atrous_rates [12, 24, 36]" in capsys.readouterr().err
    assert (
        convert.main([str(tmp_path / "ours.safetensors"), "--to", "torchvision", "--out", str(out), "--output-stride", "8"])
        == 0
    )
    theirs = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=2)
    theirs.load_state_dict(torch.load(out, weights_only=True), strict=True)
    net.set_output_stride(8)
    with torch.inference_mode():
        require_same_logits(net.eval()(random_images(1, (65, 97))), theirs.eval()(random_images(1, (65, 97)))["out"])
