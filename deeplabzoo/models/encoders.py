"""Encoders: timm's feature extractors (or our DRN) built at an output stride, with their features found by measuring them.

The extractor itself is the network's `encoder`, with timm's own tensor names; what it yields is described by a `FeaturePlan`
beside it. Channels and strides are read off the shapes of a forward pass on the meta device (shapes only, milliseconds), never
off what timm declares: declared reductions have been wrong for whole families.
"""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.func import functional_call

from deeplabzoo.errors import DownloadError, UnsupportedStrideError, UsageError
from deeplabzoo.models.adapt_encoder import (
    dilate_blocks,
    make_pooled_norms_safe,
    set_norm_eps,
    use_group_norm,
)
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.drn import DRN54
from deeplabzoo.models.encoder_table import EncoderFacts, require_stride

_MEASURED_AT = 256
"""Side of the image that features are measured with: a multiple of every stride, window and patch in use."""

_TENSORFLOW_PADDING_FAMILIES = ("efficientnet", "mobilenetv3")
"""timm modules that build on its EfficientNet builder, the only one with a switch for TensorFlow's 'SAME' padding."""


@dataclass(frozen=True)
class FeaturePlan:
    """What an encoder's forward pass yields, and which of it a DeepLab uses."""

    channels: tuple[int, ...]
    reductions: tuple[int, ...]
    """Stride in pixels of each feature, measured."""

    @property
    def low_level(self) -> int:
        """Index of the stride-4 feature that the V3+ decoder adds; the deepest one where there are several."""
        return max(index for index, stride in enumerate(self.reductions) if stride == 4)

    @property
    def auxiliary(self) -> int:
        """Index of the stage before the last, where the auxiliary head sits."""
        return len(self.channels) - 2

    @property
    def last(self) -> int:
        """Index of the feature that ASPP reads."""
        return len(self.channels) - 1


def build_encoder(config: DeepLabConfig, *, pretrained: bool = False) -> tuple[nn.Module, FeaturePlan]:
    """Build the encoder that a configuration names; returns it with the plan of its features.

    `pretrained` fetches timm's ImageNet weights (adapted by timm to `in_chans`). Raises UnsupportedStrideError (naming three
    encoders that can), UnknownNameError, UsageError for options that this encoder has not, DownloadError.
    """
    facts = require_stride(config.encoder, config.output_stride)
    encoder = _build_own(config, pretrained) if facts.family == "drn" else _build_timm(config, facts, pretrained)
    if config.multi_grid is not None:
        dilate_blocks(encoder, config.multi_grid, config.output_stride)
    if config.norm == "group":
        use_group_norm(encoder)
    if config.encoder_norm_eps is not None:
        set_norm_eps(encoder, config.encoder_norm_eps)
    plan = measure_features(encoder, config.in_chans)
    if plan.reductions[-1] != config.output_stride or 4 not in plan.reductions:
        raise UnsupportedStrideError(
            f"Encoder '{facts.short_name}' was asked for output stride {config.output_stride} but yields features at strides "
            f"{plan.reductions} with timm {timm.__version__}; `python -m deeplabzoo.models.probe` measures the table again."
        )
    return encoder, plan


def measure_features(encoder: nn.Module, in_chans: int) -> FeaturePlan:
    """Run the encoder on shapes alone and return what came out; it stays untouched, in mode, weights and device.

    On the way, batch norms that see a pooled 1x1 map (inside some attention blocks) are made safe for a batch of one.
    """
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    shapes_only = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    image = torch.empty(1, in_chans, _MEASURED_AT, _MEASURED_AT, device="meta")
    was_training = encoder.training
    with make_pooled_norms_safe(encoder.eval()), torch.no_grad():
        features = list(functional_call(encoder, shapes_only, (image,)))
    encoder.train(was_training)
    return FeaturePlan(
        channels=tuple(feature.shape[1] for feature in features),
        reductions=tuple(round(_MEASURED_AT / feature.shape[-1]) for feature in features),
    )


def _build_own(config: DeepLabConfig, pretrained: bool) -> nn.Module:
    if pretrained:
        raise UsageError("Encoder 'drnd54' has no published ImageNet weights here; use encoder_pretrained=False.")
    if config.encoder_padding == "same":
        raise UsageError("encoder_padding='same' exists for timm's EfficientNet and MobileNet encoders only, not for 'drnd54'.")
    return DRN54(config.in_chans, config.output_stride)


def _build_timm(config: DeepLabConfig, facts: EncoderFacts, pretrained: bool) -> nn.Module:
    extra: dict[str, Any] = {}
    if config.encoder_padding == "same":
        if facts.family not in _TENSORFLOW_PADDING_FAMILIES:
            raise UsageError(
                "encoder_padding='same' exists for timm's EfficientNet and MobileNet encoders only, "
                f"not for '{facts.short_name}' ({facts.family})."
            )
        extra["pad_type"] = "same"
    try:
        encoder: nn.Module = timm.create_model(
            facts.name,
            pretrained=pretrained,
            features_only=True,
            output_stride=config.output_stride,
            in_chans=config.in_chans,
            **extra,
        )
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise DownloadError(
            f"The ImageNet weights of '{facts.short_name}' could not be fetched or do not fit at output stride "
            f"{config.output_stride} ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "use encoder_pretrained=False to start without them."
        ) from error
    return encoder
