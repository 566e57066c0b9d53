"""jfzhang95/pytorch-deeplab-xception: DeepLabV3+ on ResNet-50/101 and on DRN-D-54.

Its head is plain, not separable; all upsampling aligns corners. Its ResNets have multi-grid (1, 2, 4) in the last stage,
and at stride 8 they dilate the block that lost its stride too. Rates follow the output stride: 16, and 8 for DRN.

Two encoders are refused. MobileNetV2 pads the input of a block before the 1x1 expansion, so that the border holds what batch
norm and ReLU make of 0 instead of 0; Xception's decoder reads the end of the first block (128 channels), where timm's features
hold the map inside the second one (256), and its last three layers have no ReLU between their halves.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from deeplabzoo.checkpoints.converters.key_mapping import Rules, converted_checkpoint, rename
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

FORMAT_NAME = "jfzhang95"

_ASPP, _LOW_LEVEL = "aspp.aspp1.atrous_conv.weight", "decoder.conv1.weight"
_CLASSIFIERS = ("decoder.last_conv.8.weight", "decoder.last_conv.6.weight")
"""The last one is that of the first versions, without dropout between the convolutions."""
_RESNETS = {6: "resnet50", 23: "resnet101"}
"""By the number of blocks in the third stage (1512.03385, table 1)."""
_UNSUPPORTED = {
    "backbone.features.0.0.weight": "MobileNetV2, whose blocks pad before they expand",
    "backbone.high_level_features.0.conv.0.weight": "MobileNetV2, whose blocks pad before they expand",
    "backbone.block20.skip.weight": "Xception, whose decoder reads a map that timm's does not yield",
}
_PREPROCESSING = Preprocessing(size=(513, 513), resize="shortest", only_shrink=False)

_RULES: Rules = (
    (r"backbone\.(.+)", r"encoder.\1"),
    (r"aspp\.aspp1\.atrous_conv\.(\w+)", r"head.aspp.branches.0.conv.\1"),
    (r"aspp\.aspp2\.atrous_conv\.(\w+)", r"head.aspp.branches.1.conv.\1"),
    (r"aspp\.aspp3\.atrous_conv\.(\w+)", r"head.aspp.branches.2.conv.\1"),
    (r"aspp\.aspp4\.atrous_conv\.(\w+)", r"head.aspp.branches.3.conv.\1"),
    (r"aspp\.aspp1\.bn\.(\w+)", r"head.aspp.branches.0.norm.\1"),
    (r"aspp\.aspp2\.bn\.(\w+)", r"head.aspp.branches.1.norm.\1"),
    (r"aspp\.aspp3\.bn\.(\w+)", r"head.aspp.branches.2.norm.\1"),
    (r"aspp\.aspp4\.bn\.(\w+)", r"head.aspp.branches.3.norm.\1"),
    (r"aspp\.global_avg_pool\.1\.(\w+)", r"head.aspp.pool.conv.\1"),
    (r"aspp\.global_avg_pool\.2\.(\w+)", r"head.aspp.pool.norm.\1"),
    (r"aspp\.conv1\.(\w+)", r"head.aspp.project.conv.\1"),
    (r"aspp\.bn1\.(\w+)", r"head.aspp.project.norm.\1"),
    (r"decoder\.conv1\.(\w+)", r"head.low_level.conv.\1"),
    (r"decoder\.bn1\.(\w+)", r"head.low_level.norm.\1"),
    (r"decoder\.last_conv\.0\.(\w+)", r"head.decoder.0.conv.\1"),
    (r"decoder\.last_conv\.1\.(\w+)", r"head.decoder.0.norm.\1"),
)
_SECOND = ((("4", "5", "8"), _CLASSIFIERS[0]), (("3", "4", "6"), _CLASSIFIERS[1]))


def can_convert(names: Collection[str]) -> bool:
    """Whether tensors of these names are this repository's DeepLabV3+, on any of its encoders."""
    return _ASPP in names and _LOW_LEVEL in names and any(classifier in names for classifier in _CLASSIFIERS)


def convert(tensors: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """Return the model under our names; raises WeightsError for its MobileNetV2 and Xception."""
    encoder = _encoder(tensors, path)
    is_resnet = encoder != "drnd54"
    places, classifier = next(one for one in _SECOND if one[1] in tensors)
    stem = tensors["backbone.conv1.weight" if is_resnet else "backbone.layer0.0.weight"]
    config = DeepLabConfig(
        architecture="deeplabv3plus",
        encoder=encoder,
        num_classes=max(2, tensors[classifier].shape[0]),
        in_chans=stem.shape[1],
        output_stride=16 if is_resnet else 8,
        multi_grid=(1, 2, 4) if is_resnet else None,
        dropout=0.5,
        aspp_separable=False,
        decoder_separable=False,
        align_corners=True,
        encoder_dilate_strided=is_resnet,
    )
    second: Rules = (
        (rf"decoder\.last_conv\.{places[0]}\.(\w+)", r"head.decoder.1.conv.\1"),
        (rf"decoder\.last_conv\.{places[1]}\.(\w+)", r"head.decoder.1.norm.\1"),
        (rf"decoder\.last_conv\.{places[2]}\.(\w+)", r"head.classifier.\1"),
    )
    return converted_checkpoint(
        FORMAT_NAME,
        config=config,
        state_dict=rename(tensors, (*_RULES, *second), FORMAT_NAME),
        datasets=("voc", "cityscapes"),
        preprocessing=_PREPROCESSING,
        notes=(f"output stride {config.output_stride} assumed, as in the published files",),
    )


def _encoder(tensors: Mapping[str, Tensor], path: Path) -> str:
    for name, reason in _UNSUPPORTED.items():
        if name in tensors:
            raise WeightsError(
                f"'{path}' is jfzhang95's DeepLab on {reason}: no encoder here computes that, and the weights would give other "
                "labels; its ResNet and DRN can be read."
            )
    if "backbone.layer8.0.weight" in tensors and "backbone.layer5.5.conv3.weight" in tensors:
        return "drnd54"
    blocks = {name.split(".")[2] for name in tensors if name.startswith("backbone.layer3.")}
    if len(blocks) not in _RESNETS or "backbone.layer4.0.conv3.weight" not in tensors:
        raise WeightsError(
            f"'{path}' is jfzhang95's DeepLab on an encoder that has no equivalent here; ResNet-50/101 and DRN-D-54 do."
        )
    return _RESNETS[len(blocks)]
