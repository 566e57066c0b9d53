"""VainF/DeepLabV3Plus-Pytorch: DeepLabV3 and DeepLabV3+ on ResNet-50 and ResNet-101.

The heads are torchvision's with dropout 0.1; the V3+ decoder puts the low-level feature first and has one plain 3x3
convolution. Rates follow the output stride; the published files were trained at 16. Its MobileNetV2 is refused: each of its
blocks pads the input before the 1x1 expansion, so that the border holds what batch norm and ReLU make of 0 instead of 0, and
its first convolution does not pad at all. No encoder of timm computes that, and the border is felt all over the map.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from deeplabzoo.checkpoints.converters.key_mapping import Rules, converted_checkpoint, rename
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

FORMAT_NAME = "vainf"

_V3, _V3PLUS = "classifier.classifier.0.convs.0.0.weight", "classifier.aspp.convs.0.0.weight"
_LAST = {"deeplabv3": "classifier.classifier.4.weight", "deeplabv3plus": "classifier.classifier.3.weight"}
_RESNETS = {6: "resnet50", 23: "resnet101"}
"""By the number of blocks in the third stage (1512.03385, table 1)."""
_CITYSCAPES = Preprocessing(size=(1024, 2048))

_ASPP = r"classifier\.(?:aspp|classifier\.0)"
_RULES: Rules = (
    (r"backbone\.((?:conv1|bn1|layer[1-4])\..+)", r"encoder.\1"),
    (rf"{_ASPP}\.convs\.([0-3])\.0\.(\w+)", r"head.aspp.branches.\1.conv.\2"),
    (rf"{_ASPP}\.convs\.([0-3])\.1\.(\w+)", r"head.aspp.branches.\1.norm.\2"),
    (rf"{_ASPP}\.convs\.4\.1\.(\w+)", r"head.aspp.pool.conv.\1"),
    (rf"{_ASPP}\.convs\.4\.2\.(\w+)", r"head.aspp.pool.norm.\1"),
    (rf"{_ASPP}\.project\.0\.(\w+)", r"head.aspp.project.conv.\1"),
    (rf"{_ASPP}\.project\.1\.(\w+)", r"head.aspp.project.norm.\1"),
)
_V3_RULES: Rules = (
    (r"classifier\.classifier\.1\.(\w+)", r"head.refine.conv.\1"),
    (r"classifier\.classifier\.2\.(\w+)", r"head.refine.norm.\1"),
    (r"classifier\.classifier\.4\.(\w+)", r"head.classifier.\1"),
)
_V3PLUS_RULES: Rules = (
    (r"classifier\.project\.0\.(\w+)", r"head.low_level.conv.\1"),
    (r"classifier\.project\.1\.(\w+)", r"head.low_level.norm.\1"),
    (r"classifier\.classifier\.0\.(\w+)", r"head.decoder.0.conv.\1"),
    (r"classifier\.classifier\.1\.(\w+)", r"head.decoder.0.norm.\1"),
    (r"classifier\.classifier\.3\.(\w+)", r"head.classifier.\1"),
)


_SEPARABLE_RULES: Rules = (
    (rf"{_ASPP}\.convs\.([1-3])\.0\.body\.0\.(\w+)", r"head.aspp.branches.\1.depthwise.conv.\2"),
    (rf"{_ASPP}\.convs\.([1-3])\.0\.body\.1\.(\w+)", r"head.aspp.branches.\1.pointwise.conv.\2"),
    (rf"{_ASPP}\.convs\.([1-3])\.1\.(\w+)", r"head.aspp.branches.\1.pointwise.norm.\2"),
)
"""What `--separable_conv` makes of the head's 3x3 convolutions: two with nothing between them."""
_SEPARABLE_V3PLUS_RULES: Rules = (
    (r"classifier\.classifier\.0\.body\.0\.(\w+)", r"head.decoder.0.depthwise.conv.\1"),
    (r"classifier\.classifier\.0\.body\.1\.(\w+)", r"head.decoder.0.pointwise.conv.\1"),
    (r"classifier\.classifier\.1\.(\w+)", r"head.decoder.0.pointwise.norm.\1"),
)
_REFINE = "classifier.classifier.1"


def can_convert(names: Collection[str]) -> bool:
    """Whether tensors of these names are those of this repository's DeepLabs, on any of its encoders."""
    return (_V3 in names and _LAST["deeplabv3"] in names) or (_V3PLUS in names and _LAST["deeplabv3plus"] in names)


def convert(tensors: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """Return the model under our names; raises WeightsError for its MobileNetV2, HRNet and Xception encoders."""
    is_v3, is_separable = (_V3 in tensors), any(".body.0." in name for name in tensors)
    config = DeepLabConfig(
        architecture="deeplabv3" if is_v3 else "deeplabv3plus",
        encoder=_resnet(tensors, path),
        num_classes=max(2, tensors[_LAST["deeplabv3" if is_v3 else "deeplabv3plus"]].shape[0]),
        in_chans=tensors["backbone.conv1.weight"].shape[1],
        output_stride=16,
        aspp_separable=is_separable,
        depthwise_norm=not is_separable,
        decoder_convs=1,
        decoder_separable=is_separable and not is_v3,
        decoder_low_level_first=True,
    )
    rules = (*_RULES, *(_V3_RULES if is_v3 else _V3PLUS_RULES))
    if is_separable:
        rules = (*_SEPARABLE_RULES, *(() if is_v3 else _SEPARABLE_V3PLUS_RULES), *rules)
    return converted_checkpoint(
        FORMAT_NAME,
        config=config,
        state_dict=rename(_join_refine(tensors), rules, FORMAT_NAME),
        datasets=("voc", "cityscapes"),
        preprocessing=_CITYSCAPES if config.num_classes == 19 else Preprocessing(),
        notes=("output stride 16 assumed, as in the published files",),
    )


def _join_refine(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return V3's separable convolution after ASPP as the plain one that it equals: ours is plain, and nothing is between."""
    depthwise, pointwise = f"{_REFINE}.body.0.weight", f"{_REFINE}.body.1.weight"
    if depthwise not in tensors:
        return tensors
    joined = tensors[pointwise] * tensors[depthwise].transpose(0, 1)
    return {name: one for name, one in tensors.items() if name not in (depthwise, pointwise)} | {f"{_REFINE}.weight": joined}


def _resnet(tensors: Mapping[str, Tensor], path: Path) -> str:
    if any(name.startswith(("backbone.low_level_features.", "backbone.high_level_features.")) for name in tensors):
        raise WeightsError(
            f"'{path}' is VainF's DeepLab on MobileNetV2, whose blocks pad before they expand: no encoder here computes that, "
            "and the weights would give other labels; its ResNets can be read."
        )
    blocks = {name.split(".")[2] for name in tensors if name.startswith("backbone.layer3.")}
    if len(blocks) not in _RESNETS or "backbone.layer4.0.conv3.weight" not in tensors:
        raise WeightsError(
            f"'{path}' is VainF's DeepLab on an encoder that has no equivalent here; ResNet-50 and ResNet-101 do."
        )
    return _RESNETS[len(blocks)]
