"""A network whose answer is known by looking: each pixel gets the class whose colour is nearest, at a coarse stride."""

import torch
import torch.nn.functional as F
from torch import nn

from deeplabzoo.models.config import DeepLabConfig, Preprocessing

COLORS = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
CLASSES = ("background", "red", "green", "blue")
PALETTE = ((0, 0, 0), (200, 10, 20), (30, 210, 40), (50, 60, 220))


class ColorNet(nn.Module):
    """What the predictor uses of a DeepLab, and nothing else."""

    def __init__(
        self, *, preprocessing: Preprocessing | None = None, align_corners: bool = False, stride: int = 4, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.config = DeepLabConfig(
            architecture="deeplabv3", encoder="resnet18", num_classes=4, align_corners=align_corners, in_chans=in_chans
        )
        self.preprocessing = preprocessing or Preprocessing(size=(129, 129), resize="longest")
        self.classes, self.palette = CLASSES, PALETTE
        self.num_classes = 4
        self.weights_source = {"name": "deeplabv3_colors", "tag": "known", "source": "color_net.py", "sha256": "0" * 64}
        self.stride = stride
        self.colors = nn.Parameter(torch.tensor(COLORS) / 255)
        self.norm = nn.BatchNorm2d(3)  # something with a training flag
        self.seen_training: list[bool] = []
        self.seen_shapes: list[tuple[int, ...]] = []

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        self.seen_training += [self.training, self.norm.training]
        self.seen_shapes.append(tuple(image_BCHW.shape))
        mean = torch.tensor(self.preprocessing.mean).view(1, 3, 1, 1)
        std = torch.tensor(self.preprocessing.std).view(1, 3, 1, 1)
        small = F.avg_pool2d(image_BCHW * std + mean, self.stride, ceil_mode=True)
        return -((small[:, None] - self.colors[None, :, :, None, None]) ** 2).sum(2)
