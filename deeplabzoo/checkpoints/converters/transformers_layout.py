"""The names of transformers' MobileNetV2, MobileViT and MobileViTv2 with a DeepLabV3 head, and ours."""

from collections.abc import Mapping
from typing import Any

import torch

from deeplabzoo.checkpoints.converters.key_mapping import Rules
from deeplabzoo.models.config import DeepLabConfig

_BLOCKS = (2, 3, 4, 3, 3, 1)
"""Blocks of MobileNetV2's stages after the first one (1801.04381, table 2), which transformers numbers through."""
_CONVOLUTIONAL_STAGES = 2
"""Stages of a MobileViT before the first with attention (2110.02178, table 4)."""
_ATTENTION_PARTS = {
    "mobilevit": {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        r"attention\.qkv": "attn.qkv",
        r"attention\.output\.dense": "attn.proj",
        r"intermediate\.dense": "mlp.fc1",
        r"output\.dense": "mlp.fc2",
    },
    "mobilevitv2": {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        r"attention\.qkv_proj\.convolution": "attn.qkv_proj",
        r"attention\.out_proj\.convolution": "attn.out_proj",
        r"ffn\.conv1\.convolution": "mlp.fc1",
        r"ffn\.conv2\.convolution": "mlp.fc2",
    },
}


