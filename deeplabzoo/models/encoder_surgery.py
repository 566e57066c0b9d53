"""Changes to a finished encoder that its builder has no switch for.

Multi-grid, the other rule for strides turned into dilation, exact padding of even kernels, a last 1x1 convolution, group norm,
norm epsilon, batches of one.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.pool2d_same import AvgPool2dSame
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._features import FeatureInfo
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilevit import MobileVitBlock, MobileVitV2Block
from timm.models.resnet import BasicBlock
from timm.models.xception_aligned import SeparableConv2d, XceptionModule
from torch import nn

from deeplabzoo.errors import UsageError
from deeplabzoo.models.layers import SingleSampleBatchNorm2d, SingleSampleBatchNormMixin, multi_grid_dilations, num_norm_groups


def dilate_blocks(encoder: nn.Module, multi_grid: tuple[int, ...], output_stride: int, *, halved: bool = False) -> None:
    """Give each block of the last residual stage its own dilation (multi-grid; DeepLabV3, section 3.2.1).

    Raises UsageError for encoders without a residual stage 4: the papers define multi-grid on ResNets alone.
    """
    stage = getattr(encoder, "layer4", None)
    if not isinstance(stage, nn.Sequential) or hasattr(encoder, "layer5"):
        raise UsageError("multi_grid is defined for ResNet-like encoders (with a stage `layer4`) only; leave it None.")
    for block, rate in zip(stage, multi_grid_dilations(multi_grid, output_stride, len(stage), halved=halved), strict=True):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size[0] > 1:
                padding = rate * (conv.kernel_size[0] - 1) // 2
                conv.dilation, conv.padding = (rate, rate), (padding, padding)


def dilate_strided(encoder: nn.Module, strided: nn.Module) -> None:
    """Dilate the convolutions that lost their stride like the stage that they begin; `strided` is the encoder at stride 32.

    A stage of stride 2 that is run at stride 1 has its later convolutions dilated by 2 to make up for it. The one that had the
    stride itself reads cells that are as dense as before, so timm leaves it alone; several libraries dilate it all the same.
    """
    at_stride_32 = dict(strided.named_modules())
    for name, conv in encoder.named_modules():
        if not isinstance(conv, nn.Conv2d) or not isinstance(at_stride_32[name], nn.Conv2d) or max(conv.kernel_size) == 1:
            continue
        factors = tuple(int(was) // now for was, now in zip(at_stride_32[name].stride, conv.stride, strict=True))
        conv.dilation = tuple(rate * times for rate, times in zip(conv.dilation, factors, strict=True))
        if isinstance(conv.padding, tuple):
            conv.padding = tuple(padding * times for padding, times in zip(conv.padding, factors, strict=True))


class TrailingPadConv2d(nn.Conv2d):
    """A dilated convolution with an even kernel that pads below and to the right alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve at stride 1; the map keeps its size."""
        below, right = (rate * (kernel - 1) for rate, kernel in zip(self.dilation, self.kernel_size, strict=True))
        return super().forward(F.pad(x, (0, right, 0, below)))


def pad_even_kernels_at_end(encoder: nn.Module) -> None:
    """Keep the maps of dilated 2x2 downsampling convolutions (ConvNeXt, Inception-NeXt) where the strided ones have them.

    timm pads a dilated even kernel equally on both sides, which moves the map of ConvNeXt at output stride 8 by one cell
    (8 pixels); the strided convolution that it replaces starts at the first cell.
    """
    for conv in encoder.modules():
        if type(conv) is nn.Conv2d and conv.kernel_size[0] % 2 == 0 and conv.dilation[0] > 1 and conv.stride[0] == 1:
            conv.__class__ = TrailingPadConv2d  # the same layer and state; only its forward differs
            conv.padding = (0, 0)


class WithFinalConv(EfficientNetFeatures):
    """timm's features of an EfficientNet-like encoder, the last one passed through the 1x1 convolution before pooling."""

    conv_head: nn.Conv2d
    bn2: BatchNormAct2d

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return timm's features with the last one replaced."""
        *features, last = super().forward(x)
        return [*features, self.bn2(self.conv_head(last))]


def add_final_conv(encoder: nn.Module, name: str, *, pretrained: bool) -> None:
    """Let the last feature be that of the 1x1 convolution which ends timm's network `name` (its `conv_head` and `bn2`).

    Raises UsageError for encoders that have none.
    """
    whole = timm.create_model(name, num_classes=0, pretrained=pretrained)
    conv_head, bn2 = getattr(whole, "conv_head", None), getattr(whole, "bn2", None)
    if type(encoder) is not EfficientNetFeatures or not isinstance(conv_head, nn.Conv2d) or not isinstance(bn2, BatchNormAct2d):
        raise UsageError("encoder_final_conv exists for MobileNetV2 and EfficientNet encoders only; leave it None.")
    encoder.conv_head, encoder.bn2 = conv_head, bn2
    encoder.__class__ = WithFinalConv  # the same layers and state; only its forward differs


def remove_final_conv(encoder: nn.Module) -> None:
    """Let the last feature of timm's MobileViT be its last stage; encoders that end with their last stage stay as they are."""
    if hasattr(encoder, "final_conv"):
        encoder.set_submodule("final_conv", nn.Identity())


