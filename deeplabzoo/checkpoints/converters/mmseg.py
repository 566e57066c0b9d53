"""mmsegmentation's DeepLabV3 (`ASPPHead`) and V3+ (`DepthwiseSeparableASPPHead`) on ResNets, ResNeSt-101 and MobileNetV2.

Its arithmetic differs from the papers' in ways that are fields of the configuration:

- heads of 512 channels (ResNet-18: 128), with a 3x3, not a 1x1, convolution after the concatenation, and none after that;
- the pooled branch comes first;
- MobileNetV2 dilates the first block of each stage alone, timm all blocks but the one that lost its stride;
- ResNet-18 dilates the first convolution of each block alone;
- ResNeSt-101's shortcuts have no pooling where the stride was traded for dilation, as timm's have;
- models trained on 769 x 769 crops upsample with aligned corners, all others without;
- `d16-mg124` has dilations 1, 2, 4 in the last stage, half of what the paper's multi-grid makes at stride 16.

The auxiliary head of the ResNets sits where ours does and is kept. MobileNetV2's has 256 channels, which ours derives from
the feature's and would make 24, so that one is dropped.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from deeplabzoo.checkpoints.converters.key_mapping import Rules, converted_checkpoint, rename
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

FORMAT_NAME = "mmsegmentation"

_BOTTLENECK, _FIRST_BRANCH = "decode_head.bottleneck.conv.weight", "decode_head.aspp_modules.0.conv.weight"
_CLASSIFIER, _AUXILIARY = "decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight"
_LOW_LEVEL, _SEPARABLE = "decode_head.c1_bottleneck.conv.weight", "decode_head.aspp_modules.1.depthwise_conv.conv.weight"
_DEEP_STEM, _PLAIN_STEM = "backbone.stem.0.weight", "backbone.conv1.weight"
_MOBILENET_STEM = "backbone.conv1.conv.weight"

_SPLIT_ATTENTION, _RESNEST = "backbone.layer1.0.conv2.fc1.weight", "resnest101e"

_RESNETS = {(False, 2): "resnet18", (True, 6): "resnet50", (True, 23): "resnet101", (True, 36): "resnet152"}
"""By whether blocks have a third convolution and how many blocks the third stage has (1512.03385, table 1)."""
_BASIC = ("resnet18", "resnet18c")
_MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
"""Blocks of MobileNetV2's stages (1801.04381, table 2), which this code numbers `layer1` to `layer7`."""
_RATES = (12, 24, 36)
_LIKELY_DATASETS = ("voc", "cityscapes", "ade20k", "pascalcontext", "pascalcontext59", "cocostuff")
_EXACTNESS_SIZES = {19: Preprocessing(size=(1024, 2048), only_shrink=False)}
"""Cityscapes' images are fed whole; others with the shorter side at 512, as its test settings for most data say."""
_DEFAULT_SIZE = Preprocessing(size=(512, 512), resize="shortest", only_shrink=False)

_HEAD_RULES: Rules = (
    (r"decode_head\.image_pool\.1\.conv\.(\w+)", r"head.aspp.pool.conv.\1"),
    (r"decode_head\.image_pool\.1\.bn\.(\w+)", r"head.aspp.pool.norm.\1"),
    (r"decode_head\.aspp_modules\.(\d)\.conv\.(\w+)", r"head.aspp.branches.\1.conv.\2"),
    (r"decode_head\.aspp_modules\.(\d)\.bn\.(\w+)", r"head.aspp.branches.\1.norm.\2"),
    (r"decode_head\.aspp_modules\.(\d)\.(depth|point)wise_conv\.conv\.(\w+)", r"head.aspp.branches.\1.\2wise.conv.\3"),
    (r"decode_head\.aspp_modules\.(\d)\.(depth|point)wise_conv\.bn\.(\w+)", r"head.aspp.branches.\1.\2wise.norm.\3"),
    (r"decode_head\.bottleneck\.conv\.(\w+)", r"head.aspp.project.conv.\1"),
    (r"decode_head\.bottleneck\.bn\.(\w+)", r"head.aspp.project.norm.\1"),
    (r"decode_head\.c1_bottleneck\.conv\.(\w+)", r"head.low_level.conv.\1"),
    (r"decode_head\.c1_bottleneck\.bn\.(\w+)", r"head.low_level.norm.\1"),
    (r"decode_head\.sep_bottleneck\.([01])\.(depth|point)wise_conv\.conv\.(\w+)", r"head.decoder.\1.\2wise.conv.\3"),
    (r"decode_head\.sep_bottleneck\.([01])\.(depth|point)wise_conv\.bn\.(\w+)", r"head.decoder.\1.\2wise.norm.\3"),
    (r"decode_head\.conv_seg\.(\w+)", r"head.classifier.\1"),
)
_RESNET_RULES: Rules = (
    (r"backbone\.stem\.([01346])\.(\w+)", r"encoder.conv1.\1.\2"),
    (r"backbone\.stem\.7\.(\w+)", r"encoder.bn1.\1"),
    (r"backbone\.((?:conv1|bn1|layer[1-4])\..+)", r"encoder.\1"),
    (r"auxiliary_head\.convs\.0\.conv\.(\w+)", r"aux_head.block.conv.\1"),
    (r"auxiliary_head\.convs\.0\.bn\.(\w+)", r"aux_head.block.norm.\1"),
    (r"auxiliary_head\.conv_seg\.(\w+)", r"aux_head.classifier.\1"),
)


