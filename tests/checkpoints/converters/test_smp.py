"""DeepLabs of segmentation_models_pytorch give its logits, from the very files that it saves."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.parity import randomised, require_same_logits
from torch import nn

import deeplabzoo
from deeplabzoo.checkpoints.converters import find_converter, read_foreign
from deeplabzoo.checkpoints.converters.smp import convert
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.deeplab import DeepLab

SPELLED = {"deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3Plus"}
DEFAULT_STRIDE = {"deeplabv3": 8, "deeplabv3plus": 16}
SIZES = ((64, 96), (80, 304))
"""An even and an odd number of cells at stride 16, as SMP takes multiples of its output stride only; the second is wide enough
for every rate at stride 8 and the first at 16."""


def original(architecture: str, encoder: str, **options: Any) -> nn.Module:
    """Return SMP's own network, seeded, with random norms."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    options = {"encoder_output_stride": DEFAULT_STRIDE[architecture], "classes": 21, **options}
    return randomised(getattr(smp, SPELLED[architecture])(encoder, encoder_weights=None, **options))


def converted_by_settings(theirs: nn.Module, folder: Path) -> Checkpoint:
    """Convert in the presence of the `config.json` that SMP writes of its own accord."""
    folder.joinpath("config.json").write_text(json.dumps({**theirs.config, "_model_class": type(theirs).__name__}))
    return convert(theirs.state_dict(), folder / "model.safetensors")


def ours_of(converted: Checkpoint) -> DeepLab:
    assert converted.config is not None
    return DeepLab.from_weights(converted.config, converted.state_dict)


def image(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(height))


def require_parity(ours: DeepLab, theirs: nn.Module) -> None:
    for height, width in SIZES:
        image_BCHW = image(height, width, ours.config.in_chans)
        with torch.inference_mode():
            require_same_logits(ours(image_BCHW), theirs(image_BCHW))


slow = pytest.mark.slow


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("architecture", ["deeplabv3", "deeplabv3plus"])
@pytest.mark.parametrize(
    "encoder",
    [
        "resnet18",
        "mobilenet_v2",
        *(
            pytest.param(name, marks=slow)
            for name in (
                "resnet34",
                "resnet50",
                "resnet101",
                "resnext50_32x4d",
                "tu-resnet50d",
                "tu-efficientnet_b0",
                "tu-mobilenetv3_large_100",
            )
        ),
        pytest.param("tu-regnetx_002", marks=slow),
    ],
)
def test_logits_are_those_of_smp(architecture: str, encoder: str, output_stride: int, tmp_path: Path) -> None:
    """Every encoder of the issue, both output strides, with what SMP's `config.json` says (SMP#390: rates at stride 16)."""
    theirs = original(architecture, encoder, encoder_output_stride=output_stride)
    converted = converted_by_settings(theirs, tmp_path)
    assert converted.notes == ()
    ours = ours_of(converted)
    assert ours.config.atrous_rates == (12, 24, 36)
    assert ours.output_stride == output_stride
    require_parity(ours, theirs)


def test_odd_sizes_before_upsampling(tmp_path: Path) -> None:
    """SMP refuses photos that its stride does not divide; its V3 network without that check gives what ours gives there."""
    theirs = original("deeplabv3", "resnet18")
    ours = ours_of(converted_by_settings(theirs, tmp_path))
    with torch.inference_mode():
        low = theirs.segmentation_head[0](theirs.decoder(theirs.encoder(image(97, 129))))
        require_same_logits(ours.forward_low_resolution(image(97, 129)), low)


