"""Networks of ours as folders of transformers: tensors, `config.json` and `preprocessor_config.json`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from deeplabzoo.checkpoints.converters.key_mapping import (
    ExportedCheckpoint,
    check_same_arithmetic,
    drop_auxiliary,
    invert_rules,
    rename,
)
from deeplabzoo.checkpoints.converters.transformers_layout import (
    mobilenetv2_config,
    mobilenetv2_rules,
    mobilevit_config,
    mobilevit_rules,
    split_qkv,
)
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.heads import resolve_atrous_rates

_LIBRARY = "transformers"
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
"""Its networks return logits at the head's own size, and leave the enlarging to the image processor."""


def export(net: DeepLab) -> ExportedCheckpoint:
    """Return the network as transformers' class of the same encoder; raises WeightsError where it has none, or another."""
    encoder = net.config.encoder
    if encoder not in (*_WIDTHS, *_MOBILEVITS):
        raise WeightsError(f"{_LIBRARY} has no DeepLab on {encoder}; it has MobileNetV2, MobileViT and MobileViTv2.")
    name, settings, state = _mobilenetv2(net) if encoder.startswith("mobilenetv2_") else _mobilevit(net)
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
    filled = (
        ("its 1x1 convolution for classification, which segmentation does not use, is 0",)
        if "layer_norm_eps" in settings
        else ()
    )
    return ExportedCheckpoint(
        state_dict=state,
        folder=f"{_LIBRARY}.{name}ForSemanticSegmentation.from_pretrained({{folder}})",
        settings={"config.json": {**shared, **settings}, "preprocessor_config.json": processor},
        notes=(*lost, *filled, *notes, "logits come at the head's own size, and colours are not kept"),
    )


_Parts = tuple[str, dict[str, Any], dict[str, torch.Tensor]]


def _mobilenetv2(net: DeepLab) -> _Parts:
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
    check_same_arithmetic(config, theirs, _LIBRARY, (*_IGNORED, "encoder_norm_eps"))
    state = rename(drop_auxiliary(net.state_dict()), invert_rules(mobilenetv2_rules()), _LIBRARY)
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


def _mobilevit(net: DeepLab) -> _Parts:
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
    check_same_arithmetic(config, theirs, _LIBRARY, _IGNORED)
    renamed = rename(drop_auxiliary(net.state_dict()), invert_rules(mobilevit_rules(network)), _LIBRARY)
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

    It brings the shortest side to a length and may cut out the centre; it has no way to fit a photo into a square.
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