def fuse_qkv(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with every query, key and value stacked in this order, as one `qkv`."""
    joined = dict(tensors)
    for name in tensors:
        before, query, kind = name.partition(".attention.attention.query.")
        if query:
            parts = [joined.pop(f"{before}.attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            joined[f"{before}.attention.qkv.{kind}"] = torch.cat(parts)
    return joined


def split_qkv(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with every `qkv` cut into query, key and value: the way back of `fuse_qkv`."""
    separate = dict(tensors)
    for name in tensors:
        before, joined, kind = name.partition(".attention.qkv.")
        if joined:
            parts = separate.pop(name).chunk(3)
            for part, tensor in zip(("query", "key", "value"), parts, strict=True):
                separate[f"{before}.attention.attention.{part}.{kind}"] = tensor
    return separate


def _layer(theirs: str, ours: str, convolution: str = ".conv", norm: str = ".bn") -> Rules:
    """Return the rules for a convolution and the batch norm after it."""
    return [
        (rf"{theirs}\.convolution\.(?P<kind>\w+)", rf"{ours}{convolution}.\g<kind>"),
        (rf"{theirs}\.normalization\.(?P<kind>\w+)", rf"{ours}{norm}.\g<kind>"),
    ]


def _head_layer(theirs: str, ours: str) -> Rules:
    return _layer(rf"segmentation_head\.{theirs}", rf"head.{ours}", norm=".norm")


def mobilenetv2_rules() -> Rules:
    """Return the rules of `mobilenet_v2`: encoder and head."""
    stem = r"mobilenet_v2\.conv_stem"
    rules = [
        *_layer(rf"{stem}\.first_conv", "encoder", ".conv_stem", ".bn1"),
        *_layer(rf"{stem}\.conv_3x3", "encoder.blocks.0.0", ".conv_dw", ".bn1"),
        *_layer(rf"{stem}\.reduce_1x1", "encoder.blocks.0.0", ".conv_pw", ".bn2"),
        (r"mobilenet_v2\.conv_1x1\..+", None),
        *_head_layer("conv_aspp", "aspp.branches.0"),
        *_head_layer("conv_pool", "aspp.pool"),
        *_head_layer("conv_projection", "aspp.project"),
        (r"segmentation_head\.classifier\.convolution\.(\w+)", r"head.classifier.\1"),
    ]
    places = [(stage, block) for stage, count in enumerate(_BLOCKS, start=1) for block in range(count)]
    for index, (stage, block) in enumerate(places):
        for order, (theirs, ours) in enumerate((("expand_1x1", "pw"), ("conv_3x3", "dw"), ("reduce_1x1", "pwl")), start=1):
            theirs = rf"mobilenet_v2\.layer\.{index}\.{theirs}"
            rules += _layer(theirs, f"encoder.blocks.{stage}.{block}", f".conv_{ours}", f".bn{order}")
    return rules


def mobilevit_rules(model_type: str) -> Rules:
    """Return the rules of `mobilevit` or `mobilevitv2`: encoder without attention, attention, head."""
    stage = rf"{model_type}\.encoder\.layer\.(\d)"
    block, attention = r"encoder.stages_\1.1", rf"{stage}\.transformer\.layer\.(\d)"
    rules = [
        *_layer(rf"{model_type}\.conv_stem", "encoder.stem"),
        *_layer(rf"{stage}\.conv_kxk", rf"{block}.conv_kxk"),
        *_layer(rf"{stage}\.conv_1x1", rf"{block}.conv_1x1", ""),
        *_layer(rf"{stage}\.conv_projection", rf"{block}.conv_proj"),
        *_layer(rf"{stage}\.fusion", rf"{block}.conv_fusion"),
        (rf"{stage}\.layernorm\.(\w+)", rf"{block}.norm.\2"),
        *_head_layer(r"aspp\.convs\.([0-3])", r"aspp.branches.\1"),
        *_head_layer(r"aspp\.convs\.4\.conv_1x1", "aspp.pool"),
        *_head_layer(r"aspp\.project", "aspp.project"),
        (r"segmentation_head\.classifier\.convolution\.(\w+)", r"head.classifier.\1"),
    ]
    for theirs, ours in (("expand_1x1", "conv1_1x1"), ("conv_3x3", "conv2_kxk"), ("reduce_1x1", "conv3_1x1")):
        for place in range(_CONVOLUTIONAL_STAGES):
            rules += _layer(
                rf"{model_type}\.encoder\.layer\.{place}\.layer\.(\d)\.{theirs}", rf"encoder.stages_{place}.\1.{ours}"
            )
        rules += _layer(rf"{stage}\.downsampling_layer\.{theirs}", rf"encoder.stages_\1.0.{ours}")
    parts = _ATTENTION_PARTS[model_type]
    return [
        *rules,
        *((rf"{attention}\.{theirs}\.(\w+)", rf"{block}.transformer.\2.{ours}.\3") for theirs, ours in parts.items()),
    ]


# What transformers' networks with a DeepLabV3 head compute, in our terms, given the settings of a `config.json`.


def mobilenetv2_config(
    encoder: str, settings: Mapping[str, Any], *, num_classes: int, in_chans: int, head_channels: int
) -> DeepLabConfig:
    """Return MobileNetV2's; what `settings` lacks is as in Google's published checkpoint."""
    return DeepLabConfig(
        architecture="deeplabv3",
        encoder=encoder,
        num_classes=num_classes,
        in_chans=in_chans,
        output_stride=settings.get("output_stride", 8),
        atrous_rates=(),
        head_channels=head_channels,
        pooling_first=True,
        refine_conv=False,
        align_corners=True,
        encoder_padding="same" if settings.get("tf_padding", True) else "symmetric",
        encoder_norm_eps=settings.get("layer_norm_eps", 1e-3),
    )


def mobilevit_config(
    encoder: str, settings: Mapping[str, Any], *, num_classes: int, in_chans: int, head_channels: int
) -> DeepLabConfig:
    """Return MobileViT's or MobileViTv2's; what `settings` lacks is as in Apple's published checkpoints."""
    return DeepLabConfig(
        architecture="deeplabv3",
        encoder=encoder,
        num_classes=num_classes,
        in_chans=in_chans,
        output_stride=settings.get("output_stride", 16),
        atrous_rates=tuple(settings.get("atrous_rates", (6, 12, 18))),
        head_channels=head_channels,
        refine_conv=False,
        # in timm the last feature of a MobileViT is a convolution after the last stage; v2 has none
        encoder_final_conv=None if encoder.startswith("mobilevitv2_") else False,
        encoder_dilate_local_conv=False,
    )
