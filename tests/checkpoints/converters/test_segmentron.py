"""Checkpoints in the layout of SegmenTron, against its documented forward pass written out here.

That code is no package, so the reference was written from its description; the ResNet's body is torchvision's.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.parity import randomised, require_same_logits
from torch import nn

import deeplabzoo
from deeplabzoo.checkpoints.converters import find_converter, segmentron
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab

ROWS = [row for row in released() if row.origin == "segmentron"]


def sequence(**modules: nn.Module) -> nn.Sequential:
    found = nn.Sequential()
    for name, module in modules.items():
        found.add_module(name, module)
    return found


class Separable(nn.Module):
    """ReLU before both halves' norms only, or after each of them."""

    def __init__(self, a: int, b: int, *, rate: int = 1, stride: int = 1, first: bool = False) -> None:
        super().__init__()
        depthwise = nn.Conv2d(a, a, 3, stride, rate, rate, groups=a, bias=False)
        halves = {"depthwise": depthwise, "bn_depth": nn.BatchNorm2d(a)}, {"bn_point": nn.BatchNorm2d(b)}
        pointwise = nn.Conv2d(a, b, 1, bias=False)
        before = {"relu": nn.ReLU()} if first else {}
        between, after = ({}, {}) if first else ({"relu1": nn.ReLU()}, {"relu2": nn.ReLU()})
        self.block = sequence(**before, **halves[0], **between, pointwise=pointwise, **halves[1], **after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block(x)
        return out


class XceptionBlock(nn.Module):
    def __init__(
        self, widths: tuple[int, int, int, int], skip: str, stride: int = 1, rate: int = 1, first: bool = True
    ) -> None:
        super().__init__()
        if skip == "conv":
            self.conv = nn.Conv2d(widths[0], widths[3], 1, stride, bias=False)
            self.bn = nn.BatchNorm2d(widths[3])
        self.sep_conv1 = Separable(widths[0], widths[1], rate=rate, first=first)
        self.sep_conv2 = Separable(widths[1], widths[2], rate=rate, first=first)
        self.sep_conv3 = Separable(widths[2], widths[3], rate=rate, first=first, stride=stride)
        self.skip = skip

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inside = self.sep_conv2(self.sep_conv1(x))
        out = self.sep_conv3(inside)
        if self.skip != "none":
            out = out + (self.bn(self.conv(x)) if self.skip == "conv" else x)
        return out, inside


class Xception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        blocks = [
            XceptionBlock((64, 128, 128, 128), "conv", stride=2),
            XceptionBlock((128, 256, 256, 256), "conv", stride=2),
            XceptionBlock((256, 728, 728, 728), "conv", stride=2),
            *(XceptionBlock((728, 728, 728, 728), "sum") for _ in range(16)),
            XceptionBlock((728, 728, 1024, 1024), "conv"),
            XceptionBlock((1024, 1536, 1536, 2048), "none", rate=2, first=False),
        ]
        for number, block in enumerate(blocks, start=1):
            self.add_module(f"block{number}", block)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        insides = []
        for number in range(1, 22):
            x, inside = getattr(self, f"block{number}")(x)
            insides.append(inside)
        return insides[1], x


class ResNet(nn.Module):
    """torchvision's, with the classifier that the files keep."""

    def __init__(self) -> None:
        super().__init__()
        body = pytest.importorskip("torchvision").models.resnet101(
            weights=None, replace_stride_with_dilation=[False, False, True]
        )
        for name, module in body.named_children():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = self.layer1(self.maxpool(F.relu(self.bn1(self.conv1(x)))))
        return low, self.layer4(self.layer3(self.layer2(low)))


class Reference(nn.Module):
    def __init__(self, encoder: str, num_classes: int) -> None:
        super().__init__()
        self.encoder = Xception() if encoder == "xception65" else ResNet()

        def conv_norm(a: int, b: int) -> dict[str, nn.Module]:
            return {"conv": nn.Conv2d(a, b, 1, bias=False), "bn": nn.BatchNorm2d(b), "relu": nn.ReLU()}

        aspp = sequence(aspp0=sequence(**conv_norm(2048, 256)))
        for number, rate in enumerate((6, 12, 18), start=1):
            aspp.add_module(f"aspp{number}", Separable(2048, 256, rate=rate))
        aspp.add_module("image_pooling", sequence(gap=nn.AdaptiveAvgPool2d(1), **conv_norm(2048, 256)))
        aspp.conv, aspp.bn = nn.Conv2d(1280, 256, 1, bias=False), nn.BatchNorm2d(256)
        block = nn.Sequential(Separable(304, 256), Separable(256, 256), nn.Conv2d(256, num_classes, 1))
        self.head = nn.ModuleDict({"aspp": aspp, "c1_block": sequence(**conv_norm(256, 48)), "block": block})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = self.encoder(x)
        aspp = self.head["aspp"]
        pooled = aspp.image_pooling(high)
        pooled = F.interpolate(pooled, size=high.shape[2:], mode="bilinear", align_corners=True)
        branches = [aspp.get_submodule(f"aspp{number}")(high) for number in range(4)]
        high = F.relu(aspp.bn(aspp.conv(torch.cat([pooled, *branches], dim=1))))
        high = F.interpolate(high, size=low.shape[2:], mode="bilinear", align_corners=True)
        logits = self.head["block"](torch.cat([high, self.head["c1_block"](low)], dim=1))
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=True)


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))


