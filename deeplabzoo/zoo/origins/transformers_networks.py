"""What transformers' networks with a DeepLabV3 head compute, in our terms, given the settings of a `config.json`."""

from collections.abc import Mapping
from typing import Any

from deeplabzoo.models.config import DeepLabConfig


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
