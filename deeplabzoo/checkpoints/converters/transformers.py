"""Hugging Face transformers' DeepLabs: MobileNetV2 (Google), MobileViT and MobileViTv2 (Apple), by tensor names.

All three have DeepLabV3 heads without the 3x3 convolution after ASPP, whatever their classes are called. What tensors do not
tell is read from the `config.json` beside the file, and is that of the published checkpoints where there is none.

- MobileNetV2: TensorFlow's padding, epsilon 1e-3 in the encoder and 1e-5 in the head, no atrous branch, the pooled branch
  first. Its logits come from a TensorFlow model, whose upsampling aligns corners.
- MobileViT: ASPP reads the last stage (timm ends with a 1x1 convolution after it), the 3x3 convolution inside a block is never
  dilated (timm's is), images are BGR in 0...1.
- MobileViTv2: the same head 512 wide. Where a map does not divide into patches of 2 x 2, transformers cuts its last row and
  column to zero and timm upsamples it, so that the two agree for images whose maps divide: multiples of 32 at stride 16.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deeplabzoo.checkpoints.converters.key_mapping import (
    ExportedCheckpoint,
    Rules,
    check_same_arithmetic,
    converted_checkpoint,
    drop_auxiliary,
    encoder_from_widths,
    invert_rules,
    read_config_json,
    rename,
)
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.data.classes import Palette, default_palette
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.heads import resolve_atrous_rates

FORMAT_NAME = "transformers"

# Names and settings, theirs and ours.

_BLOCKS = (2, 3, 4, 3, 3, 1)
"""Blocks of MobileNetV2's stages after the first one (1801.04381, table 2), which transformers numbers through."""
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
        for place in (0, 1):  # the stages before the first with attention (2110.02178, table 4)
            rules += _layer(
                rf"{model_type}\.encoder\.layer\.{place}\.layer\.(\d)\.{theirs}", rf"encoder.stages_{place}.\1.{ours}"
            )
        rules += _layer(rf"{stage}\.downsampling_layer\.{theirs}", rf"encoder.stages_\1.0.{ours}")
    parts = _ATTENTION_PARTS[model_type]
    return [
        *rules,
        *((rf"{attention}\.{theirs}\.(\w+)", rf"{block}.transformer.\2.{ours}.\3") for theirs, ours in parts.items()),
    ]


# What transformers' models with a DeepLabV3 head compute, in our terms, given the settings of a `config.json`.


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


# Their checkpoints read.


_CLASSIFIER = "segmentation_head.classifier.convolution.weight"
_TENSORFLOW = Preprocessing(pad=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_APPLE = Preprocessing(
    size=(544, 544), resize="shortest", only_shrink=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), channel_order="BGR"
)
_APPLE_V2 = Preprocessing(
    size=(512, 512), only_shrink=False, pad=True, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), channel_order="BGR"
)
"""A square of 512, as MobileViTv2 wants multiples of 32."""


def can_convert(names: Collection[str]) -> bool:
    """Whether tensors of these names are those of one of the three models with a segmentation head."""
    return _CLASSIFIER in names and _model_type(names) is not None


def convert(tensors: Mapping[str, torch.Tensor], path: Path) -> Checkpoint:
    """Return the model under our names; raises WeightsError for tensors that its layout does not know."""
    settings, notes = _settings(path, _model_type(tensors) or "")
    convert_network = _mobilenetv2 if _model_type(tensors) == "mobilenet_v2" else _mobilevit
    try:
        config, state, preprocessing, dropped = convert_network(tensors, settings)
    except KeyError as error:
        raise WeightsError(f"The transformers checkpoint lacks the tensor {error}.") from None
    except (TypeError, UsageError) as error:
        raise WeightsError(f"The config.json beside '{path}' describes no model that could exist: {error}") from None
    return converted_checkpoint(
        FORMAT_NAME,
        config=config,
        state_dict=state,
        classes=_classes(settings, config.num_classes),
        preprocessing=preprocessing,
        dropped=dropped,
        notes=notes,
    )


