"""TensorFlow's padding for torch.export, written so that open sizes stay short terms.

How much such a layer pads depends on the size of its input. torch.export carries sizes as symbolic terms; from timm's rule,
which divides as floats and takes maxima, each layer makes a longer one, and after four of them the export does not end.
"""

import copy

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame

from deeplabzoo.models.deeplab import DeepLab


class OpenConv2dSame(Conv2dSame):
    """timm's convolution with 'SAME' padding; the padded side is `stride * (cells - 1) + reach + 1`: `cells` come out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x out x ceil(H / stride) x ceil(W / stride)."""
        paddings: list[int] = []
        sides = zip(x.shape[-2:], self.stride, self.dilation, self.kernel_size, strict=True)
        for side, stride, rate, kernel in reversed(list(sides)):  # F.pad takes the last axis first
            reach = rate * (kernel - 1)
            if reach < stride - 1:  # cells that no window reads: only timm's rule with its maximum is right
                out: torch.Tensor = super().forward(x)  # type: ignore[no-untyped-call]
                return out
            cells = (side + stride - 1) // stride
            total = stride * (cells - 1) + reach + 1 - side
            paddings += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, paddings), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def with_open_sizes(net: DeepLab) -> DeepLab:
    """Return a float32 copy in eval mode on the CPU that torch.export follows for every size; same numbers."""
    twin = copy.deepcopy(net).cpu().float().eval()
    for module in twin.modules():
        if type(module) is Conv2dSame:
            module.__class__ = OpenConv2dSame  # the same layer and state; only its forward differs
    return twin
