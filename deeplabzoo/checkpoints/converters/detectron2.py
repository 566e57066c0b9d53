"""detectron2's DeepLab project: DeepLabV3 and DeepLabV3+ on its R-103, a ResNet-101 with three 3x3 convolutions as stem.

The files are pickles of numpy arrays, of which nothing is run (array_pickle.py), or PyTorch's. Convolutions are plain, the
pooled branch has a bias and no batch norm, V3 has no 3x3 after ASPP, V3+ puts the low-level feature first. The last stage has
multi-grid (1, 2, 4). The pooled branch averages over a window as large as the training crop, 512 x 1024, not over the map: on
whole Cityscapes images of twice that size it differs from place to place.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from deeplabzoo.checkpoints.converters.key_mapping import Rules, converted_checkpoint, rename
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

FORMAT_NAME = "detectron2"

_CLASSIFIER, _STEM = "sem_seg_head.predictor.weight", "backbone.stem.conv1.weight"
_V3, _V3PLUS = "sem_seg_head.aspp.convs.0.weight", "sem_seg_head.decoder.res5.project_conv.convs.0.weight"
_FUSION = "sem_seg_head.decoder.res2.fuse_conv.1.weight"
_RESNETS = {6: "resnet50s", 23: "resnet101s"}
"""By the number of blocks in the third stage (1512.03385, table 1)."""
_PREPROCESSING = Preprocessing(size=(1024, 2048), only_shrink=False)

_STEM_NAMES = {1: ("conv1.0", "conv1.1"), 2: ("conv1.3", "conv1.4"), 3: ("conv1.6", "bn1")}


def can_convert(names: Collection[str]) -> bool:
    """Whether tensors of these names are one of the project's two models, on any of its encoders."""
    return _CLASSIFIER in names and _STEM in names and (_V3 in names or _V3PLUS in names)


def convert(tensors: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """Return the model under our names; raises WeightsError for other encoders and for separable or deeper decoders."""
    is_v3 = _V3 in tensors
    encoder = _encoder(tensors, path)
    if not is_v3 and (_FUSION not in tensors or any(name.startswith("sem_seg_head.decoder.res3.") for name in tensors)):
        raise WeightsError(f"'{path}' is a DeepLabV3+ of detectron2 with another decoder than two 3x3 convolutions on one map.")
    num_classes = max(2, tensors[_CLASSIFIER].shape[0])
    config = DeepLabConfig(
        architecture="deeplabv3" if is_v3 else "deeplabv3plus",
        encoder=encoder,
        num_classes=num_classes,
        in_chans=tensors[_STEM].shape[1],
        output_stride=16,
        multi_grid=(1, 2, 4),
        aspp_separable=False,
        pooling_norm=False,
        pooling_window=(512, 1024),
        refine_conv=not is_v3,
        decoder_separable=is_v3,
        decoder_low_level_first=not is_v3,
        encoder_dilate_strided=True,
    )
    return converted_checkpoint(
        FORMAT_NAME,
        config=config,
        state_dict=rename(tensors, _rules("aspp" if is_v3 else "decoder.res5.project_conv"), FORMAT_NAME),
        datasets=("cityscapes", "voc", "ade20k"),
        preprocessing=_PREPROCESSING,
        notes=("output stride 16, multi-grid 1, 2, 4 and crops of 512 x 1024 assumed, as in the published files",),
    )


def _encoder(tensors: Mapping[str, Tensor], path: Path) -> str:
    blocks = {name.split(".")[2] for name in tensors if name.startswith("backbone.res4.")}
    is_deep = "backbone.stem.conv3.weight" in tensors and "backbone.res5.0.conv3.weight" in tensors
    if not is_deep or len(blocks) not in _RESNETS:
        raise WeightsError(
            f"'{path}' is a DeepLab of detectron2 on an encoder that cannot be read; its ResNets with three 3x3 as stem can."
        )
    return _RESNETS[len(blocks)]


def _layer(theirs: str, ours: str, convolution: str = ".conv", norm: str = ".norm") -> Rules:
    """Return the rules for a convolution and the batch norm inside it."""
    return [
        (rf"{theirs}\.(?P<kind>weight|bias)", rf"{ours}{convolution}.\g<kind>"),
        (rf"{theirs}\.norm\.(?P<kind>\w+)", rf"{ours}{norm}.\g<kind>"),
    ]


def _rules(aspp: str) -> Rules:
    rules: list[tuple[str, str | None]] = [(r"pixel_(?:mean|std)", None)]
    for number, (convolution, norm) in _STEM_NAMES.items():
        rules += _layer(rf"backbone\.stem\.conv{number}", "encoder", f".{convolution}", f".{norm}")
    for stage in range(1, 5):
        theirs, ours = rf"backbone\.res{stage + 1}\.(\d+)", rf"encoder.layer{stage}.\1"
        rules += _layer(rf"{theirs}\.shortcut", ours, ".downsample.0", ".downsample.1")
        for number in (1, 2, 3):
            rules += _layer(rf"{theirs}\.conv{number}", ours, f".conv{number}", f".bn{number}")
    head = r"sem_seg_head\." + aspp.replace(".", r"\.")
    return [
        *rules,
        *_layer(rf"{head}\.convs\.([0-3])", r"head.aspp.branches.\1"),
        (rf"{head}\.convs\.4\.1\.(weight|bias)", r"head.aspp.pool.conv.\1"),
        *_layer(rf"{head}\.project", "head.aspp.project"),
        *_layer(r"sem_seg_head\.decoder\.res2\.project_conv", "head.low_level"),
        *_layer(r"sem_seg_head\.decoder\.res2\.fuse_conv\.([01])", r"head.decoder.\1"),
        (r"sem_seg_head\.predictor\.(weight|bias)", r"head.classifier.\1"),
    ]
