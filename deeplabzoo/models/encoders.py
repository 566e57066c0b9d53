"""Encoders: timm's feature extractors (or our DRN) built at an output stride, with their features found by measuring them.

The extractor itself is the network's `encoder`, with timm's own tensor names; what it yields is described by a `FeaturePlan`
beside it. Channels and strides are read off the shapes of a forward pass on the meta device (shapes only, milliseconds), never
off what timm declares: declared reductions have been wrong for whole families.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from deeplabzoo.errors import DownloadError, UnsupportedStrideError, UsageError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.drn import DRN54
from deeplabzoo.models.encoder_surgery import (
    add_final_conv,
    dilate_blocks,
    dilate_strided,
    pad_even_kernels_at_end,
    remove_final_conv,
    remove_shortcut_pooling,
    set_norm_eps,
    single_sample_safe_batchnorms,
    undilate_later_convs,
    undilate_local_convs,
    use_expanded_low_level,
    use_group_norm,
    use_pre_activation_low_level,
)
from deeplabzoo.models.encoder_table import EncoderInfo, check_output_stride

_PROBE_SIZE = 256
"""Side of the image that features are measured with: a multiple of every stride, window and patch in use."""

MIN_IMAGE_SIZE = 33
"""Side of the smallest image that is promised to work, in pixels: one above the largest stride."""

_TENSORFLOW_PADDING_FAMILIES = ("efficientnet", "mobilenetv3")
"""timm modules that build on its EfficientNet builder, the only one with a switch for TensorFlow's 'SAME' padding."""

CONFIG_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "resnet18c": ("resnet18", {"stem_type": "deep", "stem_width": 32})
}
"""Encoders that timm can build but has no name for: those with a stem of three 3x3 convolutions, as its `resnet50c` has."""


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
    info = check_output_stride(config.encoder, config.output_stride)
    encoder = _build(config, info, pretrained)
    if config.encoder_dilate_strided:
        with torch.device("meta"):
            dilate_strided(encoder, build_feature_extractor(info.name, 32))
    if config.encoder_final_conv:
        add_final_conv(encoder, info.name, pretrained=pretrained)
    elif config.encoder_final_conv is False:
        remove_final_conv(encoder)
    if not config.encoder_dilate_local_conv:
        undilate_local_convs(encoder)
    if not config.encoder_pooled_shortcut:
        remove_shortcut_pooling(encoder)
    if config.encoder_dilates != "all":
        undilate_later_convs(encoder, config.encoder_dilates)
    if not config.decoder_low_level_activated:
        use_pre_activation_low_level(encoder)
    if config.decoder_low_level_expanded:
        use_expanded_low_level(encoder)
    if config.multi_grid is not None:
        dilate_blocks(encoder, config.multi_grid, config.output_stride, halved=config.multi_grid_halved)
    if config.norm == "group":
        use_group_norm(encoder)
    if config.encoder_norm_eps is not None:
        set_norm_eps(encoder, config.encoder_norm_eps)
    plan = probe_features(encoder, config.in_chans)
    if plan.reductions[-1] != config.output_stride or 4 not in plan.reductions:
        raise UnsupportedStrideError(
            f"Encoder '{info.short_name}' was asked for output stride {config.output_stride} but yields features at strides "
            f"{plan.reductions} with timm {timm.__version__}; `python -m tools.encoders.probe` measures the table again."
        )
    return encoder, plan


def probe_features(encoder: nn.Module, in_chans: int) -> FeaturePlan:
    """Run the encoder on shapes alone and return what came out; it stays untouched, in mode, weights and device.

    On the way, batch norms that see a 1x1 map are made safe for a batch of one: those after a pooling over the whole map, and
    those that the smallest image leaves a single cell to.
    """
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    shapes_only = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    image, smallest = (torch.empty(1, in_chans, side, side, device="meta") for side in (_PROBE_SIZE, MIN_IMAGE_SIZE))
    was_training = encoder.training
    with single_sample_safe_batchnorms(encoder.eval()), torch.no_grad():
        functional_call(encoder, shapes_only, (smallest,))
        features = list(functional_call(encoder, shapes_only, (image,)))
    encoder.train(was_training)
    return FeaturePlan(
        channels=tuple(feature.shape[1] for feature in features),
        reductions=tuple(round(_PROBE_SIZE / feature.shape[-1]) for feature in features),
    )


def build_feature_extractor(name: str, output_stride: int, in_chans: int = 3, **timm_options: Any) -> nn.Module:
    """Build a feature extractor by canonical name, with no adaptation but the one that every network here has.

    That one is trailing padding of dilated even kernels (ConvNeXt, Inception-NeXt), without which their maps shift.
    `timm_options` are `pretrained` and `pad_type`. Raises UsageError for an encoder that the installed timm has not.
    """
    if name == "drnd54":
        return DRN54(in_chans, output_stride)
    base, variation = CONFIG_VARIANTS.get(name, (name, {}))
    if not timm.is_model(base):
        raise UsageError(f"timm {timm.__version__}, which is installed, has no encoder '{name}'; update timm.")
    with _LinspaceOnCpu():
        encoder: nn.Module = timm.create_model(
            base, features_only=True, output_stride=output_stride, in_chans=in_chans, **variation, **timm_options
        )
    pad_even_kernels_at_end(encoder)
    return encoder


class _LinspaceOnCpu(TorchFunctionMode):
    """Lets timm read the drop path rates that it computes while it builds, on the meta device, too.

    timm 1.0.15 takes them from a tensor, of which a meta device holds no values; later versions compute them without one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and `torch.linspace` on the CPU."""
        given = kwargs or {}
        return func(*args, **({"device": "cpu"} | given if func is torch.linspace else given))


def _build(config: DeepLabConfig, info: EncoderInfo, pretrained: bool) -> nn.Module:
    options: dict[str, Any] = {}
    if config.encoder_padding == "same":
        if info.family not in _TENSORFLOW_PADDING_FAMILIES:
            raise UsageError(
                "encoder_padding='same' exists for timm's EfficientNet and MobileNet encoders only, "
                f"not for '{info.short_name}' ({info.family})."
            )
        options["pad_type"] = "same"
    if not pretrained:
        return build_feature_extractor(info.name, config.output_stride, config.in_chans, **options)
    if info.family == "drn" or info.name in CONFIG_VARIANTS:
        raise UsageError(f"Encoder '{info.short_name}' has no ImageNet weights here; use encoder_pretrained=False.")
    if 32 in info.strides and not info.shares_weights(32, config.output_stride):
        raise UnsupportedStrideError(
            f"The ImageNet weights of '{info.short_name}' do not fit at output stride {config.output_stride}, where it has "
            "other tensors; use another stride or encoder_pretrained=False."
        )
    try:
        return build_feature_extractor(info.name, config.output_stride, config.in_chans, pretrained=True, **options)
    except Exception as error:  # whatever the download stack under timm raises: it changes with every release
        raise DownloadError(
            f"The ImageNet weights of '{info.short_name}' could not be fetched ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}); "
            "use encoder_pretrained=False to start without them."
        ) from error
