"""The way back: a network of ours, loaded strictly by the other library's own class, gives the same logits, and comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.parity import random_images, randomised, require_same_logits

from deeplabzoo.checkpoints.converters import smp, torchvision, transformers
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab

slow = pytest.mark.slow


def ours(**fields: Any) -> DeepLab:
    """A network of ours, seeded, with random norms."""
    torch.manual_seed(0)
    net = DeepLab(DeepLabConfig(**{"architecture": "deeplabv3", "num_classes": 5, **fields}))
    randomised(net)
    return net


def require_equal_tensors(back: Any, net: DeepLab) -> None:
    state = net.state_dict()
    assert back.keys() == state.keys()
    assert [name for name in state if not torch.equal(back[name], state[name])] == []


TORCHVISION = {
    "resnet50": {"output_stride": 8, "atrous_rates": (12, 24, 36), "aux_head": True},
    "mobilenetv3_large_100": {
        "output_stride": 16,
        "atrous_rates": (12, 24, 36),
        "encoder_norm_eps": 1e-3,
        "encoder_dilate_strided": True,
    },
}


@pytest.mark.parametrize("encoder", ["mobilenetv3_large_100", pytest.param("resnet50", marks=slow)])
def test_torchvision_takes_it_and_it_comes_back(encoder: str) -> None:
    from torchvision.models import segmentation

    net = ours(encoder=encoder, **TORCHVISION[encoder])
    exported = torchvision.export(net)
    theirs = eval(exported.build, {"torchvision": __import__("torchvision")})
    assert isinstance(theirs, segmentation.DeepLabV3)
    theirs.load_state_dict(exported.state_dict, strict=True)
    for hw in ((64, 96), (65, 97)):
        with torch.inference_mode():
            require_same_logits(net(random_images(1, hw)), theirs.eval()(random_images(1, hw))["out"])
    back = torchvision.convert(exported.state_dict, Path("back.pth"))
    assert back.config is not None
    assert back.config.to_dict() == {**net.config.to_dict(), "dropout": 0.5}
    require_equal_tensors(back.state_dict, net)


SMP = {"align_corners": True, "depthwise_norm": False, "decoder_convs": 1, "atrous_rates": (12, 24, 36)}
OWN = {"encoder_dilate_strided": True}


@pytest.mark.parametrize(
    ("architecture", "encoder", "fields"),
    [
        ("deeplabv3plus", "resnet18", OWN),
        ("deeplabv3", "mobilenetv2_100", {**OWN, "encoder_final_conv": True, "output_stride": 8}),
        pytest.param("deeplabv3", "resnet18", OWN, marks=slow),
        pytest.param("deeplabv3plus", "mobilenetv2_100", {**OWN, "encoder_final_conv": True}, marks=slow),
        pytest.param("deeplabv3plus", "regnetx_002", {"atrous_rates": None, "aspp_separable": False}, marks=slow),
    ],
)
def test_smp_takes_it_and_it_comes_back(architecture: str, encoder: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Its own from_pretrained reads the folder, and its own class, built as the command says, the state dict."""
    plus = architecture == "deeplabv3plus"
    net = ours(architecture=architecture, encoder=encoder, **{**SMP, "decoder_refine_conv": plus, **fields})
    exported = smp.export(net)
    theirs = eval(exported.build, {"segmentation_models_pytorch": pytest.importorskip("segmentation_models_pytorch")})
    theirs.load_state_dict(dict(exported.state_dict), strict=True)
    for hw in ((64, 96), (80, 304)):
        with torch.inference_mode():
            require_same_logits(net(random_images(1, hw)), theirs.eval()(random_images(1, hw)))
    (tmp_path / "config.json").write_text(json.dumps(exported.settings["config.json"]))
    back = smp.convert(exported.state_dict, tmp_path / "model.safetensors")
    require_equal_tensors(back.state_dict, net)
    assert DeepLab.from_weights(back.config, back.state_dict).output_stride == net.output_stride


MOBILENET = {"atrous_rates": (), "pooling_first": True, "align_corners": True, "encoder_padding": "same"}
MOBILEVIT = {"encoder_dilate_local_conv": False}


@pytest.mark.parametrize(
    ("encoder", "fields"),
    [
        ("mobilenetv2_035", {**MOBILENET, "output_stride": 8, "encoder_norm_eps": 1e-3}),
        ("mobilevit_xxs", {**MOBILEVIT, "encoder_final_conv": False}),
        pytest.param("mobilenetv2_140", {**MOBILENET, "encoder_padding": "symmetric"}, marks=slow),
        pytest.param("mobilevit_s", {**MOBILEVIT, "encoder_final_conv": False, "output_stride": 8}, marks=slow),
        pytest.param("mobilevitv2_050", {**MOBILEVIT, "head_channels": 512}, marks=slow),
        pytest.param("mobilevitv2_150", {**MOBILEVIT, "head_channels": 512, "output_stride": 8}, marks=slow),
    ],
)
def test_transformers_takes_it_and_it_comes_back(encoder: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Its own class reads the folder and finds nothing missing, left over or of another shape."""
    module = pytest.importorskip("transformers")
    net = ours(encoder=encoder, refine_conv=False, **fields)
    exported = transformers.export(net)
    theirs_class = eval(exported.folder.partition(".from_pretrained")[0], {"transformers": module})
    for file, settings in exported.settings.items():
        (tmp_path / file).write_text(json.dumps(settings))
    theirs = theirs_class(theirs_class.config_class.from_pretrained(tmp_path))
    theirs.load_state_dict(exported.state_dict, strict=True)
    for hw in ((64, 320), (127, 95)):
        with torch.inference_mode():
            require_same_logits(net.forward_low_resolution(random_images(1, hw)), theirs.eval()(random_images(1, hw)).logits)
    back = transformers.convert(exported.state_dict, tmp_path / "model.safetensors")
    require_equal_tensors(back.state_dict, net)
    assert back.classes == net.classes
    assert back.config is not None
    assert DeepLab.from_weights(back.config, back.state_dict).output_stride == net.output_stride
