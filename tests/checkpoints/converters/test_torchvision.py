"""torchvision's DeepLabV3 checkpoints give torchvision's logits, from the very files that its models save."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.parity import random_images, randomised, require_same_logits
from torch import nn

import deeplabzoo
from deeplabzoo.checkpoints.converters import find_converter
from deeplabzoo.checkpoints.converters.torchvision import PREPROCESSING, convert
from deeplabzoo.errors import WeightsError
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.processing.preprocessing import prepare

BUILDERS = {
    "deeplabv3_resnet50_voc": "deeplabv3_resnet50",
    "deeplabv3_resnet101_voc": "deeplabv3_resnet101",
    "deeplabv3_mobilenetv3_voc": "deeplabv3_mobilenet_v3_large",
}
PUBLISHED_TENSORS = {"deeplabv3_resnet50_voc": 370, "deeplabv3_resnet101_voc": 676, "deeplabv3_mobilenetv3_voc": 360}
"""In the files, with auxiliary heads and batch counters (design/published_weights.md, section A)."""


def original(name: str, *, num_classes: int = 21, aux: bool = True, seed: int = 0) -> nn.Module:
    """Return torchvision's own network, seeded, with random norms."""
    segmentation = pytest.importorskip("torchvision").models.segmentation
    torch.manual_seed(seed)
    build: Callable[..., nn.Module] = getattr(segmentation, BUILDERS[name])
    return randomised(build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=aux), seed)


def row_of(name: str) -> WeightRow:
    return next(row for row in released() if row.full_name == f"{name}.torchvision_coco")


@pytest.fixture(scope="module")
def mobilenet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("torchvision") / "mobilenet.pth"
    torch.save(original("deeplabv3_mobilenetv3_voc").state_dict(), file)
    return file


@pytest.mark.parametrize(
    "name",
    [
        "deeplabv3_mobilenetv3_voc",
        "deeplabv3_resnet50_voc",
        pytest.param("deeplabv3_resnet101_voc", marks=pytest.mark.slow),
    ],
)
def test_logits_are_torchvisions(name: str) -> None:
    """At an even and an odd size, and the auxiliary head's too where it is kept, in the configuration that the row says."""
    theirs = original(name)
    tensors = theirs.state_dict()
    converted = convert(tensors, Path("random.pth"))
    assert converted.config is not None
    assert len(tensors) == PUBLISHED_TENSORS[name]
    assert converted.config == row_of(name).config
    assert converted.preprocessing == row_of(name).preprocessing
    ours = DeepLab.from_weights(converted.config, converted.state_dict)
    for height, width in ((64, 96), (65, 97)):
        image_BCHW = random_images(1, (height, width), seed=height)
        with torch.inference_mode():
            expected = theirs(image_BCHW)
            require_same_logits(ours(image_BCHW), expected["out"])
            if ours.aux_head is not None:
                low = ours.aux_head(ours.encoder(image_BCHW)[ours.feature_plan.auxiliary])
                aux = nn.functional.interpolate(low, size=(height, width), mode="bilinear", align_corners=False)
                require_same_logits(aux, expected["aux"])


def test_mobilenet_needs_both_of_its_fields() -> None:
    """timm's MobileNetV3 with the same tensors is another network: a converter that renames alone is quietly wrong."""
    theirs = original("deeplabv3_mobilenetv3_voc")
    converted = convert(theirs.state_dict(), Path("random.pth"))
    assert converted.config is not None
    image_BCHW = random_images(1, (65, 97))
    with torch.inference_mode():
        expected = theirs(image_BCHW)["out"]
        for change in ({"encoder_norm_eps": None}, {"encoder_dilate_strided": False}, {"atrous_rates": None}):
            net = DeepLab.from_weights(replace(converted.config, **change), converted.state_dict)
            assert float((net(image_BCHW) - expected).abs().max()) / float(expected.std()) > 1e-3, change


