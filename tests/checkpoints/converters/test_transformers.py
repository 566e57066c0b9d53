"""DeepLabs of Hugging Face transformers give the logits that transformers gives for them, from the files that it saves."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.parity import randomised, require_same_logits
from safetensors.torch import save_file
from torch import nn

import deeplabzoo
from deeplabzoo.checkpoints.converters import find_converter
from deeplabzoo.checkpoints.converters.transformers import can_convert, convert
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab

MOBILENET, MOBILEVIT, MOBILEVIT_V2 = (
    "deeplabv3_mobilenetv2_voc.google",
    "deeplabv3_mobilevitxxs_voc.apple",
    "deeplabv3_mobilevitv2w100_voc.apple",
)
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    MOBILENET: {"output_stride": 8, "tf_padding": True, "layer_norm_eps": 1e-3},
    "deeplabv3_mobilevits_voc.apple": {"output_stride": 16},
    "deeplabv3_mobilevitxs_voc.apple": {
        "output_stride": 16,
        "hidden_sizes": [96, 120, 144],
        "neck_hidden_sizes": [16, 32, 48, 64, 80, 96, 384],
    },
    MOBILEVIT: {
        "output_stride": 16,
        "hidden_sizes": [64, 80, 96],
        "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320],
        "expand_ratio": 2.0,
    },
    MOBILEVIT_V2: {"output_stride": 16, "width_multiplier": 1.0},
    "deeplabv3_mobilevitv2w150_voc.apple": {"output_stride": 16, "width_multiplier": 1.5},
}
"""What the published `config.json` files say beyond transformers' defaults (design/published_weights.md, B1 to B3)."""
TENSORS = {MOBILENET: 332, "deeplabv3_mobilevits_voc.apple": 377, MOBILEVIT_V2: 305}
"""In the published files, as far as the fact sheet counts them."""
ONE_OF_EACH = [MOBILENET, MOBILEVIT, MOBILEVIT_V2]
THE_REST = [pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name not in ONE_OF_EACH]


def original(name: str, **changes: Any) -> Any:
    """transformers' own network, with random weights of a size that carries the image through, and random norms."""
    transformers = pytest.importorskip("transformers")
    kind = "MobileNetV2" if name == MOBILENET else "MobileViTV2" if "mobilevitv2" in name else "MobileViT"
    options = {"num_labels": 21, **PUBLISHED[name], **changes}
    torch.manual_seed(0)
    net = getattr(transformers, f"{kind}ForSemanticSegmentation")(getattr(transformers, f"{kind}Config")(**options))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # transformers' own start, a deviation of 0.02, leaves logits that hardly depend on the image
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, std=0.2)
    return randomised(net)


def beside(net: Any, folder: Path) -> Path:
    """A path in a folder that holds the network's `config.json`."""
    (folder / "config.json").write_text(json.dumps({**net.config.to_dict(), "model_type": net.config.model_type}))
    return folder / "model.safetensors"


def ours(net: Any, path: Path, **changes: Any) -> DeepLab:
    converted = convert(net.state_dict(), path)
    assert converted.config is not None
    return DeepLab.from_weights(replace(converted.config, **changes), converted.state_dict)


def both(net: DeepLab, theirs: Any, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    image_BCHW = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))
    with torch.inference_mode():
        return net.forward_low_resolution(image_BCHW), theirs(image_BCHW).logits


