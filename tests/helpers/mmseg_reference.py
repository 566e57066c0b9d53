"""mmsegmentation's DeepLabs written out on plain PyTorch with its tensor names, from their documentation and configurations.

`tests/checkpoints/converters/test_mmseg_own_code.py` compares names and shapes with its own code where that can be imported.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from deeplabzoo.models.config import DeepLabConfig

BLOCKS = {"18": (2, 2, 2, 2), "50": (3, 4, 6, 3), "101": (3, 4, 23, 3)}
MOBILE_STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""Expansion, channels and blocks of MobileNetV2's stages."""


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, rate: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=rate, dilation=rate, groups=groups, bias=False)


class Block(nn.Module):
    """Convolution, norm and an activation, as `conv` and `bn`."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(conv.out_channels)
        self.act = act or nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.act(self.bn(self.conv(x)))
        return y


def pointwise(in_channels: int, out_channels: int, act: nn.Module | None = None) -> Block:
    return Block(nn.Conv2d(in_channels, out_channels, 1, bias=False), act)


class Separable(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, rate: int = 1) -> None:
        super().__init__()
        self.depthwise_conv = Block(conv3x3(in_channels, in_channels, rate=rate, groups=in_channels))
        self.pointwise_conv = pointwise(in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.pointwise_conv(self.depthwise_conv(x))
        return y


class SplitAttention(nn.Module):
    """ResNeSt's convolution into two groups of maps, weighted against each other by their global means."""

    def __init__(self, width: int, rate: int) -> None:
        super().__init__()
        inner = max(32, width // 2)
        self.conv, self.bn0 = conv3x3(width, 2 * width, rate=rate, groups=2), nn.BatchNorm2d(2 * width)
        self.fc1, self.bn1 = nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner)
        self.fc2 = nn.Conv2d(inner, 2 * width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = F.relu(self.bn0(self.conv(x))).chunk(2, dim=1)
        weights = self.fc2(F.relu(self.bn1(self.fc1((one + other).mean((2, 3), keepdim=True)))))
        first, second = torch.stack(weights.chunk(2, dim=1)).softmax(dim=0)
        joined: torch.Tensor = one * first + other * second
        return joined


class Residual(nn.Module):
    """A ResNet's basic block (`conv2` is never dilated) or bottleneck, or ResNeSt's bottleneck."""

    def __init__(self, kind: str, in_channels: int, width: int, stride: int, rate: int) -> None:
        super().__init__()
        out_channels = width if kind == "basic" else 4 * width
        self.kind = kind
        self.conv1 = (
            conv3x3(in_channels, width, stride, rate) if kind == "basic" else nn.Conv2d(in_channels, width, 1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(width)
        if kind == "split":
            self.conv2: nn.Module = SplitAttention(width, rate)
        else:
            self.conv2 = conv3x3(width, width) if kind == "basic" else conv3x3(width, width, stride, rate)
            self.bn2 = nn.BatchNorm2d(width)
        if kind != "basic":
            self.conv3, self.bn3 = nn.Conv2d(width, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(3, stride, 1) if kind == "split" and stride > 1 else nn.Identity()
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != out_channels:
            split = kind == "split"
            pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if split else []
            conv = nn.Conv2d(in_channels, out_channels, 1, 1 if split else stride, bias=False)
            self.downsample = nn.Sequential(*pool, conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.conv2(x)) if self.kind == "split" else self.bn2(self.conv2(x))
        if self.kind != "basic":
            x = self.bn3(self.conv3(x if self.kind == "split" else F.relu(x)))
        return F.relu(x + shortcut)


class ResNet(nn.Module):
    def __init__(self, encoder: str, output_stride: int, grid: tuple[int, ...] | None) -> None:
        super().__init__()
        depth = encoder.removeprefix("resnet").removeprefix("resnest").rstrip("ce")
        kind = "split" if encoder.startswith("resnest") else "basic" if depth == "18" else "bottleneck"
        channels = 128 if kind == "split" else 64
        if kind == "split" or encoder.endswith("c"):
            half = channels // 2
            layers = ((3, half, 2), (half, half, 1), (half, channels, 1))
            self.stem = nn.Sequential(
                *(part for a, b, stride in layers for part in (conv3x3(a, b, stride), nn.BatchNorm2d(b), nn.ReLU()))
            )
        else:
            self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
        strides, rates = ((1, 2, 1, 1), (1, 1, 2, 4)) if output_stride == 8 else ((1, 2, 2, 1), (1, 1, 1, 2))
        for stage, (count, stride, rate) in enumerate(zip(BLOCKS[depth], strides, rates, strict=True)):
            blocks = []
            for index in range(count):
                own = max(1, rate // 2) if index == 0 else rate
                if grid and stage == 3:
                    own = grid[index]
                width = 64 * 2**stage
                blocks.append(Residual(kind, channels, width, stride if index == 0 else 1, own))
                channels = width if kind == "basic" else 4 * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x) if hasattr(self, "stem") else F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            features.append(x)
        return features


class Inverted(nn.Module):
    def __init__(self, expansion: int, in_channels: int, channels: int, stride: int, rate: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        expand = [pointwise(in_channels, hidden, nn.ReLU6())] if expansion > 1 else []
        depthwise = Block(conv3x3(hidden, hidden, stride, rate, groups=hidden), nn.ReLU6())
        self.conv = nn.Sequential(*expand, depthwise, pointwise(hidden, channels, nn.Identity()))
        self.adds = stride == 1 and in_channels == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """At output stride 8; the first block of a stage alone is dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Block(conv3x3(3, 32, 2), nn.ReLU6())
        before, strides, rates = 32, (1, 2, 2, 1, 1, 1, 1), (1, 1, 1, 2, 2, 4, 4)
        for index, ((expansion, channels, count), stride, rate) in enumerate(
            zip(MOBILE_STAGES, strides, rates, strict=True), 1
        ):
            first = Inverted(expansion, before, channels, stride, rate)
            others = (Inverted(expansion, channels, channels, 1, 1) for _ in range(count - 1))
            self.add_module(f"layer{index}", nn.Sequential(first, *others))
            before = channels

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = [self.conv1(x)]
        for index in range(1, 8):
            features.append(self.get_submodule(f"layer{index}")(features[-1]))
        return [features[index] for index in (2, 3, 5, 7)]


class DecodeHead(nn.Module):
    def __init__(self, config: DeepLabConfig, high: int, low: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        width, separable = config.head_channels, config.architecture == "deeplabv3plus"
        self.align_corners = config.align_corners
        self.conv_seg = nn.Conv2d(width, config.num_classes, 1)
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), pointwise(high, width))
        atrous = (Separable(high, width, rate) if separable else Block(conv3x3(high, width, rate=rate)) for rate in rates)
        self.aspp_modules = nn.ModuleList([pointwise(high, width), *atrous])
        self.bottleneck = Block(conv3x3(5 * width, width))
        if separable:
            detail = config.decoder_low_level_channels
            self.c1_bottleneck = pointwise(low, detail)
            self.sep_bottleneck = nn.Sequential(*(Separable(a, b) for a, b in pairwise((width + detail, width, width))))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        x = features[-1]
        pooled = self.resize(self.image_pool(x), x)
        x = self.bottleneck(torch.cat([pooled, *(branch(x) for branch in self.aspp_modules)], dim=1))
        if hasattr(self, "sep_bottleneck"):
            detail = self.c1_bottleneck(features[0])
            x = self.sep_bottleneck(torch.cat([self.resize(x, detail), detail], dim=1))
        logits: torch.Tensor = self.conv_seg(x)
        return logits

    def resize(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=self.align_corners)


class AuxiliaryHead(nn.Module):
    def __init__(self, in_channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        self.convs = nn.Sequential(Block(conv3x3(in_channels, width)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.conv_seg(self.convs(x))
        return logits


class Reference(nn.Module):
    """The network whose file a configuration of ours describes, under mmsegmentation's names; logits at the image's size."""

    def __init__(self, config: DeepLabConfig) -> None:
        super().__init__()
        if config.encoder == "mobilenetv2_100":
            self.backbone: nn.Module = MobileNetV2()
            low, middle, high = 24, 96, 320
        else:
            self.backbone = ResNet(config.encoder, config.output_stride, config.multi_grid)
            low, middle, high = (64, 256, 512) if config.encoder in ("resnet18", "resnet18c") else (256, 1024, 2048)
        assert config.atrous_rates is not None
        self.decode_head = DecodeHead(config, high, low, config.atrous_rates)
        self.auxiliary_head = AuxiliaryHead(middle, 64 if middle == 256 else 256, config.num_classes)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        features = self.backbone(image_BCHW)
        if self.training:
            self.auxiliary_head(features[-2])
        return self.decode_head.resize(self.decode_head(features), image_BCHW)