def test_a_file_loaded_by_name_reports_its_format(mobilenet_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The line names the layout, what was left out, and each adaptation; rates keep their reach when the stride changes."""
    net = deeplabzoo.create("deeplabv3_mobilenetv3_voc", pretrained=mobilenet_file, num_classes=5, output_stride=8)
    assert (net.num_classes, net.output_stride, net.config.atrous_rates) == (5, 8, (24, 48, 72))
    line = caplog.messages[-1]
    assert re.match(r"deeplabv3_mobilenetv3_voc: 11\.0\d M parameters from mobilenet\.pth \(torchvision layout, sha256 ", line)
    for phrase in (
        "output stride 16 -> 8",
        "classifier re-initialized: 21 -> 5 classes",
        "auxiliary head (it reads a map inside a stage) dropped",
    ):
        assert phrase in line


@pytest.mark.parametrize("name", ["deeplabv3_mobilenetv3_voc", "deeplabv3_resnet50_voc"])
def test_a_name_alone_is_enough(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`create(name, pretrained=True)` gives torchvision's logits from the row's file, here one of its layout."""
    theirs = original(name)
    file = tmp_path / "published.pth"
    torch.save(theirs.state_dict(), file)
    monkeypatch.setattr("deeplabzoo.hub.factory.fetch", {row_of(name): file}.__getitem__)
    net = deeplabzoo.create(name, pretrained=True)
    image_BCHW = random_images(1, (65, 97))
    with torch.inference_mode():
        require_same_logits(net(image_BCHW), theirs(image_BCHW)["out"])
    assert (net.classes[8], net.preprocessing.resize, net.preprocessing.size) == ("cat", "shortest", (520, 520))
    assert f"{name}.torchvision_coco: " in caplog.messages[-1]
    assert "(torchvision layout, sha256 " in caplog.messages[-1]


def test_the_dilated_strided_block_follows_the_stride(mobilenet_file: Path) -> None:
    """There and back gives the same logits; at stride 8 the first block of the last stage is dilated by 4 itself."""
    net = deeplabzoo.load(mobilenet_file)
    image_BCHW = random_images(1, (65, 97))
    with torch.inference_mode():
        before = net(image_BCHW)
        rates = []
        for output_stride in (8, 32, 16):
            net.set_output_stride(output_stride)
            strided = net.encoder.get_submodule("blocks.5.0.conv_dw")
            assert isinstance(strided, nn.Conv2d)
            rates.append((strided.stride[0], strided.dilation[0]))
        assert rates == [(1, 4), (2, 1), (1, 2)]
        assert torch.equal(net(image_BCHW), before)
    assert net.classes[8] == "cat"


def test_without_an_auxiliary_head() -> None:
    """What a user trained with `aux_loss=None` has fewer tensors, other classes and no head for training."""
    theirs = original("deeplabv3_resnet50_voc", num_classes=3, aux=False)
    converted = convert(theirs.state_dict(), Path("random.pth"))
    assert converted.config is not None
    assert (converted.config.aux_head, converted.config.num_classes, converted.dropped) == (False, 3, ())
    assert converted.classes == ("class_0", "class_1", "class_2")
    assert DeepLab.from_weights(converted.config, converted.state_dict).aux_head is None


def test_batch_counters_may_be_missing() -> None:
    """Files from before PyTorch 0.4.1 lack them, and converters of other libraries leave them out."""
    tensors = original("deeplabv3_mobilenetv3_voc").state_dict()
    bare = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    assert len(bare) < len(tensors)
    assert convert(bare, Path("old.pth")).state_dict.keys() == convert(tensors, Path("new.pth")).state_dict.keys()


def test_other_models_of_torchvision_are_not_taken_for_it() -> None:
    """FCN and LR-ASPP share encoder names; a DeepLab with a stray tensor or an unknown depth is refused by name."""
    segmentation = pytest.importorskip("torchvision").models.segmentation
    with torch.device("meta"):
        fcn = segmentation.fcn_resnet50(weights=None, weights_backbone=None).state_dict()
        lraspp = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).state_dict()
        deeplab = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None).state_dict()
    assert find_converter(fcn) is None
    assert find_converter(lraspp) is None
    found = find_converter(deeplab)
    assert found is not None
    assert found.FORMAT_NAME == "torchvision"
    with pytest.raises(WeightsError, match=r"tensor 'head\.mine' that its layout does not know"):
        convert({**deeplab, "head.mine": torch.zeros(1)}, Path("x.pth"))
    shallow = {name: tensor for name, tensor in deeplab.items() if not name.startswith("backbone.layer3.5")}
    with pytest.raises(WeightsError, match=r"'x\.pth' is .* 5 blocks .* expected 6 \(resnet50\) or 23 \(resnet101\)"):
        convert(shallow, Path("x.pth"))


@pytest.mark.parametrize(("height", "width"), [(333, 500), (500, 333), (390, 780), (375, 500), (600, 901)])
def test_images_are_resized_as_torchvision_does(height: int, width: int) -> None:
    """The same number of rows and columns (the fraction is cut off, not rounded), values within two grey levels."""
    presets = pytest.importorskip("torchvision.transforms._presets")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 18, generator=generator) * 255
    image_CHW = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)[0]
    theirs_CHW = presets.SemanticSegmentation(resize_size=520)(image_CHW)
    prepared = prepare(image_CHW.permute(1, 2, 0).contiguous().numpy(), PREPROCESSING)
    assert prepared.tensor_1CHW.shape[1:] == theirs_CHW.shape
    assert float((prepared.tensor_1CHW[0] - theirs_CHW).abs().max()) <= 2 / 255 / 0.22