def reference(encoder: str, num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    net = Reference(encoder, num_classes)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            nn.init.normal_(module.weight, std=0.5)
    return randomised(net)


@pytest.mark.parametrize(("encoder", "data"), [("xception65", "voc"), ("resnet101", "cityscapes")])
def test_logits_are_those_of_the_documented_model(
    encoder: str, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At an even and an odd size."""
    theirs = reference(encoder, 21 if data == "voc" else 19)
    torch.save(theirs.state_dict(), tmp_path / "segmentron.pth")
    ours = deeplabzoo.create(f"deeplabv3plus_{encoder}_{data}", pretrained=tmp_path / "segmentron.pth")
    assert "segmentron layout" in caplog.messages[-1]
    assert ours.classes[1] == ("aeroplane" if data == "voc" else "sidewalk")
    for size in ((64, 96), (97, 75)):
        with torch.inference_mode():
            require_same_logits(ours(image(*size)), theirs(image(*size)))


def test_the_map_before_its_relu_is_needed(tmp_path: Path) -> None:
    """timm yields the map after it; the weights load just as well then, and the logits are others."""
    theirs = reference("xception65", 21)
    converted = segmentron.convert(theirs.state_dict(), tmp_path / "segmentron.pth")
    assert converted.config is not None
    config = replace(converted.config, decoder_low_level_activated=True)
    other = DeepLab.from_weights(config, converted.state_dict)
    with torch.inference_mode():
        found, expected = other(image(64, 96)), theirs(image(64, 96))
    assert (found - expected).abs().max() > 1e-2 * expected.std()


def test_only_xceptions_have_a_map_before_its_relu() -> None:
    with pytest.raises(UsageError, match="decoder_low_level_activated=False has no meaning"):
        DeepLab(DeepLabConfig(architecture="deeplabv3plus", encoder="resnet18", decoder_low_level_activated=False))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.full_name)
def test_manifest_rows_match_their_converter(row: WeightRow, tmp_path: Path) -> None:
    with torch.device("meta"):
        tensors = Reference(row.config.encoder, row.config.num_classes).state_dict()
        expected = {name: tensor.shape for name, tensor in DeepLab(row.config).state_dict().items()}
    assert find_converter(tensors) is segmentron
    converted = segmentron.convert(tensors, tmp_path / "file.pth")
    assert (converted.config, converted.preprocessing) == (row.config, row.preprocessing)
    assert {name: tensor.shape for name, tensor in converted.state_dict.items()} == expected


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("encoder.block21.", "encoder.block22.", "on an encoder that cannot be read"),
        ("head.c1_block.", "head.c2_block.", "without the decoder that the name promises"),
        ("head.aspp.conv.", "head.aspp.convolution.", "has a tensor 'head.aspp.convolution"),
    ],
)
def test_other_models_are_refused_in_a_sentence(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        tensors = Reference("xception65", 21).state_dict()
    tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    assert find_converter(tensors) is segmentron
    with pytest.raises(WeightsError, match=sentence):
        segmentron.convert(tensors, tmp_path / "other.pth")
