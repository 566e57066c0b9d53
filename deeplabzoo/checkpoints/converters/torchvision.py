"""torchvision's DeepLabV3 models: ResNet-50, ResNet-101 and MobileNetV3-Large.

Their ASPP has rates 12, 24, 36 at every stride (MobileNetV3 runs at stride 16, where the paper halves them), a 3x3 convolution
after it, and dropout 0.5. MobileNetV3 differs from timm's in two points of arithmetic, both measured to be all: epsilon 1e-3 in
the encoder, and the strided block of the last stage dilated like the rest of it.

The auxiliary head of the ResNets sits where ours does and is kept. MobileNetV3's reads the first block of the 40-channel stage,
a map that timm's features do not hold, so that one is dropped.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from deeplabzoo.checkpoints.converters.key_mapping import (
    ExportedCheckpoint,
    Rules,
    check_same_arithmetic,
    converted_checkpoint,
    drop_auxiliary,
    invert_rules,
    rename,
)
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab

FORMAT_NAME = "torchvision"

_MOBILENET_STEM, _RESNET_STEM = "backbone.0.0.weight", "backbone.conv1.weight"
_ASPP, _CLASSIFIER, _AUXILIARY = "classifier.0.convs.0.0.weight", "classifier.4.weight", "aux_classifier.4.weight"
_RATES = (12, 24, 36)
_MOBILENET = "mobilenetv3_large_100"
BUILDERS = {
    "resnet50": "deeplabv3_resnet50",
    "resnet101": "deeplabv3_resnet101",
    _MOBILENET: "deeplabv3_mobilenet_v3_large",
}
_RESNETS = {6: "resnet50", 23: "resnet101"}
"""By the number of blocks in the third stage (1512.03385, table 1)."""
_FIRST_BLOCK = {"0": ("conv_dw", "bn1"), "1": ("conv_pw", "bn2")}
_LATER_BLOCK = {"0": ("conv_pw", "bn1"), "1": ("conv_dw", "bn2"), "2": ("conv_pwl", "bn3")}
_SQUEEZED_BLOCK = {"0": ("conv_pw", "bn1"), "1": ("conv_dw", "bn2"), "3": ("conv_pwl", "bn3")}
"""Convolution and batch norm at each place of a block: the first one does not expand; squeeze-and-excitation, if any, comes
before the last convolution."""
_MOBILENET_STAGES = (1, 2, 3, 4, 2, 3)
"""Blocks of MobileNetV3-Large's stages (1905.02244, table 1), which torchvision numbers through."""
_SQUEEZED_STAGES = {2, 4, 5}
"""Those with squeeze-and-excitation (the same table)."""

PREPROCESSING = Preprocessing(size=(520, 520), resize="shortest", only_shrink=False)

_HEAD_RULES: Rules = (
    (r"classifier\.0\.convs\.([0-3])\.0\.(.+)", r"head.aspp.branches.\1.conv.\2"),
    (r"classifier\.0\.convs\.([0-3])\.1\.(.+)", r"head.aspp.branches.\1.norm.\2"),
    (r"classifier\.0\.convs\.4\.1\.(.+)", r"head.aspp.pool.conv.\1"),
    (r"classifier\.0\.convs\.4\.2\.(.+)", r"head.aspp.pool.norm.\1"),
    (r"classifier\.0\.project\.0\.(.+)", r"head.aspp.project.conv.\1"),
    (r"classifier\.0\.project\.1\.(.+)", r"head.aspp.project.norm.\1"),
    (r"classifier\.1\.(.+)", r"head.refine.conv.\1"),
    (r"classifier\.2\.(.+)", r"head.refine.norm.\1"),
    (r"classifier\.4\.(.+)", r"head.classifier.\1"),
)
_RESNET_RULES: Rules = (
    (r"backbone\.(.+)", r"encoder.\1"),
    (r"aux_classifier\.0\.(.+)", r"aux_head.block.conv.\1"),
    (r"aux_classifier\.1\.(.+)", r"aux_head.block.norm.\1"),
    (r"aux_classifier\.4\.(.+)", r"aux_head.classifier.\1"),
)


def can_convert(names: Collection[str]) -> bool:
    """Whether tensors of these names are a torchvision DeepLabV3."""
    return _ASPP in names and _CLASSIFIER in names and (_RESNET_STEM in names or _MOBILENET_STEM in names)


