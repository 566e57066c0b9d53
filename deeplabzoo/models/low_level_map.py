"""Which stride-4 map the decoder of DeepLabV3+ reads, where it is not the one that timm's features hold.

TensorFlow's decoder takes Xception's map before its ReLU, and MobileNetV2's before its projection.
"""

import torch
import torch.nn.functional as F
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._features import FeatureInfo
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.xception_aligned import SeparableConv2d, XceptionModule
from torch import nn

from deeplabzoo.errors import UsageError


class ActivatedSeparableConv2d(SeparableConv2d):
    """A separable convolution of an Xception that does the ReLU before it itself, on a copy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activate and convolve."""
        convolved: torch.Tensor = super().forward(F.relu(x))  # type: ignore[no-untyped-call]
        return convolved


def yield_low_level_unactivated(encoder: nn.Module) -> None:
    """Let the stride-4 feature of an Xception be the map before the ReLU that timm takes it after; all else stays.

    Raises UsageError for other encoders.
    """
    stacks = [block.stack for block in encoder.modules() if isinstance(block, XceptionModule)]
    if not stacks or not isinstance(encoder.feature_info, FeatureInfo):
        raise UsageError("decoder_low_level_activated=False has no meaning for an encoder other than Xception; leave it True.")
    taps = [info["module"] for info in encoder.feature_info.get_dicts() if info["reduction"] == 4]
    stack = stacks[int(taps[-1].split(".")[1])]
    stack.act3.__class__ = nn.Identity  # the same module, which timm's features are hooked to; only its forward differs
    stack.conv3.__class__ = ActivatedSeparableConv2d


class TappedInvertedResidual(InvertedResidual):
    """A block of MobileNetV2 of which two maps are read; of a type of its own, so that nobody fuses it to one."""

    def expanded_and_projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the block projects, and what it yields."""
        expanded: torch.Tensor = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))
        return expanded, self.bn3(self.conv_pwl(expanded)) + x


class WithExpandedLowLevel(EfficientNetFeatures):
    """timm's features of a MobileNetV2, the stride-4 one taken before the projection that ends its stage."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return timm's features with the stride-4 one replaced."""
        x = self.bn1(self.conv_stem(x))
        features: list[torch.Tensor] = []
        for index, stage in enumerate(self.blocks.children()):
            if index == _LOW_LEVEL_STAGE:
                *first, last = stage.children()
                for block in first:
                    x = block(x)
                assert isinstance(last, TappedInvertedResidual)
                expanded, x = last.expanded_and_projected(x)
                features.append(expanded)
                continue
            x = stage(x)
            if index + 1 in self._stage_out_idx:
                features.append(x)
        return features


_LOW_LEVEL_STAGE = 1


def yield_low_level_expanded(encoder: nn.Module) -> None:
    """Let the stride-4 feature of a MobileNetV2 be what its last block at that stride projects; all else stays.

    Raises UsageError for other encoders.
    """
    last = None
    if type(encoder) is EfficientNetFeatures:
        *_, last = list(encoder.blocks.children())[_LOW_LEVEL_STAGE].children()
    plain = isinstance(last, InvertedResidual) and last.has_skip and last.conv_s2d is None
    if last is None or not plain or any(type(last.get_submodule(one)) is not nn.Identity for one in ("aa", "se", "drop_path")):
        raise UsageError("decoder_low_level_expanded has a meaning for MobileNetV2 encoders only; leave it False.")
    last.__class__ = TappedInvertedResidual
    encoder.__class__ = WithExpandedLowLevel  # the same layers and state; only their forward differs
