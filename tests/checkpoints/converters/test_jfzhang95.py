"""Checkpoints in the layout of jfzhang95/pytorch-deeplab-xception, against its documented forward pass written out here.

That code is no package, so the reference was written from its description on torchvision's bottleneck blocks.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.parity import randomised, require_same_logits
from torch import nn

import deeplabzoo
from deeplabzoo.checkpoints.converters import find_converter, jfzhang95
from deeplabzoo.errors import WeightsError

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def conv_norm(in_channels: int, out_channels: int, kernel: int, **options: int) -> list[nn.Module]:
    reach = options.get("dilation", 1) * (kernel // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=reach, bias=False, **options)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


def stage(in_channels: int, width: int, stride: int, dilations: tuple[int, ...]) -> nn.Sequential:
    """Bottleneck blocks, each with its own dilation, the first one with the stride and a shortcut."""
    bottleneck = pytest.importorskip("torchvision").models.resnet.Bottleneck
    shortcut = nn.Sequential(nn.Conv2d(in_channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
    blocks = [bottleneck(in_channels, width, stride, shortcut, dilation=dilations[0])]
    return nn.Sequential(*blocks, *(bottleneck(4 * width, width, dilation=dilation) for dilation in dilations[1:]))


class ResNet(nn.Module):
    def __init__(self, name: str, output_stride: int) -> None:
        super().__init__()
        a, b, c, _ = BLOCKS[name]
        strides, dense = ((1, 2, 2, 1), (1, 2)) if output_stride == 16 else ((1, 2, 1, 1), (2, 4))
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.layer1 = stage(64, 64, strides[0], a * (1,))
        self.layer2 = stage(256, 128, strides[1], b * (1,))
        self.layer3 = stage(512, 256, strides[2], c * (dense[0],))
        self.layer4 = stage(1024, 512, strides[3], (dense[1], 2 * dense[1], 4 * dense[1]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = self.layer1(F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1))
        return low, self.layer4(self.layer3(self.layer2(low)))


class DRN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer0 = nn.Sequential(*conv_norm(3, 16, 7))
        self.layer1 = nn.Sequential(*conv_norm(16, 16, 3))
        self.layer2 = nn.Sequential(*conv_norm(16, 32, 3, stride=2))
        self.layer3, self.layer4 = stage(32, 64, 2, 3 * (1,)), stage(256, 128, 2, 4 * (1,))
        self.layer5, self.layer6 = stage(512, 256, 1, 6 * (2,)), stage(1024, 512, 1, 3 * (4,))
        self.layer7 = nn.Sequential(*conv_norm(2048, 512, 3, dilation=2))
        self.layer8 = nn.Sequential(*conv_norm(512, 512, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        return low, self.layer8(self.layer7(self.layer6(self.layer5(self.layer4(low)))))


class Branch(nn.Module):
    def __init__(self, in_channels: int, rate: int) -> None:
        super().__init__()
        self.atrous_conv, self.bn, _ = conv_norm(in_channels, 256, 3 if rate > 1 else 1, dilation=rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.atrous_conv(x)))


class Reference(nn.Module):
    """Its names are those of the fact sheet; `dropouts` are there since the files that were published."""

    def __init__(self, encoder: str, output_stride: int, num_classes: int = 21, dropouts: bool = True) -> None:
        super().__init__()
        self.backbone = DRN() if encoder == "drnd54" else ResNet(encoder, output_stride)
        channels = 512 if encoder == "drnd54" else 2048
        rates = (1, 6, 12, 18) if output_stride == 16 else (1, 12, 24, 36)
        self.aspp = nn.Module()
        for number, rate in enumerate(rates, start=1):
            self.aspp.add_module(f"aspp{number}", Branch(channels, rate))
        self.aspp.global_avg_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm(channels, 256, 1))
        self.aspp.conv1, self.aspp.bn1, _ = conv_norm(1280, 256, 1)
        self.decoder = nn.Module()
        self.decoder.conv1, self.decoder.bn1, _ = conv_norm(256, 48, 1)
        drop = [nn.Dropout()] if dropouts else []
        layers = [*conv_norm(304, 256, 3), *drop, *conv_norm(256, 256, 3), *drop, nn.Conv2d(256, num_classes, 1)]
        self.decoder.last_conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = self.backbone(x)
        local = [getattr(self.aspp, f"aspp{number}")(high) for number in range(1, 5)]
        pooled = self.aspp.global_avg_pool(high)
        pooled = F.interpolate(pooled, size=high.shape[2:], mode="bilinear", align_corners=True)
        high = F.relu(self.aspp.bn1(self.aspp.conv1(torch.cat([*local, pooled], dim=1))))
        low = F.relu(self.decoder.bn1(self.decoder.conv1(low)))
        high = F.interpolate(high, size=low.shape[2:], mode="bilinear", align_corners=True)
        logits = self.decoder.last_conv(torch.cat([high, low], dim=1))
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=True)


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize(
    ("encoder", "stride", "dropouts"),
    [
        ("resnet50", 16, True),
        ("resnet50", 8, False),
        ("drnd54", 8, True),
        pytest.param("resnet101", 16, True, marks=pytest.mark.slow),
        pytest.param("resnet101", 8, True, marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_documented_model(
    encoder: str, stride: int, dropouts: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A training script's whole file, with what it keeps beside the tensors, at an even and an odd size."""
    torch.manual_seed(0)
    theirs = randomised(Reference(encoder, stride, dropouts=dropouts))
    file = tmp_path / "deeplab.pth.tar"
    torch.save({"epoch": 49, "state_dict": theirs.state_dict(), "best_pred": np.float64(0.7843)}, file)
    ours = deeplabzoo.create(f"deeplabv3plus_{encoder}_voc", pretrained=file, output_stride=stride)
    assert "jfzhang95 layout" in caplog.messages[-1]
    assert ours.classes[8] == "cat"
    for size in ((64, 96), (97, 75)):
        with torch.inference_mode():
            require_same_logits(ours(image(*size)), theirs(image(*size)))


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        ("backbone.features.0.0.weight", "MobileNetV2, whose blocks pad before they expand"),
        ("backbone.block20.skip.weight", "Xception, whose decoder reads a map"),
        ("backbone.layer3.6.conv1.weight", "an encoder that has no equivalent here"),
    ],
)
def test_other_encoders_are_refused_in_a_sentence(new: str, sentence: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        tensors = {**Reference("resnet50", 16).state_dict(), new: torch.empty(1)}
    assert find_converter(tensors) is jfzhang95
    with pytest.raises(WeightsError, match=sentence):
        jfzhang95.convert(tensors, tmp_path / "other.pth.tar")


def test_the_published_resnet_has_so_many_parameters(tmp_path: Path) -> None:
    """59,344,309 in the fact sheet, for 21 classes on ResNet-101."""
    with torch.device("meta"):
        net = Reference("resnet101", 16)
    assert sum(parameter.numel() for parameter in net.parameters()) == 59_344_309
    converted = jfzhang95.convert(net.state_dict(), tmp_path / "deeplab-resnet.pth.tar")
    assert (converted.encoder, converted.config and converted.config.multi_grid) == ("resnet101", (1, 2, 4))
