"""DeepLabs of segmentation_models_pytorch (SMP), recognised by the names of their decoder and head.

The state dict has no output stride, rates nor, for timm encoders, a name: they are read from the `config.json` that SMP's
`save_pretrained` writes beside the file, and are SMP's defaults where there is none (V3: stride 8; V3+: 16; rates 12, 24, 36
at either). The arithmetic differs from the papers' in ways that are fields of the configuration:

- separable convolutions have neither norm nor ReLU after their depthwise half;
- V3+ has a 3x3 convolution after ASPP and one, not two, after the concatenation;
- features and logits are upsampled with aligned corners;
- SMP dilates every convolution of a stage itself, the one that lost its stride included (its `tu-` encoders: timm does);
- its MobileNetV2 ends in the 1x1 convolution of 1280 channels.

A head of one channel, SMP's default, is a yes or no through a sigmoid. It becomes two classes, the first one's logit always
0: softmax and arg-max of the two are the sigmoid and its threshold of one half.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

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
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.config import Architecture, DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_surgery import TrailingPadConv2d
from deeplabzoo.models.encoder_table import ALIASES, check_output_stride, encoder_info, list_encoders
from deeplabzoo.models.encoders import build_feature_extractor
from deeplabzoo.models.heads import resolve_atrous_rates

# The encoders: torchvision's ResNets, ResNeXts and MobileNetV2, and timm's (`tu-…`).

RESNETS = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"resnext{size}" for size in ("50_32x4d", "101_32x4d", "101_32x8d", "101_32x16d")),
)
"""SMP's own ResNets under the names that timm has for them too."""
_TIMM = "tu-"
_MOBILENET, _MOBILENET_CHANNELS = "mobilenetv2_100", 1280
_BLOCKS = (2, 3, 4, 3, 3, 1)
"""Blocks of MobileNetV2's stages after the first (1801.04381, table 2), which torchvision numbers through."""
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class SMPEncoder:
    """An encoder of SMP in our terms."""

    name: str
    """Canonical name of ours."""
    smp_name: str
    in_chans: int
    rules: Rules
    """Its tensors' names to ours."""
    dilates_strided: bool
    has_final_conv: bool = False
    notes: tuple[str, ...] = ()


def find_encoder(tensors: Mapping[str, torch.Tensor], smp_name: str | None, output_stride: int, channels: int) -> SMPEncoder:
    """Return the encoder of an SMP state dict; `smp_name` is None where no `config.json` tells it, `channels` what ASPP reads.

    Raises WeightsError where we have no equivalent, UsageError for a name or stride that does not exist.
    """
    if any(name.startswith("encoder.model.") for name in tensors):
        encoder = _timm(tensors, smp_name, output_stride)
    elif "encoder.features.18.0.weight" in tensors and "encoder.features.1.conv.2.weight" in tensors:
        encoder = _smp_mobilenet(tensors["encoder.features.0.0.weight"].shape[1])
    elif "encoder.conv1.weight" in tensors and "encoder.layer4.0.conv1.weight" in tensors:
        encoder = _resnet(tensors)
    else:
        some = next((name for name in tensors if name.startswith("encoder.")), "none")
        raise WeightsError(
            f"This DeepLab of segmentation_models_pytorch is on {f'its encoder {smp_name}' if smp_name else 'an encoder'} that "
            f"deeplabzoo has no equivalent of (tensor '{some}'); its ResNets, ResNeXts, mobilenet_v2 and tu-… ones can be read."
        )
    expected = _MOBILENET_CHANNELS if encoder.has_final_conv else encoder_info(encoder.name).channels[-1]
    if channels != expected:
        raise WeightsError(
            f"Its ASPP reads {channels} channels and {encoder.name} ends in {expected}: an SMP model with encoder_depth "
            "below 5, which deeplabzoo has not."
        )
    return encoder


def smp_encoder_of(config: DeepLabConfig) -> SMPEncoder:
    """Return the encoder of SMP that computes what a configuration's does, or comes nearest to it.

    Raises WeightsError for encoders that are not timm's, and where SMP shifts features.
    """
    if config.encoder in RESNETS and config.encoder_dilate_strided:
        return _smp_resnet(config.encoder, config.in_chans)
    if config.encoder == _MOBILENET and config.encoder_final_conv:
        return _smp_mobilenet(config.in_chans)
    if encoder_info(config.encoder).family == "drn":
        raise WeightsError(f"segmentation_models_pytorch has no encoder {config.encoder}.")
    _timm_on_meta(config.encoder, config.output_stride)
    return _timm_encoder(config.encoder, config.in_chans)


def _smp_resnet(name: str, in_chans: int) -> SMPEncoder:
    rules = ((r"encoder\.(conv1|bn1|layer[1-4])\.(.+)", r"encoder.\1.\2"),)
    return SMPEncoder(name=name, smp_name=name, in_chans=in_chans, rules=rules, dilates_strided=True)


def _smp_mobilenet(in_chans: int) -> SMPEncoder:
    return SMPEncoder(
        name=_MOBILENET,
        smp_name="mobilenet_v2",
        in_chans=in_chans,
        rules=_mobilenetv2_rules(),
        dilates_strided=True,
        has_final_conv=True,
    )


def _timm_encoder(name: str, in_chans: int, notes: tuple[str, ...] = ()) -> SMPEncoder:
    rules = ((r"encoder\.model\.(.+)", r"encoder.\1"),)
    return SMPEncoder(name=name, smp_name=f"{_TIMM}{name}", in_chans=in_chans, rules=rules, dilates_strided=False, notes=notes)


