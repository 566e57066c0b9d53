"""DeepLabs of segmentation_models_pytorch (SMP), told by the names of their decoder and head.

The state dict has no output stride, rates nor, for timm encoders, a name: they are read from the `config.json` that SMP's
`save_pretrained` writes beside the file, and are SMP's defaults where there is none (V3: stride 8; V3+: 16; rates 12, 24, 36
at either). The arithmetic differs from the papers' in ways that are fields of the configuration:

- separable convolutions have neither norm nor ReLU after their depthwise half;
- V3+ has a 3x3 convolution after ASPP and one, not two, after the concatenation;
- features and logits are enlarged with aligned corners;
- SMP dilates every convolution of a stage itself, the one that lost its stride included (its `tu-` encoders: timm does);
- its MobileNetV2 ends in the 1x1 convolution of 1280 channels.

A head of one channel, SMP's default, is a yes or no through a sigmoid. It becomes two classes, the first one's logit always
0: softmax and arg-max of the two are the sigmoid and its threshold of one half.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from deeplabzoo.checkpoints.converters.key_mapping import (
    ExportedCheckpoint,
    Rules,
    check_same_arithmetic,
    converted_checkpoint,
    drop_auxiliary,
    invert_rules,
    read_config_json,
    rename,
)
from deeplabzoo.checkpoints.converters.smp_encoders import SMPEncoder, find_encoder, smp_encoder_of
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.config import Architecture, DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.heads import resolve_atrous_rates

# The names of SMP's DeepLab decoders and segmentation head, and ours.


_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def head_rules(config: DeepLabConfig) -> Rules:
    """Return the rules that turn the names of decoder and head into ours; in V3+ ASPP is the first of a Sequential."""
    aspp = r"decoder\.aspp\.0" if config.architecture == "deeplabv3plus" else r"decoder\.aspp"
    norm = "pointwise.norm" if config.aspp_separable else "norm"
    return (
        (rf"{aspp}\.convs\.0\.0\.weight", "head.aspp.branches.0.conv.weight"),
        (rf"{aspp}\.convs\.0\.1\.{_NORM}", r"head.aspp.branches.0.norm.\1"),
        (rf"{aspp}\.convs\.([123])\.0\.weight", r"head.aspp.branches.\1.conv.weight"),
        (rf"{aspp}\.convs\.([123])\.0\.0\.weight", r"head.aspp.branches.\1.depthwise.conv.weight"),
        (rf"{aspp}\.convs\.([123])\.0\.1\.weight", r"head.aspp.branches.\1.pointwise.conv.weight"),
        (rf"{aspp}\.convs\.([123])\.1\.{_NORM}", rf"head.aspp.branches.\1.{norm}.\2"),
        (rf"{aspp}\.convs\.4\.1\.weight", "head.aspp.pool.conv.weight"),
        (rf"{aspp}\.convs\.4\.2\.{_NORM}", r"head.aspp.pool.norm.\1"),
        (rf"{aspp}\.project\.0\.weight", "head.aspp.project.conv.weight"),
        (rf"{aspp}\.project\.1\.{_NORM}", r"head.aspp.project.norm.\1"),
        (r"decoder\.conv\.weight", "head.refine.conv.weight"),
        (rf"decoder\.bn\.{_NORM}", r"head.refine.norm.\1"),
        (r"decoder\.aspp\.1\.0\.weight", "head.refine.depthwise.conv.weight"),
        (r"decoder\.aspp\.1\.1\.weight", "head.refine.pointwise.conv.weight"),
        (rf"decoder\.aspp\.2\.{_NORM}", r"head.refine.pointwise.norm.\1"),
        (r"decoder\.block1\.0\.weight", "head.low_level.conv.weight"),
        (rf"decoder\.block1\.1\.{_NORM}", r"head.low_level.norm.\1"),
        (r"decoder\.block2\.0\.0\.weight", "head.decoder.0.depthwise.conv.weight"),
        (r"decoder\.block2\.0\.1\.weight", "head.decoder.0.pointwise.conv.weight"),
        (rf"decoder\.block2\.1\.{_NORM}", r"head.decoder.0.pointwise.norm.\1"),
        (r"segmentation_head\.0\.(weight|bias)", r"head.classifier.\1"),
    )


FORMAT_NAME = "segmentation_models_pytorch"

_HEAD = "segmentation_head.0.weight"
_CLASSES: Mapping[Architecture, str] = {"deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3Plus"}


def can_convert(names: Collection[str]) -> bool:
    """Whether tensors of these names are those of an SMP model."""
    return _HEAD in names and any(name.startswith("decoder.") for name in names)


def convert(tensors: Mapping[str, torch.Tensor], path: Path) -> Checkpoint:
    """Return the network under our names; raises WeightsError for SMP's other models and for encoders without an equal."""
    own = {_current_name(name): tensor for name, tensor in tensors.items()}
    settings = _settings(path, _architecture(own))
    try:
        config, encoder, assumed = _describe(own, settings)
    except (TypeError, UsageError) as error:
        raise WeightsError(f"The config.json beside '{path}' describes no network that could exist: {error}") from None
    state = rename(own, (*head_rules(config), (r"classification_head\..*", None), *encoder.rules), FORMAT_NAME)
    return converted_checkpoint(
        FORMAT_NAME,
        config,
        state,
        _preprocessing(encoder),
        datasets=None,
        dropped=_dropped(own, settings),
        notes=assumed,
    )


