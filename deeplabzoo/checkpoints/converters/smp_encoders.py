"""The encoders of segmentation_models_pytorch: which of ours each one is, and what its tensors are called here.

Three kinds have an equal: torchvision's ResNets and ResNeXts, torchvision's MobileNetV2, and timm's encoders (`tu-…`). Which
one a file holds is what its `config.json` says, or else what the number and shapes of its tensors say.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from deeplabzoo.checkpoints.converters.key_mapping import Rules
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.encoder_surgery import TrailingPadConv2d
from deeplabzoo.models.encoder_table import ALIASES, check_output_stride, encoder_info, list_encoders
from deeplabzoo.models.encoders import build_feature_extractor

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

    Raises WeightsError where we have no equal, UsageError for a name or stride that does not exist.
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
            f"deeplabzoo has no equal of (tensor '{some}'); its ResNets, ResNeXts, mobilenet_v2 and tu-… encoders can be read."
        )
    expected = _MOBILENET_CHANNELS if encoder.has_final_conv else encoder_info(encoder.name).channels[-1]
    if channels != expected:
        raise WeightsError(
            f"Its ASPP reads {channels} channels and {encoder.name} ends in {expected}: an SMP network with encoder_depth "
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
