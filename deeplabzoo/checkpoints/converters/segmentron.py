"""SegmenTron: DeepLabV3+ on Xception-65 and on ResNets.

ASPP and decoder are separable with batch norm and ReLU after both halves, the pooled branch comes first, all upsampling
aligns corners. Its Xception is TensorFlow's: epsilon 1e-3, and the decoder reads the stride-4 map before its ReLU.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from deeplabzoo.checkpoints.converters.key_mapping import Rules, converted_checkpoint, rename
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

FORMAT_NAME = "segmentron"

_ASPP, _CLASSIFIER = "head.aspp.aspp1.block.bn_depth.weight", "head.block.2.weight"
_RESNETS = {6: "resnet50", 23: "resnet101", 36: "resnet152"}
"""By the number of blocks in the third stage (1512.03385, table 1)."""
_HALF = (0.5, 0.5, 0.5)
_CITYSCAPES = Preprocessing(size=(1024, 2048))
_VOC = Preprocessing(size=(480, 480), resize="shortest", only_shrink=False)


def can_convert(names: Collection[str]) -> bool:
    """Whether tensors of these names are its DeepLabV3+, on any of its encoders."""
    return _ASPP in names and _CLASSIFIER in names


def convert(tensors: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """Return the model under our names; raises WeightsError for its MobileNets and HRNet, and for heads without a decoder."""
    if "head.c1_block.conv.weight" not in tensors:
        raise WeightsError(
            f"'{path}' is a DeepLabV3+ of SegmenTron without the decoder that the name promises; none of ours fits."
        )
    encoder = _encoder(tensors, path)
    is_xception = encoder == "xception65"
    num_classes = max(2, tensors[_CLASSIFIER].shape[0])
    config = DeepLabConfig(
        architecture="deeplabv3plus",
        encoder=encoder,
        num_classes=num_classes,
        in_chans=tensors["encoder.conv1.weight"].shape[1],
        output_stride=16,
        pooling_first=True,
        decoder_low_level_activated=not is_xception,
        align_corners=True,
        encoder_norm_eps=1e-3 if is_xception else None,
    )
    preprocessing = _CITYSCAPES if num_classes == 19 else _VOC
    has_auxiliary = any(name.startswith("auxlayer.") for name in tensors)
    return converted_checkpoint(
        FORMAT_NAME,
        config=config,
        state_dict=rename(tensors, (*(_xception_rules() if is_xception else _RESNET_RULES), *_head_rules()), FORMAT_NAME),
        datasets=("voc", "cityscapes", "ade20k"),
        preprocessing=replace(preprocessing, mean=_HALF, std=_HALF) if is_xception else preprocessing,
        dropped=("auxiliary head",) if has_auxiliary else (),
        notes=("output stride 16 assumed, as in the published files",),
    )


def _encoder(tensors: Mapping[str, Tensor], path: Path) -> str:
    if "encoder.block21.sep_conv3.block.pointwise.weight" in tensors:
        return "xception65"
    blocks = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer3.")}
    if len(blocks) not in _RESNETS or "encoder.layer4.0.conv3.weight" not in tensors or "encoder.conv1.weight" not in tensors:
        raise WeightsError(
            f"'{path}' is a DeepLabV3+ of SegmenTron on an encoder that cannot be read; Xception-65 and ResNet-50/101/152 can."
        )
    return _RESNETS[len(blocks)]


_RESNET_RULES: Rules = ((r"encoder\.fc\..+", None), (r"encoder\.(.+)", r"encoder.\1"))


def _xception_rules() -> Rules:
    rules = [
        (r"encoder\.conv1\.(\w+)", r"encoder.stem_0.conv.\1"),
        (r"encoder\.bn1\.(\w+)", r"encoder.stem_0.bn.\1"),
        (r"encoder\.conv2\.(\w+)", r"encoder.stem_1.conv.\1"),
        (r"encoder\.bn2\.(\w+)", r"encoder.stem_1.bn.\1"),
    ]
    parts = {"depthwise": "conv_dw", "bn_depth": "bn_dw", "pointwise": "conv_pw", "bn_point": "bn_pw"}
    for block in range(21):
        theirs, ours = rf"encoder\.block{block + 1}", f"encoder.blocks_{block}"
        rules += [(rf"{theirs}\.(conv|bn)\.(\w+)", rf"{ours}.shortcut.\1.\2")]
        rules += [(rf"{theirs}\.sep_conv(\d)\.block\.{a}\.(\w+)", rf"{ours}.stack.conv\1.{b}.\2") for a, b in parts.items()]
    return rules


def _head_rules() -> Rules:
    rules: list[tuple[str, str | None]] = [
        (r"head\.aspp\.aspp0\.conv\.(\w+)", r"head.aspp.branches.0.conv.\1"),
        (r"head\.aspp\.aspp0\.bn\.(\w+)", r"head.aspp.branches.0.norm.\1"),
        (r"head\.aspp\.image_pooling\.conv\.(\w+)", r"head.aspp.pool.conv.\1"),
        (r"head\.aspp\.image_pooling\.bn\.(\w+)", r"head.aspp.pool.norm.\1"),
        (r"head\.aspp\.conv\.(\w+)", r"head.aspp.project.conv.\1"),
        (r"head\.aspp\.bn\.(\w+)", r"head.aspp.project.norm.\1"),
        (r"head\.c1_block\.conv\.(\w+)", r"head.low_level.conv.\1"),
        (r"head\.c1_block\.bn\.(\w+)", r"head.low_level.norm.\1"),
        (r"head\.block\.2\.(\w+)", r"head.classifier.\1"),
        (r"auxlayer\..+", None),
    ]
    parts = {
        "depthwise": "depthwise.conv",
        "bn_depth": "depthwise.norm",
        "pointwise": "pointwise.conv",
        "bn_point": "pointwise.norm",
    }
    for theirs, ours in parts.items():
        rules.append((rf"head\.aspp\.aspp([1-3])\.block\.{theirs}\.(\w+)", rf"head.aspp.branches.\1.{ours}.\2"))
        rules.append((rf"head\.block\.([01])\.block\.{theirs}\.(\w+)", rf"head.decoder.\1.{ours}.\2"))
    return rules
