"""MobileNetV2 recognised in a graph's layers, and its weights under timm's names.

The blocks are found by their shape (expansion, depthwise, linear projection, residual), walking from the last feature to
the image, and are laid beside the blocks of timm's model. Strides, dilations and residuals must agree; widths may be
smaller: TensorFlow's DeepLab rounds channels to 1 where timm rounds them to 8 (at width 0.5, 12 channels against 16).
Such a layer is padded with zero channels, which stay zero through ReLU6 and residuals, so that the result is exact.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from deeplabzoo.checkpoints.converters.tensorflow.tflite_layers import CONVOLUTION, DEPTHWISE, Layer, same_padding
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.encoder_table import encoder_info, list_encoders
from deeplabzoo.models.encoders import build_encoder

Padding = Literal["symmetric", "same"]
StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Block:
    """An invert_rules residual block (MobileNetV2, 1801.04381, table 1); the first one has no expansion."""

    expand: Layer | None
    depthwise: Layer
    project: Layer
    residual: bool

    @property
    def source(self) -> Layer:
        """What feeds the block."""
        return (self.expand or self.depthwise).sources[0]


@dataclass(frozen=True, eq=False)
class Features:
    """A MobileNetV2 up to its last feature."""

    image: Layer
    stem: Layer
    blocks: tuple[Block, ...]

    def convolutions(self) -> Iterator[Layer]:
        """Yield every convolution, in the order in which they run."""
        yield self.stem
        for block in self.blocks:
            yield from filter(None, (block.expand, block.depthwise, block.project))

    @property
    def output_stride(self) -> int:
        """How many input pixels one pixel of the last feature stands for."""
        stride = 1
        for layer in self.convolutions():
            stride *= layer.stride
        return stride

    @property
    def padding(self) -> Padding:
        """TensorFlow's 'SAME' padding or a symmetric one; at the file's own size the two may be the same pixels."""
        possible: list[Padding] = ["symmetric", "same"]
        for layer in self.convolutions():
            reach = layer.dilation * (layer.kernel[0] // 2)
            if (layer.stride > 1 and layer.is_same_padding) or layer.padding != 4 * (reach,):
                possible = [one for one in possible if one != "symmetric"]
            if layer.padding != same_padding(layer, layer.input_shape):
                possible = [one for one in possible if one != "same"]
        if not possible:
            raise WeightsError("The encoder's paddings are neither TensorFlow's 'SAME' nor symmetric; it cannot be converted.")
        return possible[0]


def is_pointwise(layer: Layer, activation: str | None = None) -> bool:
    """Whether a layer is a plain 1x1 convolution, with this activation if one is given."""
    plain = layer.kind == CONVOLUTION and layer.kernel == (1, 1) and layer.stride == 1
    return plain and activation in (None, layer.activation)


def read_features(last: Layer) -> Features:
    """Walk from the last feature back to the image; raises WeightsError naming the layer that MobileNetV2 has not."""
    blocks: list[Block] = []
    layer = last
    while not (layer.kind == CONVOLUTION and layer.sources[0].kind == "input"):
        block = _block(layer)
        blocks.insert(0, block)
        layer = block.source
    if layer.kernel != (3, 3) or layer.activation != "RELU6":
        raise _mismatch_error(layer, "a 3x3 convolution with RELU6 on the image")
    return Features(layer.sources[0], layer, tuple(blocks))


def _block(layer: Layer) -> Block:
    if layer.kind == "ADD" and not layer.activation and len(layer.sources) == 2:
        for project, other in (layer.sources, layer.sources[::-1]):
            block = _without_residual(project)
            if block is not None and block.source is other:
                return Block(block.expand, block.depthwise, block.project, residual=True)
        raise _mismatch_error(layer, "the sum of a block's projection and of what feeds the block")
    block = _without_residual(layer)
    if block is None:
        raise _mismatch_error(layer, "a linear 1x1 convolution after a depthwise one with RELU6, or a sum with it")
    return block


def _without_residual(project: Layer) -> Block | None:
    if not is_pointwise(project, ""):
        return None
    depthwise = project.sources[0]
    if depthwise.kind != DEPTHWISE or depthwise.activation != "RELU6":
        return None
    expand = depthwise.sources[0]
    return Block(expand if is_pointwise(expand, "RELU6") else None, depthwise, project, residual=False)


def _mismatch_error(layer: Layer, expected: str) -> WeightsError:
    return WeightsError(f"This is not a MobileNetV2: {layer} stands where {expected} was expected.")


def match_encoder(features: Features, config: DeepLabConfig) -> tuple[DeepLabConfig, nn.Module]:
    """Return `config` with the name of timm's smallest MobileNetV2 that holds the file's channels, and that encoder.

    The encoder is on the meta device. Raises WeightsError if none has these blocks and widths.
    """
    channels = [layer.shape[-1] for layer in (features.stem, *(block.project for block in features.blocks))]
    for name in sorted(list_encoders("mobilenetv2_*"), key=lambda name: encoder_info(name).params):
        if encoder_info(name).channels[-1] < channels[-1]:
            continue
        named = dataclasses.replace(config, encoder=name)
        with torch.device("meta"):
            encoder, _ = build_encoder(named)
        pairs = _pairs(features, encoder)
        if pairs is not None and all(_fits_in(layer, convolution) for layer, convolution in pairs):
            return named, encoder
    widths = ", ".join(map(str, channels))
    raise WeightsError(f"timm has no MobileNetV2 whose blocks have {widths} channels, or more, and the dilations of the file.")


def _convolutions(encoder: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the encoder's convolutions by name; timm registers them in the order in which they run."""
    return {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d)}