def undilate_local_convs(encoder: nn.Module) -> None:
    """Undo the dilation of the 3x3 convolutions before the attention of MobileViT blocks.

    Raises UsageError for encoders without such blocks.
    """
    blocks = [module for module in encoder.modules() if isinstance(module, MobileVitBlock | MobileVitV2Block)]
    if not blocks:
        raise UsageError(
            "encoder_dilate_local_conv=False has no meaning for an encoder without MobileViT blocks; leave it True."
        )
    for block in blocks:
        conv = block.get_submodule("conv_kxk.conv")
        if isinstance(conv, nn.Conv2d):
            padding = conv.kernel_size[0] // 2
            conv.dilation, conv.padding = (1, 1), (padding, padding)


def undilate_later_convs(encoder: nn.Module, dilated: Literal["first_convs", "first_blocks"]) -> None:
    """Undo the dilation of all but the first 3x3 convolution of each basic block, or of all but the first block of a stage.

    Raises UsageError for encoders that have no basic blocks, or that are not built as stages of MobileNet-like blocks.
    """
    later: list[nn.Conv2d] = []
    if dilated == "first_convs":
        later = [block.conv2 for block in encoder.modules() if isinstance(block, BasicBlock)]
    elif isinstance(encoder, EfficientNetFeatures):
        blocks = [block for stage in encoder.blocks.children() for block in list(stage.children())[1:]]
        later = [
            conv for block in blocks for conv in block.modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size[0] > 1
        ]
    if not later:
        kind = "with basic blocks (ResNet-18, 34)" if dilated == "first_convs" else "of the MobileNet and EfficientNet kind"
        raise UsageError(f"encoder_dilates={dilated!r} has a meaning for encoders {kind} only; leave it 'all'.")
    for conv in later:
        rate = conv.dilation[0]
        conv.dilation = (1, 1)
        if isinstance(conv.padding, tuple):
            conv.padding = (conv.padding[0] // rate, conv.padding[1] // rate)


def remove_shortcut_pooling(encoder: nn.Module) -> None:
    """Leave out the average pooling at stride 1 that timm puts into the shortcut of a stage that lost its stride."""
    for name, pool in list(encoder.named_modules()):
        if isinstance(pool, AvgPool2dSame) and pool.stride == (1, 1):
            encoder.set_submodule(name, nn.Identity())


class GroupNormAct(nn.GroupNorm):
    """Group norm in the place of timm's batch norm that applies an activation of its own; keeps that activation."""

    def __init__(self, channels: int, eps: float, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(num_norm_groups(channels), channels, eps=eps)
        self.drop, self.act = drop, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, then drop and activate as the layer that was here did."""
        activated: torch.Tensor = self.act(self.drop(super().forward(x)))
        return activated


def use_group_norm(encoder: nn.Module) -> None:
    """Put group norm (32 groups, or the largest fitting number below) wherever the encoder has batch norm.

    Scale and shift are taken over, so that weights trained with batch norm stay a starting point.
    """
    for name, old in list(encoder.named_modules()):
        if not isinstance(old, nn.BatchNorm2d):
            continue
        channels, device = old.num_features, old.running_mean.device if old.running_mean is not None else None
        new: nn.GroupNorm
        with torch.device(device or "cpu"):
            if isinstance(old, BatchNormAct2d):
                new = GroupNormAct(channels, old.eps, old.drop, old.act)
            else:
                new = nn.GroupNorm(num_norm_groups(channels), channels, eps=old.eps)
        new.weight, new.bias = old.weight, old.bias
        encoder.set_submodule(name, new)


def set_norm_eps(encoder: nn.Module, eps: float) -> None:
    """Set the epsilon of every batch or group norm (TensorFlow's models use 1e-3); raises UsageError where there is none."""
    norm_layers = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)]
    if not norm_layers:
        raise UsageError("encoder_norm_eps has no meaning for an encoder without batch or group norm; leave it None.")
    for norm in norm_layers:
        norm.eps = eps


class SingleSampleBatchNormAct2d(SingleSampleBatchNormMixin, BatchNormAct2d):
    """timm's batch norm with an activation of its own, bearing a batch of one on a 1x1 map."""


_SINGLE_SAMPLE_CLASSES = {nn.BatchNorm2d: SingleSampleBatchNorm2d, BatchNormAct2d: SingleSampleBatchNormAct2d}


@contextlib.contextmanager
def single_sample_safe_batchnorms(encoder: nn.Module) -> Iterator[None]:
    """While this holds, a batch norm that is fed a 1x1 map becomes one that bears a batch of one.

    Which ones those are (in attention blocks, or in the last stage for the smallest images) is seen from the maps of a forward
    pass, not from names. The layer stays the same object with the same state; only its forward differs.
    """

    def swap_class(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[-2:] == (1, 1):
            norm.__class__ = _SINGLE_SAMPLE_CLASSES.get(type(norm), type(norm))

    norm_layers = [module for module in encoder.modules() if type(module) in _SINGLE_SAMPLE_CLASSES]
    hooks = [norm.register_forward_pre_hook(swap_class) for norm in norm_layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Which stride-4 map the decoder of DeepLabV3+ reads, where it is not the one that timm's features hold.
#
# TensorFlow's decoder takes Xception's map before its ReLU, and MobileNetV2's before its projection.


class ActivatedSeparableConv2d(SeparableConv2d):
    """A separable convolution of an Xception that does the ReLU before it itself, on a copy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activate and convolve."""
        convolved: torch.Tensor = super().forward(F.relu(x))  # type: ignore[no-untyped-call]
        return convolved


def use_pre_activation_low_level(encoder: nn.Module) -> None:
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


def use_expanded_low_level(encoder: nn.Module) -> None:
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