def _timm_on_meta(name: str, output_stride: int) -> nn.Module:
    """Return timm's encoder, shapes only; raises WeightsError where SMP shifts its features."""
    with torch.device("meta"):
        encoder = build_feature_extractor(name, output_stride)
    if any(isinstance(module, TrailingPadConv2d) for module in encoder.modules()):
        raise WeightsError(
            f"At output stride {output_stride} segmentation_models_pytorch shifts the features of {name} (timm pads dilated "
            "even kernels on both sides) and deeplabzoo does not, so these weights would not give what they gave."
        )
    return encoder


def _resnet(tensors: Mapping[str, torch.Tensor]) -> SMPEncoder:
    stem = tensors["encoder.conv1.weight"]
    count = _parameters(tensors, "encoder.") - stem.numel() + stem[:, :1].numel() * 3
    name = next((name for name in RESNETS if encoder_info(name).params == count), None)
    if name is None:
        raise WeightsError(
            f"No ResNet of segmentation_models_pytorch that deeplabzoo knows has {count} parameters, as this encoder has."
        )
    return _smp_resnet(name, stem.shape[1])


def _timm(tensors: Mapping[str, torch.Tensor], smp_name: str | None, output_stride: int) -> SMPEncoder:
    prefix = "encoder.model."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    notes: tuple[str, ...] = ()
    if smp_name is not None:
        name = check_output_stride(smp_name.removeprefix(_TIMM).split(".")[0], output_stride).name
    else:
        name, *others = _match_encoders(own, _parameters(tensors, prefix), output_stride)
        if others:
            notes = (f"encoder {name} assumed ({', '.join(others)} have the same tensors; a config.json beside it would tell)",)
    encoder = _timm_on_meta(name, output_stride)
    shapes = {key: tensor.shape for key, tensor in encoder.state_dict().items()}
    stem = next(
        (key for key, tensor in own.items() if tensor.ndim == 4 and tensor.shape[1] != shapes.get(key, (0, 0))[1]), None
    )
    in_chans = 3 if stem is None else own[stem].shape[1]
    return _timm_encoder(name, in_chans, notes)


def _match_encoders(own: Mapping[str, torch.Tensor], parameters: int, output_stride: int) -> list[str]:
    """Return the encoders whose tensors these are: those with a short name first, then the shorter names."""
    shapes = {name: tensor.shape for name, tensor in own.items()}
    fitting = []
    for name in list_encoders(output_stride=output_stride):
        if encoder_info(name).params == parameters:
            with torch.device("meta"):
                state = build_feature_extractor(name, output_stride).state_dict()
            if {key: tensor.shape for key, tensor in state.items()} == shapes:
                fitting.append(name)
    if not fitting:
        raise WeightsError(
            "No timm encoder that can be dilated has the tensors of this tu-… encoder; a config.json as save_pretrained writes "
            "it, beside the file, would name it."
        )
    return sorted(fitting, key=lambda name: (name not in ALIASES.values(), len(name), name))


def _parameters(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    return sum(
        tensor.numel() for name, tensor in tensors.items() if name.startswith(prefix) and name.split(".")[-1] not in _BUFFERS
    )


def _mobilenetv2_rules() -> Rules:
    """Turn torchvision's numbering of MobileNetV2 into timm's stages and blocks."""
    kind = r"(\w+)"
    rules = [
        (rf"encoder\.features\.0\.0\.{kind}", r"encoder.conv_stem.\1"),
        (rf"encoder\.features\.0\.1\.{kind}", r"encoder.bn1.\1"),
        (rf"encoder\.features\.1\.conv\.0\.0\.{kind}", r"encoder.blocks.0.0.conv_dw.\1"),
        (rf"encoder\.features\.1\.conv\.0\.1\.{kind}", r"encoder.blocks.0.0.bn1.\1"),
        (rf"encoder\.features\.1\.conv\.1\.{kind}", r"encoder.blocks.0.0.conv_pw.\1"),
        (rf"encoder\.features\.1\.conv\.2\.{kind}", r"encoder.blocks.0.0.bn2.\1"),
        (rf"encoder\.features\.18\.0\.{kind}", r"encoder.conv_head.\1"),
        (rf"encoder\.features\.18\.1\.{kind}", r"encoder.bn2.\1"),
    ]
    places = [(stage, block) for stage, blocks in enumerate(_BLOCKS, 1) for block in range(blocks)]
    layers = ((r"0\.0", "conv_pw"), (r"0\.1", "bn1"), (r"1\.0", "conv_dw"), (r"1\.1", "bn2"), ("2", "conv_pwl"), ("3", "bn3"))
    for index, (stage, block) in enumerate(places, 2):
        for layer, ours in layers:
            rules.append((rf"encoder\.features\.{index}\.conv\.{layer}\.{kind}", rf"encoder.blocks.{stage}.{block}.{ours}.\1"))
    return rules


# Decoder, head and settings.
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
    """Return the model under our names; raises WeightsError for SMP's other models and for encoders without an equivalent."""
    own = {_current_name(name): tensor for name, tensor in tensors.items()}
    settings = _settings(path, _architecture(own))
    try:
        config, encoder, assumed = _describe(own, settings)
    except (TypeError, UsageError) as error:
        raise WeightsError(f"The config.json beside '{path}' describes no model that could exist: {error}") from None
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
    """Return the model under SMP's names; raises WeightsError where no DeepLab of SMP computes the same."""
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
    named = settings.get("_model_class", _CLASSES[architecture])
    if named != _CLASSES[architecture]:
        raise WeightsError(
            f"'{path.with_name('config.json')}' is of a {named}, but the weights beside it are of a {_CLASSES[architecture]}."
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
    """Return what SMP's `get_preprocessing_params` states for the encoder's ImageNet weights; SMP itself resizes nothing."""
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