def _pairs(features: Features, encoder: nn.Module) -> list[tuple[Layer, nn.Conv2d]] | None:
    """Pair the file's convolutions with timm's, or return None if the blocks are not the same ones."""
    residuals = [bool(module.has_skip) for module in encoder.modules() if hasattr(module, "has_skip")]
    layers, convolutions = list(features.convolutions()), list(_convolutions(encoder).values())
    if len(layers) != len(convolutions) or residuals != [block.residual for block in features.blocks]:
        return None
    return list(zip(layers, convolutions, strict=True))


def _fits_in(layer: Layer, convolution: nn.Conv2d) -> bool:
    assert layer.weight is not None
    depthwise = convolution.groups > 1
    steps = (layer.stride, layer.dilation if layer.kernel != (1, 1) else 1) == (convolution.stride[0], convolution.dilation[0])
    held = all(own <= other for own, other in zip(layer.weight.shape, convolution.weight.shape, strict=True))
    return (layer.kind == DEPTHWISE) == depthwise and layer.kernel == convolution.kernel_size and steps and held


def encoder_state(features: Features, encoder: nn.Module) -> StateDict:
    """Return the weights by their names relative to the encoder."""
    state: StateDict = {}
    batchnorms = ((name, module.eps) for name, module in encoder.named_modules() if isinstance(module, nn.BatchNorm2d))
    convolutions = _convolutions(encoder).items()
    for layer, (name, convolution), (norm, eps) in zip(features.convolutions(), convolutions, batchnorms, strict=True):
        state |= conv_and_identity_norm(layer, tuple(convolution.weight.shape), name, norm, eps)
    return state


def conv_and_identity_norm(layer: Layer, shape: tuple[int, ...], convolution: str, norm: str, eps: float) -> StateDict:
    """Return a convolution without bias and the batch norm that adds the bias and otherwise, in eval mode, changes nothing.

    Both are filled with zeros up to `shape`, out x in x height x width. The file's batch norm is folded into its
    convolutions, so mean 0 and variance 1 stand for statistics that are gone: before training with batch statistics, they must
    be measured again.
    """
    assert layer.weight is not None
    assert layer.bias is not None
    weight, bias = np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
    weight[tuple(slice(size) for size in layer.weight.shape)] = layer.weight
    bias[: len(layer.bias)] = layer.bias
    return {
        f"{convolution}.weight": torch.from_numpy(weight),
        f"{norm}.weight": torch.full((shape[0],), (1 + eps) ** 0.5),
        f"{norm}.bias": torch.from_numpy(bias),
        f"{norm}.running_mean": torch.zeros(shape[0]),
        f"{norm}.running_var": torch.ones(shape[0]),
        f"{norm}.num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }
