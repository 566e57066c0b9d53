"""Changes to a built timm encoder for which its builder has no option.

Multi-grid, other rules for dilation, exact padding of even kernels, a last 1x1 convolution, another low-level map, group norm,
epsilon, batches of one. Several assign `__class__`: a replaced module would lose timm's hooks and tensor names, and a changed
class keeps both and alters the forward pass alone.
"""

import contextlib
from collections.abc import Iterable, Iterator
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
from deeplabzoo.models.layers import SingleSampleBatchNorm2d, multi_grid_dilations, num_norm_groups, single_sample_batch_norm


def dilate_blocks(encoder: nn.Module, multi_grid: tuple[int, ...], output_stride: int, *, halved: bool = False) -> None:
    """Give each block of the last residual stage its own dilation (multi-grid; DeepLabV3, section 3.2.1).

    Raises UsageError for encoders without a residual stage 4, as the papers define multi-grid for ResNets only.
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

    In a stage of stride 2 that is run at stride 1, the later convolutions are dilated by 2. The convolution that had the
    stride reads cells as dense as before, so timm does not dilate it; SMP and torchvision's MobileNetV3 do.
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
    """Pad dilated 2x2 downsampling convolutions (ConvNeXt, Inception-NeXt) so that their maps do not shift.

    timm pads a dilated even kernel equally on both sides, which moves the map of ConvNeXt at output stride 8 by one cell
    (8 pixels); the strided convolution that it replaces starts at the first cell.
    """
    for conv in encoder.modules():
        if type(conv) is nn.Conv2d and conv.kernel_size[0] % 2 == 0 and conv.dilation[0] > 1 and conv.stride[0] == 1:
            conv.__class__ = TrailingPadConv2d
            conv.padding = (0, 0)


class WithFinalConv(EfficientNetFeatures):
    """timm's features of an EfficientNet-like encoder, with its final 1x1 convolution applied to the last one."""

    conv_head: nn.Conv2d
    bn2: BatchNormAct2d

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return timm's features with the last one replaced."""
        *features, last = super().forward(x)
        return [*features, self.bn2(self.conv_head(last))]


def add_final_conv(encoder: nn.Module, name: str, *, pretrained: bool) -> None:
    """Apply the 1x1 convolution that ends timm's classifier `name` (`conv_head` and `bn2`) to the last feature.

    Raises UsageError for encoders that have none.
    """
    whole = timm.create_model(name, num_classes=0, pretrained=pretrained)
    conv_head, bn2 = getattr(whole, "conv_head", None), getattr(whole, "bn2", None)
    if type(encoder) is not EfficientNetFeatures or not isinstance(conv_head, nn.Conv2d) or not isinstance(bn2, BatchNormAct2d):
        raise UsageError("encoder_final_conv exists for MobileNetV2 and EfficientNet encoders only; leave it None.")
    encoder.conv_head, encoder.bn2 = conv_head, bn2
    encoder.__class__ = WithFinalConv


def remove_final_conv(encoder: nn.Module) -> None:
    """Remove the 1x1 convolution after the last stage of timm's MobileViT; other encoders do not have one."""
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
    """Remove the average pooling at stride 1 that timm puts into the shortcut of a stage that lost its stride."""
    for name, pool in list(encoder.named_modules()):
        if isinstance(pool, AvgPool2dSame) and pool.stride == (1, 1):
            encoder.set_submodule(name, nn.Identity())