_Parts = tuple[DeepLabConfig, dict[str, torch.Tensor], Preprocessing, tuple[str, ...]]


def _model_type(names: Collection[str]) -> str | None:
    """Return the prefix that the encoder's tensors have, which is also the `model_type` of a `config.json`, less its dash."""
    stems = {
        "mobilenet_v2": "mobilenet_v2.conv_stem.first_conv.convolution.weight",
        "mobilevit": "mobilevit.conv_stem.convolution.weight",
        "mobilevitv2": "mobilevitv2.conv_stem.convolution.weight",
    }
    return next((model_type for model_type, stem in stems.items() if stem in names), None)


def _mobilenetv2(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> _Parts:
    ends = ("conv_stem", "layer.1", "layer.4", "layer.11", "layer.15")
    encoder = encoder_from_widths(
        "mobilenetv2_*", [tensors[f"mobilenet_v2.{end}.reduce_1x1.convolution.weight"] for end in ends]
    )
    config = mobilenetv2_config(
        encoder,
        settings,
        num_classes=max(2, tensors[_CLASSIFIER].shape[0]),
        in_chans=tensors["mobilenet_v2.conv_stem.first_conv.convolution.weight"].shape[1],
        head_channels=tensors["segmentation_head.conv_projection.convolution.weight"].shape[0],
    )
    unused = any(name.startswith("mobilenet_v2.conv_1x1.") for name in tensors)
    dropped = ("the encoder's 1x1 convolution for classification",) if unused else ()
    return config, rename(tensors, mobilenetv2_rules(), FORMAT_NAME), _TENSORFLOW, dropped


def _mobilevit(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> _Parts:
    model_type = _model_type(tensors) or ""
    first = [tensors[f"{model_type}.encoder.layer.{at}.layer.0.reduce_1x1.convolution.weight"] for at in (0, 1)]
    later = [tensors[f"{model_type}.encoder.layer.{at}.conv_projection.convolution.weight"] for at in (2, 3, 4)]
    is_v2 = model_type == "mobilevitv2"
    # the last entry of timm's MobileViT is the convolution after the last stage, which these models have not
    encoder = encoder_from_widths(
        "mobilevitv2_*" if is_v2 else "mobilevit_*", [*first, *later] if is_v2 else [*first, *later[:2]]
    )
    config = mobilevit_config(
        encoder,
        settings,
        num_classes=max(2, tensors[_CLASSIFIER].shape[0]),
        in_chans=tensors[f"{model_type}.conv_stem.convolution.weight"].shape[1],
        head_channels=tensors["segmentation_head.aspp.project.convolution.weight"].shape[0],
    )
    preprocessing = _APPLE_V2 if is_v2 else _APPLE
    return config, rename(fuse_qkv(tensors), mobilevit_rules(model_type), FORMAT_NAME), preprocessing, ()


def _settings(path: Path, model_type: str) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the `config.json` beside a file if it is of the same model, and a note on where it was not found."""
    found = read_config_json(path)
    if found.get("model_type") == model_type:
        return found, ()
    stride = 8 if model_type == "mobilenet_v2" else 16
    return {}, (f"no config.json beside it: output stride {stride} and the other settings of the published models assumed",)


def _classes(settings: Mapping[str, Any], count: int) -> tuple[tuple[str, ...], Palette] | None:
    labels = settings.get("id2label")
    if isinstance(labels, dict) and set(labels) == {str(index) for index in range(count)}:
        return tuple(str(labels[str(index)]) for index in range(count)), default_palette(count)
    return None


# Models of ours as their folders: tensors, `config.json` and `preprocessor_config.json`.
_WIDTHS = {
    **{f"mobilenetv2_{percent:03}": percent / 100 for percent in (35, 50, 75, 100, 140)},
    **{f"mobilevitv2_{percent:03}": percent / 100 for percent in range(50, 201, 25)},
}
"""Width multiplier of an encoder."""
_MOBILEVITS = ("mobilevit_s", "mobilevit_xs", "mobilevit_xxs")
_LAST_CHANNELS = 1280
"""Of MobileNetV2's convolution for classification (1801.04381, table 2), which segmentation does not use."""
_HEAD_CHANNELS = 256
"""Of MobileNetV2's head there, whatever the settings say."""
_IGNORED = ("align_corners",)
"""Its models return logits at the head's own size, and leave the upsampling to the image processor."""


def export(net: DeepLab) -> ExportedCheckpoint:
    """Return the model as transformers' class of the same encoder; raises WeightsError where it has none, or another."""
    encoder = net.config.encoder
    if encoder not in (*_WIDTHS, *_MOBILEVITS):
        raise WeightsError(f"{FORMAT_NAME} has no DeepLab on {encoder}; it has MobileNetV2, MobileViT and MobileViTv2.")
    name, settings, state = _export_mobilenetv2(net) if encoder.startswith("mobilenetv2_") else _export_mobilevit(net)
    labels = {str(index): label for index, label in enumerate(net.classes)}
    shared = {
        "architectures": [f"{name}ForSemanticSegmentation"],
        "num_channels": net.config.in_chans,
        "image_size": max(net.preprocessing.size),
        "output_stride": net.config.output_stride,
        "id2label": labels,
        "label2id": {label: int(index) for index, label in labels.items()},
        "semantic_loss_ignore_index": 255,
    }
    processor, notes = _image_processor(net, name)
    lost = ("auxiliary head left out",) if net.config.aux_head else ()
    unused = "its 1x1 convolution for classification, which segmentation does not use, is 0"
    filled = (unused,) if "layer_norm_eps" in settings else ()
    return ExportedCheckpoint(
        state_dict=state,
        folder=f"{FORMAT_NAME}.{name}ForSemanticSegmentation.from_pretrained({{folder}})",
        settings={"config.json": {**shared, **settings}, "preprocessor_config.json": processor},
        notes=(*lost, *filled, *notes, "logits come at the head's own size, and colours are not kept"),
    )


_ExportedParts = tuple[str, dict[str, Any], dict[str, torch.Tensor]]


def _export_mobilenetv2(net: DeepLab) -> _ExportedParts:
    config = net.config
    norm = next(module for module in net.encoder.modules() if isinstance(module, nn.BatchNorm2d))
    settings = {
        "model_type": "mobilenet_v2",
        "depth_multiplier": _WIDTHS[config.encoder],
        "tf_padding": config.encoder_padding == "same",
        "layer_norm_eps": norm.eps,
        "classifier_dropout_prob": config.dropout,
    }
    theirs = mobilenetv2_config(
        config.encoder,
        {**settings, "output_stride": config.output_stride},
        num_classes=config.num_classes,
        in_chans=config.in_chans,
        head_channels=_HEAD_CHANNELS,
    )
    check_same_arithmetic(config, theirs, FORMAT_NAME, (*_IGNORED, "encoder_norm_eps"))
    state = rename(drop_auxiliary(net.state_dict()), invert_rules(mobilenetv2_rules()), FORMAT_NAME)
    return "MobileNetV2", settings, state | _unused_final_conv(state, _WIDTHS[config.encoder])


def _unused_final_conv(state: Mapping[str, torch.Tensor], width: float) -> dict[str, torch.Tensor]:
    """Return the tensors of the convolution for classification, which the class loads and segmentation does not read."""
    inputs = state["mobilenet_v2.layer.15.reduce_1x1.convolution.weight"].shape[0]
    channels = _LAST_CHANNELS if width < 1 else round(_LAST_CHANNELS * width)
    names = ("weight", "bias", "running_mean", "running_var")
    return {
        "mobilenet_v2.conv_1x1.convolution.weight": torch.zeros(channels, inputs, 1, 1),
        **{f"mobilenet_v2.conv_1x1.normalization.{name}": torch.zeros(channels) for name in names},
        "mobilenet_v2.conv_1x1.normalization.num_batches_tracked": torch.tensor(0),
    }


def _export_mobilevit(net: DeepLab) -> _ExportedParts:
    config = net.config
    is_v2 = config.encoder in _WIDTHS
    network = "mobilevitv2" if is_v2 else "mobilevit"
    rates = resolve_atrous_rates(config)
    theirs = mobilevit_config(
        config.encoder,
        {"output_stride": config.output_stride, "atrous_rates": rates if len(rates) == 3 else (6, 12, 18)},
        num_classes=config.num_classes,
        in_chans=config.in_chans,
        head_channels=config.head_channels,
    )
    check_same_arithmetic(config, theirs, FORMAT_NAME, _IGNORED)
    renamed = rename(drop_auxiliary(net.state_dict()), invert_rules(mobilevit_rules(network)), FORMAT_NAME)
    state = split_qkv(renamed)
    settings = {
        "model_type": network,
        "atrous_rates": list(rates),
        "aspp_out_channels": config.head_channels,
        "aspp_dropout_prob": config.dropout,
        **({"width_multiplier": _WIDTHS[config.encoder]} if is_v2 else _widths_of_mobilevit(state)),
    }
    return ("MobileViTV2" if is_v2 else "MobileViT"), settings, state


def _widths_of_mobilevit(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the numbers of channels that tell one MobileViT from another, read off the tensors."""
    layers = "mobilevit.encoder.layer"
    hidden = [state[f"{layers}.{stage}.layernorm.weight"].shape[0] for stage in (2, 3, 4)]
    ends = [
        "mobilevit.conv_stem.convolution.weight",
        *(f"{layers}.{stage}.layer.0.reduce_1x1.convolution.weight" for stage in (0, 1)),
        *(f"{layers}.{stage}.conv_projection.convolution.weight" for stage in (2, 3, 4)),
    ]
    necks = [state[name].shape[0] for name in ends]
    expanded, reduced = state[f"{layers}.0.layer.0.expand_1x1.convolution.weight"].shape[:2]
    inner = state[f"{layers}.2.transformer.layer.0.intermediate.dense.weight"].shape[0]
    return {
        "hidden_sizes": hidden,
        "neck_hidden_sizes": [*necks, 4 * necks[-1]],  # the last is a classifier's, four times the last stage in all three
        "expand_ratio": expanded / reduced,
        "mlp_ratio": inner / hidden[0],
    }


def _image_processor(net: DeepLab, name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the settings of transformers' image processor, and what it cannot do.

    It brings the shortest side to a length and may crop the centre; it cannot fit an image into a square.
    """
    own = net.preprocessing
    is_mobilenet = name == "MobileNetV2"
    scaled = (own.mean, own.std) != ((0.0,) * 3, (1.0,) * 3)
    settings = {
        "image_processor_type": f"{'MobileNetV2' if is_mobilenet else 'MobileViT'}ImageProcessor",
        "do_resize": own.resize != "none",
        "size": {"shortest_edge": min(own.size)},
        "resample": 2,
        "do_center_crop": own.pad,
        "crop_size": {"height": own.size[0], "width": own.size[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": scaled,
        "image_mean": list(own.mean),
        "image_std": list(own.std),
        **({} if is_mobilenet else {"do_flip_channel_order": own.channel_order == "BGR"}),
    }
    cannot = []
    if own.resize == "longest":
        cannot.append("its image processor brings the shortest side, not the longest one, to size")
    if is_mobilenet and own.channel_order == "BGR":
        cannot.append("its image processor cannot give BGR, which these weights expect")
    return settings, tuple(cannot)