def convert(tensors: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """Return the model under our names; raises WeightsError for another encoder or a tensor that the layout does not know."""
    is_mobilenet = _MOBILENET_STEM in tensors
    config = _config(
        _MOBILENET if is_mobilenet else _resnet(tensors, path),
        num_classes=max(2, tensors[_CLASSIFIER].shape[0]),
        in_chans=tensors[_MOBILENET_STEM if is_mobilenet else _RESNET_STEM].shape[1],
        aux_head=_AUXILIARY in tensors and not is_mobilenet,
    )
    drops_auxiliary = is_mobilenet and _AUXILIARY in tensors
    return converted_checkpoint(
        FORMAT_NAME,
        config=config,
        state_dict=rename(tensors, _rules(config), FORMAT_NAME),
        preprocessing=PREPROCESSING,
        dropped=("auxiliary head (it reads a map inside a stage)",) if drops_auxiliary else (),
    )


def export(net: DeepLab) -> ExportedCheckpoint:
    """Return the model under torchvision's names; raises WeightsError where its builders make another model."""
    config = net.config
    builder = BUILDERS.get(config.encoder)
    if builder is None:
        raise WeightsError(f"{FORMAT_NAME} has no DeepLab on {config.encoder}; it has {', '.join(BUILDERS)}.")
    if config.in_chans != 3:
        raise WeightsError(f"{FORMAT_NAME}'s models take 3 channels, and this one takes {config.in_chans}.")
    keeps_auxiliary = config.aux_head and config.encoder != _MOBILENET
    theirs = _config(config.encoder, num_classes=config.num_classes, in_chans=3, aux_head=keeps_auxiliary)
    check_same_arithmetic(config, theirs, FORMAT_NAME)
    state = net.state_dict() if keeps_auxiliary else drop_auxiliary(net.state_dict())
    lost = ("auxiliary head left out (theirs reads a map inside a stage)",) if config.aux_head and not keeps_auxiliary else ()
    return ExportedCheckpoint(
        state_dict=rename(state, invert_rules(_rules(theirs)), FORMAT_NAME),
        build=f"torchvision.models.segmentation.{builder}(weights=None, weights_backbone=None, "
        f"num_classes={config.num_classes}, aux_loss={keeps_auxiliary})",
        notes=(*lost, "class names and preprocessing are not in a state dict"),
    )


def _config(encoder: str, *, num_classes: int, in_chans: int, aux_head: bool) -> DeepLabConfig:
    """Return what torchvision's builder for an encoder makes."""
    is_mobilenet = encoder == _MOBILENET
    return DeepLabConfig(
        architecture="deeplabv3",
        encoder=encoder,
        num_classes=num_classes,
        in_chans=in_chans,
        output_stride=16 if is_mobilenet else 8,
        atrous_rates=_RATES,
        dropout=0.5,
        aux_head=aux_head,
        encoder_norm_eps=1e-3 if is_mobilenet else None,
        encoder_dilate_strided=is_mobilenet,
    )


def _rules(config: DeepLabConfig) -> Rules:
    return (*(_mobilenet_rules() if config.encoder == _MOBILENET else _RESNET_RULES), *_HEAD_RULES)


def _resnet(tensors: Mapping[str, Tensor], path: Path) -> str:
    blocks = {name.split(".")[2] for name in tensors if name.startswith("backbone.layer3.")}
    if len(blocks) not in _RESNETS or "backbone.layer3.0.conv3.weight" not in tensors:
        raise WeightsError(
            f"'{path}' is a torchvision DeepLabV3 on a ResNet with {len(blocks)} blocks in its third stage; "
            f"expected {' or '.join(f'{count} ({name})' for count, name in _RESNETS.items())}."
        )
    return _RESNETS[len(blocks)]


def _mobilenet_rules() -> Rules:
    rules: list[tuple[str, str | None]] = [
        (r"aux_classifier\..+", None),
        (r"backbone\.0\.0\.(.+)", r"encoder.conv_stem.\1"),
        (r"backbone\.0\.1\.(.+)", r"encoder.bn1.\1"),
        (r"backbone\.16\.0\.(.+)", r"encoder.blocks.6.0.conv.\1"),
        (r"backbone\.16\.1\.(.+)", r"encoder.blocks.6.0.bn1.\1"),
    ]
    places = [(stage, block) for stage, count in enumerate(_MOBILENET_STAGES) for block in range(count)]
    for index, (stage, block) in enumerate(places, start=1):
        parts = _FIRST_BLOCK if index == 1 else _SQUEEZED_BLOCK if stage in _SQUEEZED_STAGES else _LATER_BLOCK
        theirs, ours = rf"backbone\.{index}\.block", f"encoder.blocks.{stage}.{block}"
        for part, (conv, norm) in parts.items():
            rules.append((rf"{theirs}\.{part}\.0\.(.+)", rf"{ours}.{conv}.\1"))
            rules.append((rf"{theirs}\.{part}\.1\.(.+)", rf"{ours}.{norm}.\1"))
        if stage not in _SQUEEZED_STAGES:
            continue
        rules.append((rf"{theirs}\.2\.fc1\.(.+)", rf"{ours}.se.conv_reduce.\1"))
        rules.append((rf"{theirs}\.2\.fc2\.(.+)", rf"{ours}.se.conv_expand.\1"))
    return rules
