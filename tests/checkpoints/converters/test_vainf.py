"""Checkpoints in the layout of VainF/DeepLabV3Plus-Pytorch, against its documented forward pass written out on torchvision.

That code is no package, so the reference here was written from its description: torchvision's ResNet and ASPP, and one 3x3
convolution after the low-level feature and the pyramid, in this order.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.parity import randomised, require_same_logits
from torch import nn

import deeplabzoo
from deeplabzoo.checkpoints.converters import find_converter
from deeplabzoo.errors import WeightsError

RATES = {16: (6, 12, 18), 8: (12, 24, 36)}


def block(in_channels: int, out_channels: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


class Head(nn.Module):
    """V3+ where there are low-level channels, V3 where there are none; its names are those of the fact sheet."""

    def __init__(self, num_classes: int, rates: tuple[int, ...], low_level: bool) -> None:
        super().__init__()
        aspp = pytest.importorskip("torchvision").models.segmentation.deeplabv3.ASPP(2048, rates)
        if low_level:
            self.project = nn.Sequential(*block(256, 48, 1))
            self.aspp = aspp
            self.classifier = nn.Sequential(*block(304, 256, 3), nn.Conv2d(256, num_classes, 1))
        else:
            self.classifier = nn.Sequential(aspp, *block(256, 256, 3), nn.Conv2d(256, num_classes, 1))
        self.low_level = low_level

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        if self.low_level:
            low = self.project(low)
            high = torch.cat([low, F.interpolate(self.aspp(high), size=low.shape[2:], mode="bilinear")], dim=1)
        logits: torch.Tensor = self.classifier(high)
        return logits


class Reference(nn.Module):
    def __init__(self, architecture: str, encoder: str, num_classes: int = 21, output_stride: int = 16) -> None:
        super().__init__()
        resnet = getattr(pytest.importorskip("torchvision").models, encoder)
        self.backbone = resnet(weights=None, replace_stride_with_dilation=[False, output_stride == 8, True])
        del self.backbone.fc
        self.classifier = Head(num_classes, RATES[output_stride], architecture == "deeplabv3plus")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        body = self.backbone
        low = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(x)))))
        logits = self.classifier(low, body.layer4(body.layer3(body.layer2(low))))
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear")


def reference(architecture: str, encoder: str, **options: int) -> nn.Module:
    torch.manual_seed(0)
    return randomised(Reference(architecture, encoder, **options))


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize(
    ("architecture", "encoder", "tensors"),
    [
        ("deeplabv3", "resnet50", None),
        ("deeplabv3plus", "resnet50", None),
        pytest.param("deeplabv3", "resnet101", None, marks=pytest.mark.slow),
        pytest.param("deeplabv3plus", "resnet101", 674, marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_documented_model(
    architecture: str, encoder: str, tensors: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A training script's whole file, with the numpy number that it keeps beside the tensors, at an even and an odd size."""
    theirs = reference(architecture, encoder)
    state = theirs.state_dict()
    assert tensors in (None, len(state))
    file = tmp_path / f"best_{architecture}_{encoder}_voc_os16.pth"
    torch.save({"cur_itrs": 30000, "model_state": state, "best_score": np.float64(0.772)}, file)
    ours = deeplabzoo.create(f"{architecture}_{encoder}_voc", pretrained=file)
    assert "vainf layout" in caplog.messages[-1]
    assert ours.classes[8] == "cat"
    for size in ((64, 96), (97, 129)):
        with torch.inference_mode():
            require_same_logits(ours(image(*size)), theirs(image(*size)))


def test_stride_8_has_the_rates_of_its_own_models(tmp_path: Path) -> None:
    """Its rates follow the stride, as ours do: the same weights at stride 8 are its network of stride 8."""
    theirs = reference("deeplabv3plus", "resnet50", output_stride=8, num_classes=19)
    torch.save(theirs.state_dict(), tmp_path / "os8.pth")
    ours = deeplabzoo.create("deeplabv3plus_resnet50_cityscapes", pretrained=tmp_path / "os8.pth", output_stride=8)
    assert ours.classes[0] == "road"
    with torch.inference_mode():
        require_same_logits(ours(image(64, 96)), theirs(image(64, 96)))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("backbone.layer1.", "backbone.low_level_features.", "MobileNetV2, whose blocks pad before they expand"),
        ("backbone.layer3.", "backbone.stage3.", "an encoder that has no equivalent here"),
        ("backbone.layer4.2.", "backbone.layer5.2.", "has a tensor 'backbone.layer5.2"),
    ],
)
def test_other_encoders_are_refused_in_a_sentence(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = Reference("deeplabv3plus", "resnet50").state_dict()
    tensors = {name.replace(old, new): torch.zeros(()).expand(tensor.shape) for name, tensor in state.items()}
    layout = find_converter(tensors)
    assert layout is not None
    with pytest.raises(WeightsError, match=sentence):
        layout.convert(tensors, tmp_path / "other.pth")


class Separable(nn.Module):
    """What `--separable_conv` puts in the place of a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        spread = {"padding": conv.padding, "dilation": conv.dilation, "groups": conv.in_channels, "bias": False}
        self.body = nn.Sequential(
            nn.Conv2d(conv.in_channels, conv.in_channels, conv.kernel_size, **spread),  # type: ignore[arg-type]
            nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        separated: torch.Tensor = self.body(x)
        return separated


def separate(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and child.kernel_size[0] > 1:
            setattr(module, name, Separable(child))
        else:
            separate(child)


@pytest.mark.parametrize("architecture", ["deeplabv3", "deeplabv3plus"])
def test_files_with_separable_convolutions_are_read(architecture: str, tmp_path: Path) -> None:
    """Its `--separable_conv`: every 3x3 convolution of the head in two parts, with nothing between them."""
    torch.manual_seed(0)
    theirs = Reference(architecture, "resnet50")
    separate(theirs.classifier)
    theirs = randomised(theirs)
    path = tmp_path / "net.pth"
    torch.save({"model_state": theirs.state_dict()}, path)
    ours = deeplabzoo.load(path)
    with torch.inference_mode():
        require_same_logits(ours(image(65, 97)), theirs(image(65, 97)))
