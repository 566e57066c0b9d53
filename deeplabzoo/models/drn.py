"""DRN-D-54, the dilated residual network of "Dilated Residual Networks" (arXiv:1705.09914), which timm does not have.

Tensor names and shapes are those of the published `drn_d_54` (and of DeepLab checkpoints built on it): `layer0` … `layer8`,
where 0, 1, 2, 7, 8 are plain convolutions (`layerN.0` conv, `layerN.1` batch norm) and 3 to 6 are bottleneck blocks
(`layerN.i.{conv1,bn1,conv2,bn2,conv3,bn3,downsample.0,downsample.1}`).
"""

import torch
import torch.nn.functional as F
from torch import nn

_STAGES = {3: (64, 3), 4: (128, 4), 5: (256, 6), 6: (512, 3)}
"""Bottleneck stages: stage -> (width, blocks); a stage gives 4 x width channels (table 1 of the paper, ResNet-50 depths)."""

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 with stride and dilation, 1x1, around a shortcut; the dilation is on the first block of a stage too."""

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = width * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x 4·width x H/stride x W/stride."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


def _plain(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    reach = dilation * (kernel - 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, reach, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _stage(in_channels: int, number: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    width, blocks = _STAGES[number]
    later = (Bottleneck(width * _EXPANSION, width, 1, dilation) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(in_channels, width, stride, dilation), *later)


class DRN54(nn.Module):
    """DRN-D-54 as a feature extractor, by nature at output stride 8: stages 5 and 6 are dilated by 2 and 4, stage 7 by 2.

    At output strides 16 and 32, which the paper does not have, stages 5 and 6 stride instead and every dilation shrinks in
    proportion (never below 1). `layer7` and `layer8` are the paper's degridding layers (section 4).
    """

    def __init__(self, in_chans: int = 3, output_stride: int = 8) -> None:
        super().__init__()
        dense = 32 // output_stride  # 4, 2, 1: how much denser than stride 32
        self.layer0 = _plain(in_chans, 16, 7)
        self.layer1 = _plain(16, 16, 3)
        self.layer2 = _plain(16, 32, 3, stride=2)
        self.layer3 = _stage(32, 3, stride=2)
        self.layer4 = _stage(256, 4, stride=2)
        self.layer5 = _stage(512, 5, stride=1 if output_stride == 8 else 2, dilation=max(1, dense // 2))
        self.layer6 = _stage(1024, 6, stride=2 if output_stride == 32 else 1, dilation=dense)
        self.layer7 = _plain(2048, 512, 3, dilation=max(1, dense // 2))
        self.layer8 = _plain(512, 512, 3)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Map B x in_chans x H x W to features of 32, 256, 512, 1024 and 512 channels at strides 2, 4, 8 and then as asked."""
        half = self.layer2(self.layer1(self.layer0(image)))
        quarter = self.layer3(half)
        eighth = self.layer4(quarter)
        middle = self.layer5(eighth)
        return [half, quarter, eighth, middle, self.layer8(self.layer7(self.layer6(middle)))]
