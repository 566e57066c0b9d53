"""Fused model for inference: batch norms folded, channels_last memory, heads without concatenation.

Equal to the model up to rounding: every step is exact in real numbers and computed in float64, and the float32 result is as
close to float64 as that of the model (tests/optimization/test_fused_model.py). Group norm and layer norm depend on the image
and cannot be folded.
"""

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models._features import FeatureListNet
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import nn

from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.heads import ASPP, V3Head, V3PlusHead
from deeplabzoo.models.interpolation import upsample_rows
from deeplabzoo.models.layers import ConvNormAct, SeparableConvNormAct
from deeplabzoo.optimization.fused_conv import BATCH_NORMS, RELU, FusedConv, fold_batchnorm, fuse_residuals
from deeplabzoo.optimization.fusion import convert_unfolded_convs, copy_sharing_tensors, fold_batchnorms

# Heads without concatenation.
#
# A 1x1 convolution of concatenated feature maps is the sum of 1x1 convolutions of each map, with the slice of the weights that
# reads it. So each ASPP branch is projected on its own and added, and the pooled branch, constant over the map, becomes a bias.
# The decoder's first convolution is split in the same way; a depthwise one needs no addition. Without decoder convolutions the
# classifier runs before the upsampling: bilinear weights sum to 1, so both orders give the same result.


def fuse_block(block: nn.Module) -> nn.Module:
    """Return a block of a head with its batch norms folded; group norm remains a separate layer."""
    if isinstance(block, ConvNormAct) and (type(block.norm) in BATCH_NORMS or isinstance(block.norm, nn.Identity)):
        norm = block.norm if isinstance(block.norm, nn.BatchNorm2d) else None
        return fold_batchnorm(block.conv, norm, None if block.conv_only else RELU)
    if isinstance(block, ConvNormAct):
        return nn.Sequential(fold_batchnorm(block.conv, None, None), _UnfoldedNormRelu(block.norm))
    if isinstance(block, SeparableConvNormAct):
        return nn.Sequential(fuse_block(block.depthwise), fuse_block(block.pointwise))
    return copy_sharing_tensors(block)


class _UnfoldedNormRelu(nn.Module):
    """Norm and ReLU after a convolution into which the norm cannot be folded (group norm)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = copy_sharing_tensors(norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the norm and ReLU; any shape that the norm takes."""
        return F.relu(self.norm(x))