def export(net: DeepLab) -> ExportedCheckpoint:
    """Return the network under SMP's names; raises WeightsError where no DeepLab of SMP computes the same."""
    config = net.config
    encoder = smp_encoder_of(config)
    rates = resolve_atrous_rates(config)
    theirs = _config(
        encoder,
        architecture=config.architecture,
        num_classes=config.num_classes,
        output_stride=config.output_stride if config.output_stride in (8, 16) else 16,
        atrous_rates=rates if len(rates) == 3 else (12, 24, 36),
        dropout=config.dropout,
        channels=config.head_channels,
        aspp_separable=config.architecture == "deeplabv3plus" if config.aspp_separable is None else config.aspp_separable,
    )
    check_same_arithmetic(config, theirs, FORMAT_NAME)
    settings = {
        "encoder_name": encoder.smp_name,
        "encoder_depth": 5,
        "encoder_weights": None,
        "encoder_output_stride": config.output_stride,
        "decoder_channels": config.head_channels,
        "decoder_atrous_rates": list(rates),
        "decoder_aspp_separable": theirs.aspp_separable,
        "decoder_aspp_dropout": config.dropout,
        "in_channels": config.in_chans,
        "classes": config.num_classes,
        "activation": None,
        "upsampling": config.output_stride if config.architecture == "deeplabv3" else 4,
        "aux_params": None,
    }
    name = _CLASSES[config.architecture]
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    lost = ("auxiliary head left out",) if config.aux_head else ()
    return ExportedCheckpoint(
        state_dict=rename(drop_auxiliary(net.state_dict()), invert_rules((*head_rules(theirs), *encoder.rules)), FORMAT_NAME),
        build=f"segmentation_models_pytorch.{name}({arguments})",
        folder="segmentation_models_pytorch.from_pretrained({folder})",
        settings={"config.json": {"_model_class": name, **settings}},
        notes=(*lost, "class names and preprocessing have no place there"),
    )


