"""Checkpoints of detectron2's DeepLab project, pickled numpy arrays, against its documented forward pass written out here.

That code is not on PyPI, so the reference was written from its description on torchvision's bottleneck blocks.
"""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.parity import randomised, require_same_logits
from torch import nn

import deeplabzoo
from deeplabzoo.checkpoints.converters import detectron2, find_converter
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab

ROWS = [row for row in released() if row.origin == "detectron2"]


class Conv(nn.Conv2d):
    """A convolution that holds its norm, with ReLU unless told otherwise."""

    def __init__(
        self, a: int, b: int, kernel: int = 1, stride: int = 1, rate: int = 1, norm: bool = True, act: bool = True
    ) -> None:
        super().__init__(a, b, kernel, stride, rate * (kernel // 2), rate, bias=not norm)
        if norm:
            self.norm = nn.BatchNorm2d(b)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        x = self.norm(x) if hasattr(self, "norm") else x
        return F.relu(x) if self.act else x


class Block(nn.Module):
    def __init__(self, a: int, width: int, stride: int, rate: int) -> None:
        super().__init__()
        if a != 4 * width:
            self.shortcut = Conv(a, 4 * width, stride=stride, act=False)
        self.conv1, self.conv2 = Conv(a, width), Conv(width, width, 3, stride, rate)
        self.conv3 = Conv(width, 4 * width, act=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv3(self.conv2(self.conv1(x)))
        return F.relu(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class Backbone(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1, self.stem.conv2, self.stem.conv3 = Conv(3, 64, 3, 2), Conv(64, 64, 3), Conv(64, 128, 3)
        width, channels = 64, 128
        for name, strides, rates in (
            ("res2", (1, 1, 1), (1, 1, 1)),
            ("res3", (2, 1, 1, 1), (1, 1, 1, 1)),
            ("res4", (2, *(blocks - 1) * (1,)), blocks * (1,)),
            ("res5", (1, 1, 1), (2, 4, 8)),
        ):
            layers = []
            for stride, rate in zip(strides, rates, strict=True):
                layers.append(Block(channels, width, stride, rate))
                channels = 4 * width
            self.add_module(name, nn.Sequential(*layers))
            width *= 2

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.max_pool2d(self.stem.conv3(self.stem.conv2(self.stem.conv1(x))), 3, 2, 1)
        low = self.res2(x)
        return low, self.res5(self.res4(self.res3(low)))


class ASPP(nn.Module):
    def __init__(self, window: tuple[int, int]) -> None:
        super().__init__()
        pool = nn.Sequential(nn.AvgPool2d(window, stride=1), Conv(2048, 256, norm=False))
        self.convs = nn.ModuleList([Conv(2048, 256), *(Conv(2048, 256, 3, rate=rate) for rate in (6, 12, 18)), pool])
        self.project = Conv(1280, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *local, pooled = (conv(x) for conv in self.convs)
        pooled = F.interpolate(pooled, size=x.shape[2:], mode="bilinear", align_corners=False)
        out: torch.Tensor = self.project(torch.cat([*local, pooled], dim=1))
        return out


class Reference(nn.Module):
    """`window` is what the pooled branch averages over, in cells of the last map."""

    def __init__(self, architecture: str, window: tuple[int, int], blocks: int = 6, num_classes: int = 19) -> None:
        super().__init__()
        self.backbone = Backbone(blocks)
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.predictor = nn.Conv2d(256, num_classes, 1)
        self.is_v3 = architecture == "deeplabv3"
        if self.is_v3:
            self.sem_seg_head.aspp = ASPP(window)
        else:
            low = nn.ModuleDict(
                {"project_conv": Conv(256, 48), "fuse_conv": nn.Sequential(Conv(304, 256, 3), Conv(256, 256, 3))}
            )
            self.sem_seg_head.decoder = nn.ModuleDict({"res2": low, "res5": nn.ModuleDict({"project_conv": ASPP(window)})})
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = self.backbone(x)
        head = self.sem_seg_head
        if self.is_v3:
            logits = head.predictor(head.aspp(high))
        else:
            low = head.decoder["res2"]["project_conv"](low)
            high = head.decoder["res5"]["project_conv"](high)
            high = F.interpolate(high, size=low.shape[2:], mode="bilinear", align_corners=False)
            logits = head.predictor(head.decoder["res2"]["fuse_conv"](torch.cat([low, high], dim=1)))
        return F.interpolate(logits, scale_factor=16 if self.is_v3 else 4, mode="bilinear", align_corners=False)


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))


def reference(architecture: str, window: tuple[int, int], blocks: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return randomised(Reference(architecture, window, blocks))


def pickled(net: nn.Module, file: Path) -> Path:
    """The file as detectron2 writes it: arrays, without counters of batches."""
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    file.write_bytes(pickle.dumps({"model": arrays, "__author__": "detectron2"}))
    return file


@pytest.mark.parametrize("architecture", ["deeplabv3", "deeplabv3plus"])
def test_logits_are_those_of_the_documented_model(architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its own enlarging by a factor fits multiples of 16; the odd size is compared before it."""
    theirs = reference(architecture, (6, 6))
    ours = deeplabzoo.load(pickled(theirs, tmp_path / "model_final.pkl"))
    assert "detectron2 layout" in caplog.messages[-1]
    assert ours.classes[0] == "road"
    with torch.inference_mode():
        require_same_logits(ours(image(96, 96)), theirs(image(96, 96)))
        factor = 16 if architecture == "deeplabv3" else 4
        low = ours.forward_low_resolution(image(81, 95))
        require_same_logits(F.interpolate(low, scale_factor=factor, mode="bilinear"), theirs(image(81, 95)))


@pytest.mark.parametrize("stride", [16, 8])
def test_the_pooled_branch_averages_over_a_moving_window(stride: int, tmp_path: Path) -> None:
    """As on Cityscapes: images twice the crop; the window keeps its pixels when the output stride changes."""
    theirs = reference("deeplabv3plus", (2, 4))
    converted = detectron2.convert(theirs.state_dict(), tmp_path / "model.pkl")
    assert converted.config is not None
    config = replace(converted.config, pooling_window=(32, 64))
    ours = DeepLab.from_weights(config, converted.state_dict)
    other = DeepLab.from_weights(replace(config, pooling_window=None), converted.state_dict)
    with torch.inference_mode():
        expected = theirs(image(64, 128))
        require_same_logits(ours(image(64, 128)), expected)
        assert (other(image(64, 128)) - expected).abs().max() > 1e-2 * expected.std()
        ours.set_output_stride(stride)
        assert ours.head.aspp.pooling_cells == (32 // stride, 64 // stride)
        assert ours(image(64, 128)).shape == expected.shape


def test_a_window_is_two_numbers() -> None:
    with pytest.raises(UsageError, match="pooling_window must be"):
        DeepLabConfig(architecture="deeplabv3", encoder="resnet18", pooling_window=(512,))  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.full_name)
def test_manifest_rows_match_their_converter(row: WeightRow, tmp_path: Path) -> None:
    with torch.device("meta"):
        tensors = Reference(row.config.architecture, (32, 64), blocks=23).state_dict()
        expected = {name: tensor.shape for name, tensor in DeepLab(row.config).state_dict().items()}
    assert find_converter(tensors) is detectron2
    converted = detectron2.convert(tensors, tmp_path / "file.pkl")
    assert (converted.config, converted.preprocessing) == (row.config, row.preprocessing)
    assert {name: tensor.shape for name, tensor in converted.state_dict.items()} == expected


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("backbone.stem.conv3.", "backbone.stem.conv4.", "on an encoder that cannot be read"),
        ("fuse_conv.1.", "fuse_conv.depthwise.", "with another decoder"),
        ("sem_seg_head.decoder.res5.project_conv.project.", "sem_seg_head.project.", "has a tensor 'sem_seg_head.project"),
    ],
)
def test_other_models_are_refused_in_a_sentence(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        tensors = Reference("deeplabv3plus", (32, 64)).state_dict()
    tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    assert find_converter(tensors) is detectron2
    with pytest.raises(WeightsError, match=sentence):
        detectron2.convert(tensors, tmp_path / "other.pkl")