def can_convert(names: Collection[str]) -> bool:
    """Whether tensors of these names are a DeepLab of mmsegmentation, on any of its encoders."""
    return {_BOTTLENECK, _FIRST_BRANCH, _CLASSIFIER} <= set(names)


def convert(tensors: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """Return the model under our names; raises WeightsError for encoders that have no equivalent and unknown tensors."""
    config = _describe(tensors, path)
    is_mobilenet = _MOBILENET_STEM in tensors
    return converted_checkpoint(
        FORMAT_NAME,
        config=config,
        state_dict=rename(tensors, (*_HEAD_RULES, *(_mobilenet_rules() if is_mobilenet else _RESNET_RULES)), FORMAT_NAME),
        datasets=_LIKELY_DATASETS,
        preprocessing=_EXACTNESS_SIZES.get(config.num_classes, _DEFAULT_SIZE),
        dropped=("auxiliary head (its width has no equivalent)",) if is_mobilenet and _AUXILIARY in tensors else (),
        notes=(
            "output stride 8 and no aligned corners assumed, as in its `d8` models but those of 769x769",
            *(
                ("its own code labels foreground from a probability of 0.3, not 0.5",)
                if tensors[_CLASSIFIER].shape[0] == 1
                else ()
            ),
        ),
    )


def _describe(tensors: Mapping[str, Tensor], path: Path) -> DeepLabConfig:
    is_v3plus = _LOW_LEVEL in tensors
    if is_v3plus != (_SEPARABLE in tensors):
        raise WeightsError(f"'{path}' is of mmsegmentation, but neither its DeepLabV3 nor its DeepLabV3+ model.")
    is_mobilenet = _MOBILENET_STEM in tensors
    encoder = "mobilenetv2_100" if is_mobilenet else _resnet(tensors, path)
    stem = next(tensors[name] for name in (_MOBILENET_STEM, _DEEP_STEM, _PLAIN_STEM) if name in tensors)
    channels = tensors[_BOTTLENECK].shape[0]
    return DeepLabConfig(
        architecture="deeplabv3plus" if is_v3plus else "deeplabv3",
        encoder=encoder,
        num_classes=max(2, tensors[_CLASSIFIER].shape[0]),
        in_chans=stem.shape[1],
        output_stride=8,
        atrous_rates=_RATES,
        aux_head=_AUXILIARY in tensors and not is_mobilenet,
        head_channels=channels,
        pooling_first=True,
        aspp_project_kernel=3,
        refine_conv=False,
        decoder_channels=channels if is_v3plus else 256,
        decoder_low_level_channels=tensors[_LOW_LEVEL].shape[0] if is_v3plus else 48,
        encoder_dilate_strided=is_mobilenet,
        encoder_dilates="first_blocks" if is_mobilenet else "first_convs" if encoder in _BASIC else "all",
        encoder_pooled_shortcut=encoder != _RESNEST,
    )


def _resnet(tensors: Mapping[str, Tensor], path: Path) -> str:
    blocks = {name.split(".")[2] for name in tensors if name.startswith("backbone.layer3.")}
    has_third_conv, deep_stem = "backbone.layer3.0.conv3.weight" in tensors, _DEEP_STEM in tensors
    name = _RESNETS.get((has_third_conv, len(blocks)))
    if name is not None and deep_stem:
        name = f"{name}c"
    if _SPLIT_ATTENTION in tensors:
        name = _RESNEST if name == "resnet101c" else None
    if name is None or not (deep_stem or _PLAIN_STEM in tensors):
        raise WeightsError(
            f"'{path}' is a DeepLab of mmsegmentation on an encoder that has no equivalent here; "
            "its ResNet-18, 50, 101 and 152, with either stem, ResNeSt-101 and MobileNetV2 do."
        )
    return name


def _mobilenet_rules() -> Rules:
    rules: list[tuple[str, str | None]] = [
        (r"auxiliary_head\..+", None),
        (r"backbone\.conv1\.conv\.(\w+)", r"encoder.conv_stem.\1"),
        (r"backbone\.conv1\.bn\.(\w+)", r"encoder.bn1.\1"),
    ]
    for stage, blocks in enumerate(_MOBILENET_BLOCKS):
        convolutions = ("conv_dw", "conv_pw") if stage == 0 else ("conv_pw", "conv_dw", "conv_pwl")
        for block in range(blocks):
            for index, convolution in enumerate(convolutions):
                theirs, ours = rf"backbone\.layer{stage + 1}\.{block}\.conv\.{index}", f"encoder.blocks.{stage}.{block}"
                rules.append((rf"{theirs}\.conv\.(\w+)", rf"{ours}.{convolution}.\1"))
                rules.append((rf"{theirs}\.bn\.(\w+)", rf"{ours}.bn{index + 1}.\1"))
    return rules