def _config(
    encoder: SMPEncoder,
    *,
    architecture: Architecture,
    num_classes: int,
    output_stride: int,
    atrous_rates: tuple[int, ...],
    dropout: float,
    channels: int,
    aspp_separable: bool,
) -> DeepLabConfig:
    """Return what SMP builds on an encoder with these options."""
    return DeepLabConfig(
        architecture=architecture,
        encoder=encoder.name,
        num_classes=num_classes,
        in_chans=encoder.in_chans,
        output_stride=output_stride,
        atrous_rates=atrous_rates,
        dropout=dropout,
        head_channels=channels,
        aspp_separable=aspp_separable,
        depthwise_norm=False,
        decoder_channels=channels,
        decoder_convs=1,
        decoder_refine_conv=architecture == "deeplabv3plus",
        align_corners=True,
        encoder_dilate_strided=encoder.dilates_strided,
        encoder_final_conv=encoder.has_final_conv or None,
    )


def _current_name(name: str) -> str:
    """Return the name that SMP since 0.4 gives to a tensor of its earlier V3 decoder, which was a Sequential."""
    for old, new in (("decoder.0.", "decoder.aspp."), ("decoder.1.", "decoder.conv."), ("decoder.2.", "decoder.bn.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _architecture(names: Collection[str]) -> Architecture:
    if "decoder.aspp.convs.0.0.weight" in names and "decoder.conv.weight" in names:
        return "deeplabv3"
    if "decoder.aspp.0.convs.0.0.weight" in names and "decoder.block1.0.weight" in names:
        return "deeplabv3plus"
    raise WeightsError(
        f"These are weights of another {FORMAT_NAME} model than DeepLabV3 and DeepLabV3Plus; its decoder is unknown."
    )


def _settings(path: Path, architecture: Architecture) -> Mapping[str, Any]:
    """Return the `config.json` beside a file where it is SMP's; raises WeightsError where it is of another SMP model."""
    settings = read_config_json(path)
    if not isinstance(settings.get("encoder_name"), str):
        return {}
    told = settings.get("_model_class", _CLASSES[architecture])
    if told != _CLASSES[architecture]:
        raise WeightsError(
            f"'{path.with_name('config.json')}' is of a {told}, but the weights beside it are of a {_CLASSES[architecture]}."
        )
    return settings


def _describe(
    tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> tuple[DeepLabConfig, SMPEncoder, tuple[str, ...]]:
    """Return the configuration, the encoder and what was assumed for want of a `config.json`."""
    architecture = _architecture(tensors)
    is_v3 = architecture == "deeplabv3"
    aspp = "decoder.aspp" if is_v3 else "decoder.aspp.0"
    reads = tensors[f"{aspp}.convs.0.0.weight"]
    stride = settings.get("encoder_output_stride", 8 if is_v3 else 16)
    encoder = find_encoder(tensors, settings.get("encoder_name"), stride, reads.shape[1])
    config = _config(
        encoder,
        architecture=architecture,
        num_classes=max(2, tensors[_HEAD].shape[0]),
        output_stride=stride,
        atrous_rates=tuple(settings.get("decoder_atrous_rates", (12, 24, 36))),
        dropout=settings.get("decoder_aspp_dropout", 0.5),
        channels=reads.shape[0],
        aspp_separable=f"{aspp}.convs.1.0.1.weight" in tensors,
    )
    assumed = () if settings else (f"no config.json beside it: output stride {stride} and rates 12, 24, 36 assumed",)
    return config, encoder, (*encoder.notes, *assumed)


def _preprocessing(encoder: SMPEncoder) -> Preprocessing:
    """Return what SMP's `get_preprocessing_params` says of the encoder's ImageNet weights; SMP resizes nothing by itself."""
    plain = Preprocessing(size=(512, 512), resize="none")
    published = None if encoder.dilates_strided else timm.get_pretrained_cfg(encoder.name)
    if published is None:
        return plain
    return Preprocessing.from_dict({**plain.to_dict(), "mean": published.mean, "std": published.std})


def _dropped(own: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> tuple[str, ...]:
    dropped = []
    if any(name.startswith("classification_head.") for name in own):
        dropped.append("classification head")
    if settings.get("activation"):
        dropped.append(f"activation {settings['activation']}")
    return tuple(dropped)