class GroupNormAct(nn.GroupNorm):
    """Group norm that replaces timm's batch norm with an activation of its own, and keeps that activation."""

    def __init__(self, channels: int, eps: float, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(num_norm_groups(channels), channels, eps=eps)
        self.drop, self.act = drop, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize a map of shape B x C x H x W, then drop and activate as the replaced layer did."""
        activated: torch.Tensor = self.act(self.drop(super().forward(x)))
        return activated


def use_group_norm(encoder: nn.Module) -> None:
    """Replace every batch norm of the encoder by group norm (32 groups, or the largest number below that divides the channels).

    Scale and shift are kept, so that weights trained with batch norm remain usable as initial weights.
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


class SingleSampleBatchNormAct2d(BatchNormAct2d):
    """timm's batch norm with an activation of its own, accepting a batch of one on a 1x1 map in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize a map of shape B x C x H x W, then drop and activate as timm's layer does."""
        counter, training = self.num_batches_tracked, self.training
        x = single_sample_batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, counter, training, self.momentum, self.eps
        )
        activated: torch.Tensor = self.act(self.drop(x))
        return activated


_SINGLE_SAMPLE_CLASSES = {nn.BatchNorm2d: SingleSampleBatchNorm2d, BatchNormAct2d: SingleSampleBatchNormAct2d}


@contextlib.contextmanager
def single_cell_norms(encoder: nn.Module) -> Iterator[list[str]]:
    """Yield a list that receives the name of each batch norm that is fed a 1x1 map until the context ends.

    Which ones those are (in attention blocks, or in the last stage for the smallest images) follows from the maps of a forward
    pass, not from names.
    """
    found: list[str] = []

    def watch(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[-2:] == (1, 1) and name not in found:
            found.append(name)

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs))
        for name, module in encoder.named_modules()
        if type(module) in _SINGLE_SAMPLE_CLASSES
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def make_single_sample_safe(encoder: nn.Module, names: Iterable[str]) -> None:
    """Let the named batch norms accept a batch of one on a 1x1 map; those that group norm has replaced stay as they are."""
    for name in names:
        norm = encoder.get_submodule(name)
        norm.__class__ = _SINGLE_SAMPLE_CLASSES.get(type(norm), type(norm))  # the same layer and state; another forward


# Another stride-4 map for the decoder of DeepLabV3+ than timm's feature: TensorFlow's decoder takes Xception's map before its
# ReLU, and MobileNetV2's before its projection.


class ActivatedSeparableConv2d(SeparableConv2d):
    """A separable convolution of an Xception that applies the ReLU before it, not in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activate and convolve a map of shape B x C x H x W."""
        convolved: torch.Tensor = super().forward(F.relu(x))  # type: ignore[no-untyped-call]
        return convolved


def use_pre_activation_low_level(encoder: nn.Module) -> None:
    """Make the stride-4 feature of an Xception the map before its ReLU; timm takes it after.

    Raises UsageError for other encoders.
    """
    stacks = [block.stack for block in encoder.modules() if isinstance(block, XceptionModule)]
    if not stacks or not isinstance(encoder.feature_info, FeatureInfo):
        raise UsageError("decoder_low_level_activated=False has no meaning for an encoder other than Xception; leave it True.")
    taps = [info["module"] for info in encoder.feature_info.get_dicts() if info["reduction"] == 4]
    stack = stacks[int(taps[-1].split(".")[1])]
    stack.act3.__class__ = nn.Identity  # timm's features are hooked to this module
    stack.conv3.__class__ = ActivatedSeparableConv2d


class TappedInvertedResidual(InvertedResidual):
    """A block of MobileNetV2 of which two maps are read; a type of its own, which the optimized model does not fuse."""

    def expanded_and_projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the map that the block projects, and its output."""
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
    """Make the stride-4 feature of a MobileNetV2 the expanded map that its last block at that stride projects.

    Raises UsageError for other encoders.
    """
    last = None
    if type(encoder) is EfficientNetFeatures:
        *_, last = list(encoder.blocks.children())[_LOW_LEVEL_STAGE].children()
    plain = isinstance(last, InvertedResidual) and last.has_skip and last.conv_s2d is None
    if last is None or not plain or any(type(last.get_submodule(one)) is not nn.Identity for one in ("aa", "se", "drop_path")):
        raise UsageError("decoder_low_level_expanded has a meaning for MobileNetV2 encoders only; leave it False.")
    last.__class__ = TappedInvertedResidual
    encoder.__class__ = WithExpandedLowLevel