class SplitInputConv(nn.Module):
    """A convolution of several feature maps without concatenating them: one convolution per map, added up.

    Args:
        block: A ConvNormAct or a convolution.
        widths: Channels of the maps, in the order in which `block` expects them concatenated.
    """

    bias: torch.Tensor | None

    def __init__(self, block: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.finish: nn.Module = nn.Identity()
        if isinstance(block, ConvNormAct) and type(block.norm) in BATCH_NORMS:
            assert isinstance(block.norm, nn.BatchNorm2d)
            whole, activation = fold_batchnorm(block.conv, block.norm, None), RELU
        elif isinstance(block, ConvNormAct):
            whole, activation = fold_batchnorm(block.conv, None, None), None
            self.finish = _UnfoldedNormRelu(block.norm)
        else:
            assert isinstance(block, nn.Conv2d)
            whole, activation = fold_batchnorm(block, None, None), None
        ends = list(itertools.accumulate(widths))
        feature_indices = [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]
        self.parts = nn.ModuleList(whole.part(index) for index in feature_indices)
        self.activation = activation
        self.register_buffer("bias", whole.bias)

    def part(self, index: int) -> FusedConv:
        """Return the convolution of the map at `index`, without bias and activation."""
        part = self.parts[index]
        assert isinstance(part, FusedConv)
        return part

    def forward(self, maps: Sequence[tuple[int, torch.Tensor]], constant_BC11: torch.Tensor | None = None) -> torch.Tensor:
        """Return the convolution of the concatenated maps.

        Args:
            maps: (index, B x C x H x W) pairs; the index is that of the map in the concatenation.
            constant_BC11: Output of the convolution of a map that is missing in `maps`: B x out x 1 x 1 where it is constant,
                or B x out x H x W. May be overwritten.
        """
        bias, total = self.bias, None
        if constant_BC11 is not None and constant_BC11.shape[0] == constant_BC11.shape[2] == constant_BC11.shape[3] == 1:
            bias = constant_BC11.flatten() if bias is None else bias + constant_BC11.flatten()
        else:
            total = constant_BC11
        for number, (index, x) in enumerate(maps):
            out = self.part(index)
            last = self.activation if number == len(maps) - 1 else None
            own = bias if number == 0 else None
            if total is not None and total.shape[2:] == (1, 1) and x.shape[2:] != (1, 1):
                total = out(x, bias=own).add_(total)
                total = total if last is None else last(total)
            else:
                total = out(x, addend=total, may_overwrite_addend=True, bias=own, activation=last)
        assert total is not None
        finished: torch.Tensor = self.finish(total)
        return finished


class FusedASPP(nn.Module):
    """Atrous spatial pyramid pooling that projects each branch on its own instead of concatenating them."""

    def __init__(self, aspp: ASPP) -> None:
        super().__init__()
        self.branches = nn.ModuleList(fuse_block(branch) for branch in aspp.branches)
        self.pool = fuse_block(aspp.pool)
        channels = aspp.project.conv.in_channels // (len(self.branches) + 1)
        self.project = SplitInputConv(aspp.project, (len(self.branches) + 1) * [channels])
        self.pool_index = 0 if aspp.pooling_first else len(self.branches)
        self.branch_indices = [index for index in range(len(self.branches) + 1) if index != self.pool_index]
        self.pointwise = aspp.project.conv.kernel_size == (1, 1)
        self.pooling_cells = aspp.pooling_cells
        self.align_corners = aspp.align_corners

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map encoder features B x C x h x w to B x head_channels x h x w."""
        maps = [(index, branch(x)) for index, branch in zip(self.branch_indices, self.branches, strict=True)]
        projected: torch.Tensor = self.project(maps, self._pooled(x))
        return projected

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Return the projection of the pooled branch: B x C x 1 x 1 where it is constant, else B x C x h x w.

        A 3x3 projection pads with zeros, so its output for a constant map is not constant at the border.
        """
        size, project = x.shape[-2:], self.project.part(self.pool_index)
        if self.pooling_cells is None:
            pooled = self.pool(x.mean((2, 3), keepdim=True))
            pooled_projection: torch.Tensor = project(pooled if self.pointwise else pooled.expand(-1, -1, *size))
            return pooled_projection
        height, width = self.pooling_cells
        pooled = self.pool(F.avg_pool2d(x, (min(height, size[0]), min(width, size[1])), stride=1))
        upsampled = project(pooled) if self.pointwise else pooled
        upsampled = F.interpolate(upsampled, size=size, mode="bilinear", align_corners=self.align_corners)
        return upsampled if self.pointwise else project(upsampled)


class FusedV3Head(nn.Module):
    """The DeepLabV3 head: logits at the output stride of the encoder."""

    def __init__(self, head: V3Head) -> None:
        super().__init__()
        self.aspp = FusedASPP(head.aspp)
        self.refine = fuse_block(head.refine)
        self.classifier = fold_batchnorm(head.classifier, None, None)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Map the last encoder feature, [B x C x h x w], to logits B x num_classes x h x w; empties the list."""
        logits: torch.Tensor = self.classifier(self.refine(self.aspp(features.pop())))
        return logits


# The DeepLabV3+ decoder: two feature maps without concatenation, large ones in strips of rows.
#
# At stride 4 the maps of the decoder are, with those of the stem, the largest of the model. A 3x3 convolution reads one more
# row on each side, so a strip of rows needs only its own rows and a few around them (the halo): the same result in less memory.


STRIP_BYTES = 2**25
"""Size in bytes of one decoder map above which the decoder runs in strips of rows (CPU only)."""
_MIN_ROWS_PER_HALO = 16
"""Smallest number of rows of a strip per halo row; halo rows are computed twice, here at most an eighth of all rows."""


class TwoInputConv(nn.Module):
    """The first convolution of the decoder, dense or separable, on two feature maps without concatenating them."""

    def __init__(self, block: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.depthwise = nn.ModuleList()
        if isinstance(block, SeparableConvNormAct):
            depthwise = fuse_block(block.depthwise)
            assert isinstance(depthwise, FusedConv)
            feature_indices = (slice(0, widths[0]), slice(widths[0], sum(widths)))
            self.depthwise.extend(depthwise.part(index) for index in feature_indices)
            block = block.pointwise
        self.dense = SplitInputConv(block, widths)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the output of the block for the concatenated maps, each B x C x H x W."""
        if len(self.depthwise):
            maps = [depthwise(x) for depthwise, x in zip(self.depthwise, maps, strict=True)]
        first_conv: torch.Tensor = self.dense(list(enumerate(maps)))
        return first_conv


def _is_splittable(block: nn.Module) -> bool:
    """Whether a decoder block can be split by input channels; a group norm over both maps cannot."""
    return not isinstance(block, SeparableConvNormAct) or isinstance(fuse_block(block.depthwise), FusedConv)


class FusedV3PlusHead(nn.Module):
    """The DeepLabV3+ head; it does not concatenate the ASPP output and the low-level features unless group norm requires it."""

    def __init__(self, head: V3PlusHead) -> None:
        super().__init__()
        self.aspp = FusedASPP(head.aspp)
        self.refine = fuse_block(head.refine)
        self.low_level = fuse_block(head.low_level)
        self.align_corners = head.align_corners
        low, high = head.low_level.conv.out_channels, head.aspp.project.conv.out_channels
        self.high_index, self.low_index = (1, 0) if head.low_level_first else (0, 1)
        widths = [low, high] if head.low_level_first else [high, low]
        blocks = list(head.decoder)
        self.first_conv: TwoInputConv | None = (
            TwoInputConv(blocks.pop(0), widths) if blocks and _is_splittable(blocks[0]) else None
        )
        self.later = nn.Sequential(*(fuse_block(block) for block in blocks))
        self.classifier: FusedConv | SplitInputConv
        if len(head.decoder):
            self.classifier = fold_batchnorm(head.classifier, None, None)
        else:
            self.classifier = SplitInputConv(head.classifier, widths)
        self.halo = _halo_rows(self.first_conv, self.later)
        self.max_channels = max(
            [high, *(block.weight.shape[0] for block in self.later.modules() if isinstance(block, FusedConv))]
        )

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Map [B x C x h x w, stride-4 feature B x C' x H x W] to logits B x num_classes x H x W.

        Empties the list, so that the memory of each map is freed as soon as it has been read.
        """
        low = self.low_level(features.pop())
        high = self.refine(self.aspp(features.pop()))
        classifier = self.classifier
        if isinstance(classifier, SplitInputConv):
            scores = self._upsample(classifier.part(self.high_index)(high), low)
            logits: torch.Tensor = classifier([(self.low_index, low)], scores)
            return logits
        height, rows = low.shape[2], self._rows_per_strip(high, low)
        if rows >= height:
            return self._decode(self._upsample(high, low), low)
        assert self.halo is not None
        parts = [self._decode_rows(high, low, slice(top, min(top + rows, height)), self.halo) for top in range(0, height, rows)]
        return torch.cat(parts, dim=2)

    def _decode(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        both = (low, high) if self.low_index == 0 else (high, low)
        decoded = torch.cat(both, dim=1) if self.first_conv is None else self.first_conv(both)
        logits: torch.Tensor = self.classifier(self.later(decoded))
        return logits

    def _decode_rows(self, high: torch.Tensor, low: torch.Tensor, rows: slice, halo: int) -> torch.Tensor:
        """Return `rows` of the logits, computed from the same rows of the maps and `halo` rows on each side."""
        height, width = low.shape[2:]
        read = slice(max(rows.start - halo, 0), min(rows.stop + halo, height))
        upsampled = upsample_rows(high, (height, width), read, align_corners=self.align_corners)
        return self._decode(upsampled, low[:, :, read])[:, :, rows.start - read.start : rows.stop - read.start]

    def _rows_per_strip(self, high: torch.Tensor, low: torch.Tensor) -> int:
        """Return the number of rows that are decoded at once: on a CPU as many as fit `STRIP_BYTES`, otherwise all."""
        height, width = low.shape[2:]
        if self.halo is None or high.device.type != "cpu" or torch.compiler.is_compiling():
            return height
        row_bytes = high.shape[0] * self.max_channels * width * high.element_size()
        return max(STRIP_BYTES // row_bytes, _MIN_ROWS_PER_HALO * self.halo, 1)

    def _upsample(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return F.interpolate(high, size=low.shape[-2:], mode="bilinear", align_corners=self.align_corners)


def _halo_rows(first_conv: TwoInputConv | None, later: nn.Sequential) -> int | None:
    """Return how many rows above and below a row the decoder reads, or None where a row may depend on the whole map."""
    known = (nn.ModuleList, nn.Sequential, nn.Identity, TwoInputConv, SplitInputConv, FusedConv)
    if first_conv is None or any(not isinstance(one, known) for part in (first_conv, later) for one in part.modules()):
        return None
    first = [*first_conv.depthwise][:1] + [*first_conv.dense.parts][:1]
    convolutions = [one for part in (*first, later) for one in part.modules() if isinstance(one, FusedConv)]
    return sum(one.dilation[0] * (one.kernel_size[0] - 1) // 2 for one in convolutions)


_TRACE_HW = (65, 97)
"""Height and width of the image that the encoder is traced with: odd, different, and large enough for stride 32."""


class FusedModel(nn.Module):
    """Fused encoder and head; holds no reference to the model that they were built from.

    Args:
        encoder: Image -> list of features.
        head: Its fused head.
        feature_indices: Indices of the features that the head reads.
    """

    def __init__(self, encoder: nn.Module, head: FusedV3Head | FusedV3PlusHead, feature_indices: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.head, self.feature_indices = encoder, head, tuple(feature_indices)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Map normalized images B x C x H x W to low-resolution logits B x num_classes x h x w in channels_last memory."""
        features = self.encoder(image_BCHW.contiguous(memory_format=torch.channels_last))
        read = [features[index] for index in self.feature_indices]
        del features  # otherwise this frame keeps every feature map in memory until the head has finished
        logits: torch.Tensor = self.head(read)
        return logits.contiguous(memory_format=torch.channels_last)


def build_fused_model(net: DeepLab) -> FusedModel:
    """Return the fused model with the current weights of `net`.

    Runs one forward pass on a small image; logs the batch norms that could not be folded. Call the result under
    `torch.inference_mode()` or `torch.no_grad()`.

    Args:
        net: The model; it is not changed. Tensors that fusion does not change are shared with it.

    Returns:
        Normalized images B x C x H x W -> logits B x num_classes x h x w at the resolution of the head.
    """
    if next(net.parameters()).dtype in (torch.float16, torch.bfloat16):
        net = copy.deepcopy(net).float()  # exact; the trace below would mix the types of convolutions and batch norms
    encoder = copy_sharing_tensors(net.encoder)
    parameter = next(net.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, net.config.in_chans, *_TRACE_HW, generator=generator).to(parameter)
    plan = net.feature_plan
    feature_indices: tuple[int, ...] = (plan.last,) if isinstance(net.head, V3Head) else (plan.last, plan.low_level)
    with torch.no_grad():
        feature_indices = _keep_only_features(encoder, feature_indices)
        fold_batchnorms(encoder, image)
        convert_unfolded_convs(encoder)
        fuse_residuals(encoder)
        head = FusedV3Head(net.head) if isinstance(net.head, V3Head) else FusedV3PlusHead(net.head)
    form = FusedModel(encoder, head, feature_indices).requires_grad_(False).eval()
    for module in form.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(_make_contiguous)
    return form


def _keep_only_features(encoder: nn.Module, feature_indices: tuple[int, ...]) -> tuple[int, ...]:
    """Make the encoder return only the features at `feature_indices`; return their new indices.

    The others would stay in memory until the encoder has finished. An encoder of an unknown class still returns all of them.
    """
    # timm fixes the features of an encoder at construction. Both branches edit the table by which its forward collects them
    # (timm 1.0: layer name or stage -> index); `encoder` is a copy, so the user's model keeps its own table. If a later timm
    # does not read these tables, the returned indices are wrong, and tests/optimization/test_decoder_strips.py fails.
    if type(encoder) is FeatureListNet:
        encoder.return_layers = {
            name: mark for index, (name, mark) in enumerate(encoder.return_layers.items()) if index in feature_indices
        }
    elif (type(encoder) is EfficientNetFeatures or type(encoder) is MobileNetV3Features) and encoder.feature_hooks is None:
        encoder._stage_out_idx = {stage: index for stage, index in encoder._stage_out_idx.items() if index in feature_indices}
    else:
        return feature_indices
    return tuple(sorted(feature_indices).index(index) for index in feature_indices)


def _make_contiguous(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Make the input of a group norm contiguous: on channels_last memory torch's kernel has two to three times the error."""
    return tuple(one.contiguous() for one in inputs)
