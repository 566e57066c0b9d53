"""Hugging Face transformers' DeepLabs: MobileNetV2 (Google), MobileViT and MobileViTv2 (Apple), told by their tensor names.

All three have DeepLabV3 heads without the 3x3 convolution after ASPP, whatever their classes are called. What tensors do not
tell is read from the `config.json` beside the file, and is that of the published checkpoints where there is none.

- MobileNetV2: TensorFlow's padding, epsilon 1e-3 in the encoder and 1e-5 in the head, no atrous branch, the pooled branch
  first. Its logits come from a TensorFlow model, whose upsampling aligns corners.
- MobileViT: ASPP reads the last stage (timm ends with a 1x1 convolution after it), the 3x3 convolution inside a block is never
  dilated (timm's is), images are BGR in 0...1.
- MobileViTv2: the same head 512 wide. Where a map does not divide into patches of 2 x 2, transformers cuts its last row and
  column to zero and timm enlarges it, so that the two agree for images whose maps divide: multiples of 32 at stride 16.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.checkpoints.converters.key_mapping import converted_checkpoint, encoder_from_widths, read_config_json, rename
from deeplabzoo.checkpoints.converters.transformers_export import export as export
from deeplabzoo.checkpoints.converters.transformers_layout import (
    fuse_qkv,
    mobilenetv2_config,
    mobilenetv2_rules,
    mobilevit_config,
    mobilevit_rules,
)
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.data.classes import Palette, default_palette
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

FORMAT_NAME = "transformers"

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
    """Whether tensors of these names are those of one of the three networks with a segmentation head."""
    return _CLASSIFIER in names and _model_type(names) is not None


def convert(tensors: Mapping[str, torch.Tensor], path: Path) -> Checkpoint:
    """Return the network under our names; raises WeightsError for tensors that its layout does not know."""
    settings, notes = _settings(path, _model_type(tensors) or "")
    convert_network = _mobilenetv2 if _model_type(tensors) == "mobilenet_v2" else _mobilevit
    try:
        config, state, preprocessing, dropped = convert_network(tensors, settings)
    except KeyError as error:
        raise WeightsError(f"The transformers checkpoint lacks the tensor {error}.") from None
    except (TypeError, UsageError) as error:
        raise WeightsError(f"The config.json beside '{path}' describes no network that could exist: {error}") from None
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
    # the last entry of timm's MobileViT is the convolution after the last stage, which these networks have not
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
    """Return the `config.json` beside a file if it is of the same network, and a note on where it was not found."""
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