def row_of(name: str) -> WeightRow:
    return next(row for row in released() if row.full_name == name)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *THE_REST])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_logits_are_those_of_transformers(name: str, output_stride: int, tmp_path: Path) -> None:
    """At an even and an odd size, at the published output stride and the other one.

    The even one is as wide as the largest atrous rate reaches; MobileViTv2's odd one has maps that divide into patches (127,
    64, 32, 16, 8).
    """
    theirs = original(name, output_stride=output_stride)
    net = ours(theirs, beside(theirs, tmp_path))
    assert net.output_stride == output_stride
    for height, width in ((64, 320), (127, 95) if "mobilevitv2" in name else (97, 75)):
        require_same_logits(*both(net, theirs, height, width))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((MOBILENET, {"depth_multiplier": width}) for width in (0.35, 0.5, 0.75, 1.4)),
        *((MOBILEVIT_V2, {"width_multiplier": width}) for width in (0.5, 0.75, 1.25, 1.75, 2.0)),
    ],
    ids=str,
)
def test_every_width_gives_the_logits_of_transformers(name: str, change: Mapping[str, Any], tmp_path: Path) -> None:
    """Widths that nobody publishes a DeepLab of are still what people train."""
    theirs = original(name, **change)
    net = ours(theirs, beside(theirs, tmp_path))
    for height, width in ((64, 320), (127, 95)):
        require_same_logits(*both(net, theirs, height, width))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (MOBILENET, {"pooling_first": False}),
        (MOBILENET, {"encoder_padding": "symmetric"}),
        (MOBILENET, {"encoder_norm_eps": None}),
        (MOBILENET, {"norm_eps": 1e-3}),
        (MOBILEVIT, {"encoder_dilate_local_conv": True}),
        (MOBILEVIT, {"atrous_rates": (12, 24, 36)}),
        (MOBILEVIT_V2, {"encoder_dilate_local_conv": True}),
    ],
)
def test_each_quirk_is_needed(name: str, change: Mapping[str, Any], tmp_path: Path) -> None:
    """Without any one of them the weights load just as well and the logits are others."""
    theirs = original(name)
    found, expected = both(ours(theirs, tmp_path / "alone.bin", **change), theirs, 64, 320)
    assert (found - expected).abs().max() > 1e-3 * expected.std()


def test_quirks_stay_when_the_output_stride_moves(tmp_path: Path) -> None:
    """Moved from 16 to 8, a MobileViT is what transformers builds at 8 with rates of the same reach."""
    theirs = original(MOBILEVIT)
    net = ours(theirs, beside(theirs, tmp_path))
    before = {id(parameter) for parameter in net.parameters()}
    net.set_output_stride(8)
    denser = original(MOBILEVIT, output_stride=8, atrous_rates=[12, 24, 36])
    denser.load_state_dict(theirs.state_dict())
    require_same_logits(*both(net, denser, 64, 320))
    assert {id(parameter) for parameter in net.parameters()} == before


@pytest.mark.parametrize("name", PUBLISHED)
def test_manifest_rows_match_their_converter(name: str, tmp_path: Path) -> None:
    """Names and shapes of the published file, built on no memory: the row's network takes every tensor and lacks none."""
    row = row_of(name)
    with torch.device("meta"):
        tensors = original(name).state_dict()
    assert len(tensors) == TENSORS.get(name, len(tensors))
    converted = convert(tensors, tmp_path / "model.safetensors")
    assert converted.config == row.config
    assert converted.preprocessing == row.preprocessing
    with torch.device("meta"):
        expected = {key: tensor.shape for key, tensor in DeepLab(row.config).state_dict().items()}
    assert {key: tensor.shape for key, tensor in converted.state_dict.items()} == expected


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_saved_file_is_read_by_create_and_load(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the loading line says whose it is and what was assumed."""
    theirs = original(MOBILEVIT)
    file = tmp_path / f"model.{suffix}"
    if suffix == "bin":
        torch.save(theirs.state_dict(), file)
    else:
        save_file(theirs.state_dict(), file)
    net = deeplabzoo.create("deeplabv3_mobilevitxxs_voc", pretrained=str(file))
    require_same_logits(*both(net, theirs, 64, 96))
    assert net.classes[8] == "cat"
    assert net.preprocessing.channel_order == "BGR"
    line = caplog.messages[0]
    assert "transformers" in line
    assert "no config.json beside it: output stride 16" in line
    assert torch.equal(*(one.forward_low_resolution(torch.ones(1, 3, 64, 64)) for one in (net, deeplabzoo.load(file))))


def test_a_released_name_gives_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and tag, from the row's file; the default of the name stays the weights that were measured."""
    theirs = original(MOBILENET)
    file = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), file)
    monkeypatch.setattr("deeplabzoo.hub.factory.fetch", lambda row: file)
    net = deeplabzoo.create(MOBILENET, pretrained=True)
    assert net.config == row_of(MOBILENET).config
    assert net.weights_source["tag"] == "google"
    require_same_logits(*both(net, theirs, 65, 97))
    assert row_of("deeplabv3_mobilenetv2_voc.coral").default


