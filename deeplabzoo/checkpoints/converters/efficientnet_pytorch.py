"""lukemelas/EfficientNet-PyTorch: ImageNet classifiers of the EfficientNet and EfficientNet-Lite families, as encoders.

Many public EfficientNet files have its tensor names, whoever trained them; the weights themselves mostly come from TensorFlow.
The encoder is therefore timm's `tf_` variant: 'SAME' padding and a batch norm epsilon of 1e-3. Blocks are numbered through the
whole model there and within each stage in timm. A stage ends where the number of output channels changes: no two consecutive
stages of the family have the same number (arXiv:1905.11946, table 1, at every width of B0 to B7 and Lite0 to Lite4).
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deeplabzoo.checkpoints.converters.key_mapping import Rules, rename
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.models.encoder_table import encoder_info
from deeplabzoo.models.encoders import build_feature_extractor

FORMAT_NAME = "efficientnet_pytorch"

_STEM, _FIRST_BLOCK = "_conv_stem.weight", "_blocks.0._depthwise_conv.weight"
_ENCODERS = (*(f"tf_efficientnet_lite{size}" for size in range(5)), *(f"tf_efficientnet_b{size}" for size in range(8)))
_STRIDE = 16
"""Output stride at which shapes are compared; the tensors are the same at every stride."""
_LITE_MEAN = _LITE_STD = (0.5, 0.5, 0.5)
_OUTSIDE: Rules = (
    (r"_conv_stem\.(\w+)", r"conv_stem.\1"),
    (r"_bn0\.(\w+)", r"bn1.\1"),
    (r"_conv_head\.(\w+)", r"conv_head.\1"),
    (r"_bn1\.(\w+)", r"bn2.\1"),
    (r"_fc\.\w+", None),
)
_INSIDE = (("_se_reduce", "se.conv_reduce"), ("_se_expand", "se.conv_expand"), ("_depthwise_conv", "conv_dw"))
_EXPANDED = (("_expand_conv", "conv_pw"), ("_bn0", "bn1"), ("_bn1", "bn2"), ("_project_conv", "conv_pwl"), ("_bn2", "bn3"))
_PLAIN = (("_bn1", "bn1"), ("_project_conv", "conv_pw"), ("_bn2", "bn2"))
"""A block without expansion, as in the first stage: timm numbers its batch norms from the depthwise convolution on."""


def can_convert(names: Collection[str]) -> bool:
    """Whether tensors of these names are an EfficientNet in the layout of EfficientNet-PyTorch."""
    return _STEM in names and _FIRST_BLOCK in names


def convert(tensors: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """Return the encoder under timm's names; raises WeightsError for a model other than B0 to B7 and Lite0 to Lite4."""
    state = rename(tensors, (*_OUTSIDE, *_block_rules(tensors, path)), FORMAT_NAME)
    encoder = _encoder_of(state, path)
    is_lite = "lite" in encoder
    scale = {"mean": _LITE_MEAN, "std": _LITE_STD} if is_lite else {}
    return Checkpoint(
        format_name=FORMAT_NAME,
        config=None,
        encoder=encoder,
        state_dict=state,
        classes=None,
        palette=None,
        preprocessing=Preprocessing.from_dict(scale),
        dropped=("classifier",) if any(name.startswith("_fc.") for name in tensors) else (),
        notes=() if is_lite else ("ImageNet mean and std assumed (files trained with AdvProp expect pixels scaled to -1...1)",),
    )


def _block_rules(tensors: Mapping[str, Tensor], path: Path) -> Rules:
    """Return the rules of all blocks; raises WeightsError where their numbers have a gap or a projection is missing."""
    numbers = sorted({int(found[1]) for name in tensors if (found := re.match(r"_blocks\.(\d+)\.", name))})
    rules: list[tuple[str, str | None]] = []
    stage, block, channels = -1, 0, None
    for expected, number in enumerate(numbers):
        project = tensors.get(f"_blocks.{number}._project_conv.weight")
        if number != expected or project is None:
            missing = f"_blocks.{expected}._project_conv.weight"
            raise WeightsError(
                f"The {FORMAT_NAME} checkpoint '{path}' has {len(numbers)} blocks but lacks the tensor '{missing}'."
            )
        if project.shape[0] != channels:
            stage, block, channels = stage + 1, 0, project.shape[0]
        kinds = _EXPANDED if f"_blocks.{number}._expand_conv.weight" in tensors else _PLAIN
        for theirs, ours in (*_INSIDE, *kinds):
            rules.append((rf"_blocks\.{number}\.{theirs}\.(\w+)", rf"blocks.{stage}.{block}.{ours}.\1"))
        block += 1
    return rules


def _encoder_of(state: Mapping[str, Tensor], path: Path) -> str:
    """Return the encoder whose tensors these are, whatever its number of input channels."""
    stem = state["conv_stem.weight"]
    shapes = {name: tensor.shape for name, tensor in state.items() if not name.startswith(("conv_head.", "bn2."))}
    weights = [tensor for name, tensor in state.items() if name in shapes and name.rpartition(".")[2] in ("weight", "bias")]
    count = sum(tensor.numel() for tensor in weights) - stem.numel() + 3 * stem[:, :1].numel()
    for name in _ENCODERS:
        if encoder_info(name).params != count:
            continue
        with torch.device("meta"):
            expected = build_feature_extractor(name, _STRIDE, stem.shape[1]).state_dict()
        if {key: tensor.shape for key, tensor in expected.items()} == shapes:
            return name
    raise WeightsError(
        f"The {FORMAT_NAME} checkpoint '{path}' is none of EfficientNet-B0 to B7 and Lite0 to Lite4: its encoder has "
        f"{count / 1e6:.2f} M parameters; give a file with timm's tensor names instead."
    )