@pytest.mark.parametrize("architecture", ["deeplabv3", "deeplabv3plus"])
def test_a_bare_file_has_the_defaults_of_smp(architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`torch.save(model.state_dict())` and no more: `create` and `load` say what they saw and what they assumed."""
    theirs = original(architecture, "resnet18")
    file = tmp_path / "some.pth"
    torch.save(theirs.state_dict(), file)
    layout = find_converter(theirs.state_dict())
    assert layout is not None
    assert layout.FORMAT_NAME == "segmentation_models_pytorch"
    caplog.set_level(logging.INFO, logger="deeplabzoo")
    for ours in (deeplabzoo.load(file), deeplabzoo.create(f"{architecture}_resnet18", pretrained=file)):
        said = caplog.messages[-1]
        assert "segmentation_models_pytorch layout" in said
        assert f"output stride {DEFAULT_STRIDE[architecture]} and rates 12, 24, 36 assumed" in said
        require_parity(ours, theirs)


def test_the_folder_that_smp_saves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`save_pretrained`: settings that are not SMP's defaults come from its `config.json`, and nothing is assumed."""
    options = {"decoder_atrous_rates": (3, 6, 9), "encoder_output_stride": 16, "decoder_channels": 64, "classes": 3}
    theirs = original("deeplabv3", "tu-resnet10t", decoder_aspp_separable=True, activation="sigmoid", **options)
    theirs.save_pretrained(tmp_path)
    caplog.set_level(logging.INFO, logger="deeplabzoo")
    ours = deeplabzoo.load(tmp_path)
    said = caplog.messages[-1]
    assert "assumed" not in said
    assert "activation sigmoid dropped" in said
    assert (ours.config.encoder, ours.config.atrous_rates, ours.config.aspp_separable) == ("resnet10t", (3, 6, 9), True)
    theirs.segmentation_head[2] = nn.Identity()
    require_parity(ours, theirs)


def test_one_sigmoid_channel_is_two_classes(tmp_path: Path) -> None:
    """SMP's default of one class: our second class is likely exactly where its sigmoid says so."""
    theirs = original("deeplabv3plus", "resnet18", classes=1)
    converted = converted_by_settings(theirs, tmp_path)
    assert converted.classes == ("background", "foreground")
    ours = ours_of(converted)
    with torch.inference_mode():
        logits, probability = ours(image(64, 96)), theirs(image(64, 96)).sigmoid()
    assert torch.allclose(logits.softmax(1)[:, 1:], probability, atol=1e-5)
    assert torch.equal(logits.argmax(1, keepdim=True).bool(), probability > 0.5)


def test_models_inside_a_training_module(tmp_path: Path) -> None:
    """What Lightning saves: every name behind `model.`, the loss's tensors beside them, four input channels, a second head."""
    theirs = original("deeplabv3plus", "mobilenet_v2", in_channels=4, aux_params={"classes": 2})
    inside = {f"model.{name}": tensor for name, tensor in theirs.state_dict().items()} | {"mean": torch.zeros(3)}
    torch.save({"state_dict": inside, "epoch": 3}, tmp_path / "last.ckpt")
    converted = read_foreign(tmp_path / "last.ckpt")
    assert converted.dropped == ("classification head",)
    assert "1 tensors beside the model dropped" in converted.notes
    theirs.classification_head = None
    require_parity(ours_of(converted), theirs)
    assert deeplabzoo.load(tmp_path / "last.ckpt").config.in_chans == 4


@pytest.mark.parametrize(
    ("smp_name", "ours", "others"), [("tu-resnet18", "resnet18", ""), ("tu-tf_efficientnet_lite0", "efficientnet_lite0", "tf_")]
)
def test_timm_encoders_are_found_by_their_tensors(smp_name: str, ours: str, others: str, tmp_path: Path) -> None:
    """Where several have the same tensors, the one taken and the others are named; a `config.json` would decide."""
    converted = convert(original("deeplabv3", smp_name).state_dict(), tmp_path / "bare.pth")
    assert converted.encoder == ours
    assert any("have the same tensors" in note and others in note for note in converted.notes) == bool(others)


def test_the_decoder_names_of_earlier_releases(tmp_path: Path) -> None:
    """Until SMP 0.4 the V3 decoder was a Sequential; SMP renames on loading, and so do we."""
    theirs = original("deeplabv3", "resnet18")
    old = {"decoder.aspp.": "decoder.0.", "decoder.conv.": "decoder.1.", "decoder.bn.": "decoder.2."}
    tensors = theirs.state_dict()
    for new, before in old.items():
        tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    assert find_converter(tensors) is not None
    require_parity(ours_of(convert(tensors, tmp_path / "old.pth")), theirs)


def unet() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    net: nn.Module = smp.Unet("resnet18", encoder_weights=None)
    return net


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (unet, "another segmentation_models_pytorch model than DeepLabV3 and DeepLabV3Plus"),
        (lambda: original("deeplabv3", "timm-efficientnet-b0"), "deeplabzoo has no equivalent of"),
        (lambda: original("deeplabv3", "tu-convnext_atto", encoder_output_stride=8), "shifts the features of convnext_atto"),
        (lambda: original("deeplabv3plus", "resnet18", encoder_depth=4), "encoder_depth below 5"),
    ],
)
@pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated")
def test_what_cannot_be_read_is_refused_in_a_sentence(build: Any, sentence: str, tmp_path: Path) -> None:
    torch.save(build().state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=sentence):
        deeplabzoo.load(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"_model_class": "Unet", "encoder_name": "resnet18"}, "is of a Unet"),
        ({"_model_class": "DeepLabV3", "encoder_name": "resnet18", "encoder_output_stride": 5}, "no model that could exist"),
        ({"encoder_name": "resnet18", "decoder_atrous_rates": 7}, "no model that could exist"),
    ],
)
def test_a_config_that_contradicts_the_weights(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=sentence):
        convert(original("deeplabv3", "resnet18").state_dict(), tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"architectures": ["ResNet"]}'])
def test_a_config_of_something_else_is_passed_over(text: str, tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text(text)
    converted = convert(original("deeplabv3", "resnet18").state_dict(), tmp_path / "model.safetensors")
    assert any("no config.json" in note for note in converted.notes)