def test_a_config_beside_the_file_is_believed(tmp_path: Path) -> None:
    """A fine-tuned network has classes, an output stride and rates of its own, which its tensors do not tell."""
    labels = {0: "road", 1: "river", 2: "roof"}
    theirs = original(MOBILEVIT, id2label=labels, num_labels=3, output_stride=8, atrous_rates=[2, 4, 6])
    converted = convert(theirs.state_dict(), beside(theirs, tmp_path))
    assert converted.classes == ("road", "river", "roof")
    assert converted.config is not None
    assert (converted.config.output_stride, converted.config.atrous_rates) == (8, (2, 4, 6))
    assert converted.notes == ()


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": "segformer", "output_stride": 3}', '{"model_type"'])
def test_a_config_of_something_else_is_not(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with torch.device("meta"):
        tensors = original(MOBILEVIT).state_dict()
    converted = convert(tensors, tmp_path / "model.safetensors")
    assert converted.config == row_of(MOBILEVIT).config
    assert "no config.json" in converted.notes[0]


@pytest.mark.parametrize("wrong", [{"output_stride": 3}, {"output_stride": "16"}, {"atrous_rates": 6}, {"atrous_rates": ["a"]}])
def test_a_config_that_makes_no_sense_is_refused(wrong: Mapping[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mobilevit", **wrong}))
    with torch.device("meta"):
        tensors = original(MOBILEVIT).state_dict()
    with pytest.raises(WeightsError, match=r"config\.json"):
        convert(tensors, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "encoder"),
    [
        (MOBILENET, {"depth_multiplier": 0.35}, "mobilenetv2_035"),
        (MOBILENET, {"depth_multiplier": 1.4}, "mobilenetv2_140"),
        (MOBILEVIT_V2, {"width_multiplier": 0.5}, "mobilevitv2_050"),
        (MOBILEVIT_V2, {"width_multiplier": 2.0}, "mobilevitv2_200"),
    ],
)
def test_other_widths_are_inferred_from_the_tensors(name: str, change: Mapping[str, Any], encoder: str, tmp_path: Path) -> None:
    """Fine-tuned networks come in widths that nobody published for segmentation."""
    with torch.device("meta"):
        converted = convert(original(name, **change).state_dict(), tmp_path / "model.safetensors")
        assert converted.config is not None
        expected = {key: tensor.shape for key, tensor in DeepLab(converted.config).state_dict().items()}
    assert converted.encoder == encoder
    assert {key: tensor.shape for key, tensor in converted.state_dict.items()} == expected


def test_tensors_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        tensors = original(MOBILEVIT).state_dict()
    with pytest.raises(WeightsError, match=r"head\.aspp\.extra"):
        convert({**tensors, "segmentation_head.aspp.extra": torch.zeros(1)}, tmp_path / "a.bin")
    for left_out in ("mobilevit.encoder.layer.2.conv_projection.convolution.weight", next(k for k in tensors if ".key." in k)):
        with pytest.raises(WeightsError, match=left_out.replace(".", r"\.")):
            convert({name: one for name, one in tensors.items() if name != left_out}, tmp_path / "a.bin")
    narrow = {name: one[:7] if one.ndim and ".layer.0.layer.0.reduce" in name else one for name, one in tensors.items()}
    with pytest.raises(WeightsError, match="7, 24"):
        convert(narrow, tmp_path / "a.bin")


def test_only_segmentation_models_are_recognised() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        classifier = transformers.MobileViTForImageClassification(transformers.MobileViTConfig()).state_dict()
        for name in ONE_OF_EACH:
            layout = find_converter(original(name).state_dict())
            assert layout is not None
            assert layout.FORMAT_NAME == "transformers"
    assert not can_convert(classifier)
    assert not can_convert([])


def test_encoders_without_mobilevit_blocks_are_refused() -> None:
    config = DeepLabConfig(architecture="deeplabv3", encoder="resnet18", encoder_dilate_local_conv=False)
    with pytest.raises(UsageError, match="MobileViT blocks"):
        DeepLab(config)
