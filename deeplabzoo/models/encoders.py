"""Encoders: timm's feature extractors, or our DRN, built at an output stride, with the plan of the features they yield.

The extractor itself is the model's `encoder` and keeps timm's tensor names. Its features are read from the measured table
where the table was made with the installed timm; otherwise, and for options that change which maps are read, they are measured
by a forward pass on the meta device. What timm declares is not used: its reductions have been wrong for whole families.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from deeplabzoo.errors import DownloadError, UnsupportedStrideError, UsageError
from deeplabzoo.models import encoder_surgery as surgery
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.encoder_table import EncoderInfo, FeaturePlan, check_output_stride, measured_with
from deeplabzoo.offline import hf_offline_mode

_PROBE_SIZE = 256
"""Side in pixels of the image that features are measured with: a multiple of every stride, window and patch in use."""

MIN_IMAGE_SIZE = 33
"""Side in pixels of the smallest image that is supported: one above the largest stride."""

_TENSORFLOW_PADDING_FAMILIES = ("efficientnet", "mobilenetv3")
"""timm modules that build on its EfficientNet builder, the only one with a switch for TensorFlow's 'SAME' padding."""

CONFIG_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "resnet18c": ("resnet18", {"stem_type": "deep", "stem_width": 32})
}
"""Encoders that timm can build but has no name for: those with a stem of three 3x3 convolutions, as its `resnet50c` has."""


def build_encoder(config: DeepLabConfig, *, pretrained: bool = False) -> tuple[nn.Module, FeaturePlan]:
    """Build the encoder of a configuration.

    Args:
        config: Its encoder, output stride, input channels and `encoder_*` options count.
        pretrained: Download timm's ImageNet weights, which timm adapts to `in_chans`.

    Returns:
        The encoder, which maps B x in_chans x H x W to a list of features, and the plan of these features.

    Raises:
        UnsupportedStrideError: The encoder cannot run at this output stride; three that can are named.
        UnknownNameError: There is no such encoder.
        UsageError: An option that this encoder does not have.
        DownloadError: The ImageNet weights could not be downloaded.
    """
    info = check_output_stride(config.encoder, config.output_stride)
    encoder = _build(config, info, pretrained)
    if config.encoder_dilate_strided:
        with torch.device("meta"):
            surgery.dilate_strided(encoder, build_feature_extractor(info.name, 32))
    if config.encoder_final_conv:
        with hf_offline_mode() if pretrained else contextlib.nullcontext():
            surgery.add_final_conv(encoder, info.name, pretrained=pretrained)
    elif config.encoder_final_conv is False:
        surgery.remove_final_conv(encoder)
    if not config.encoder_dilate_local_conv:
        surgery.undilate_local_convs(encoder)
    if not config.encoder_pooled_shortcut:
        surgery.remove_shortcut_pooling(encoder)
    if config.encoder_dilates != "all":
        surgery.undilate_later_convs(encoder, config.encoder_dilates)
    if not config.decoder_low_level_activated:
        surgery.use_pre_activation_low_level(encoder)
    if config.decoder_low_level_expanded:
        surgery.use_expanded_low_level(encoder)
    if config.multi_grid is not None:
        surgery.dilate_blocks(encoder, config.multi_grid, config.output_stride, halved=config.multi_grid_halved)
    if config.norm == "group":
        surgery.use_group_norm(encoder)
    if config.encoder_norm_eps is not None:
        surgery.set_norm_eps(encoder, config.encoder_norm_eps)
    plan = info.feature_plan(config.output_stride) if _table_knows(config) else probe_features(encoder, config.in_chans)
    if plan.single_cell_norms:
        surgery.make_single_sample_safe(encoder, plan.single_cell_norms)
    if plan.reductions[-1] != config.output_stride or 4 not in plan.reductions:
        raise UnsupportedStrideError(
            f"Encoder '{info.short_name}' was asked for output stride {config.output_stride} but yields features at strides "
            f"{plan.reductions} with timm {timm.__version__}; `python -m tools.encoders.probe` measures the table again."
        )
    return encoder, plan


def _table_knows(config: DeepLabConfig) -> bool:
    """Return whether the table's row holds for this configuration: the other options change dilations, not shapes."""
    same_maps = config.encoder_final_conv is None and not config.decoder_low_level_expanded
    return same_maps and timm.__version__ == measured_with()


def probe_features(encoder: nn.Module, in_chans: int) -> FeaturePlan:
    """Run an encoder on shapes alone (the meta device) and return the plan of its features; the encoder is not changed."""
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    shapes_only = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    image, smallest = (torch.empty(1, in_chans, side, side, device="meta") for side in (_PROBE_SIZE, MIN_IMAGE_SIZE))
    was_training = encoder.training
    with surgery.single_cell_norms(encoder.eval()) as norm_layers, torch.no_grad():
        functional_call(encoder, shapes_only, (smallest,))
        features = list(functional_call(encoder, shapes_only, (image,)))
    encoder.train(was_training)
    return FeaturePlan(
        channels=tuple(feature.shape[1] for feature in features),
        reductions=tuple(round(_PROBE_SIZE / feature.shape[-1]) for feature in features),
        single_cell_norms=tuple(norm_layers),
    )


def build_feature_extractor(name: str, output_stride: int, in_chans: int = 3, **timm_options: Any) -> nn.Module:
    """Build a feature extractor with no adaptation but the one that every model here has.

    That one is trailing padding of dilated even kernels (ConvNeXt, Inception-NeXt), without which their maps shift.

    Args:
        name: Canonical encoder name.
        output_stride: Pixels per cell of the last feature.
        in_chans: Channels of the image.
        **timm_options: `pretrained` and `pad_type`.

    Raises:
        UsageError: The installed timm does not have this encoder.
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
    surgery.pad_even_kernels_at_end(encoder)
    return encoder


class _LinspaceOnCpu(TorchFunctionMode):
    """Computes `torch.linspace` on the CPU: timm 1.0.15 reads drop path rates from it, and a meta tensor has no values."""

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
        with hf_offline_mode():
            return build_feature_extractor(info.name, config.output_stride, config.in_chans, pretrained=True, **options)
    except Exception as error:  # whatever the download stack under timm raises: it changes with every release
        raise DownloadError(
            f"The ImageNet weights of '{info.short_name}' could not be fetched ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}); "
            "use encoder_pretrained=False to start without them."
        ) from error


class SkipInit(TorchFunctionMode):
    """Skips random initialization inside the context, for models whose every tensor is replaced afterwards."""

    _RANDOM_FILLS = frozenset({torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor unchanged where a function of torch.nn.init, or a random fill, would set it."""
        if func in self._RANDOM_FILLS or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def transfer_tensors(new: nn.Module, old: nn.Module) -> None:
    """Move the Parameter and buffer objects of `old` into `new`, which has the same tensor names and shapes.

    Training flags, requires_grad, momentum and epsilon of batch norms are kept.
    """
    frozen = [parameter for parameter in old.parameters() if not parameter.requires_grad]
    try:
        new.load_state_dict(old.state_dict(keep_vars=True), assign=True)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)  # load_state_dict(assign=True) gave it the flag of the parameter it replaced
    old_modules, old_buffers = dict(old.named_modules()), dict(old.named_buffers())
    for name, module in new.named_modules():
        before = old_modules.get(name)
        module.training = old.training if before is None else before.training
        if isinstance(module, nn.BatchNorm2d) and isinstance(before, nn.BatchNorm2d):
            module.momentum, module.eps = before.momentum, before.eps
    like = next(old.parameters())
    for name, buffer in list(new.named_buffers()):  # the non-persistent ones, such as blur kernels
        owner, _, attribute = name.rpartition(".")
        moved = buffer.to(like.device, like.dtype) if buffer.is_floating_point() else buffer.to(like.device)
        setattr(new.get_submodule(owner), attribute, old_buffers.get(name, moved))


# DRN-D-54, the dilated residual network of arXiv:1705.09914, which timm does not have.
#
# Tensor names and shapes are those of the published `drn_d_54` (and of DeepLab checkpoints built on it): `layer0` … `layer8`,
# where 0, 1, 2, 7, 8 are plain convolutions (`layerN.0` conv, `layerN.1` batch norm) and 3 to 6 are bottleneck blocks
# (`layerN.i.{conv1,bn1,conv2,bn2,conv3,bn3,downsample.0,downsample.1}`).

_STAGES = {3: (64, 3), 4: (128, 4), 5: (256, 6), 6: (512, 3)}
"""Bottleneck stages: stage -> (width, blocks); a stage gives 4 x width channels (table 1 of the paper)."""

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 with stride and dilation, 1x1, around a shortcut; the first block of a stage is dilated, too."""

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = width * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x 4·width x H/stride x W/stride."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


def _plain(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    reach = dilation * (kernel - 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, reach, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _stage(in_channels: int, number: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    width, blocks = _STAGES[number]
    later = (Bottleneck(width * _EXPANSION, width, 1, dilation) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(in_channels, width, stride, dilation), *later)


class DRN54(nn.Module):
    """DRN-D-54 as a feature extractor, published at output stride 8: stages 5 and 6 are dilated by 2 and 4, stage 7 by 2.

    At output strides 16 and 32, which the paper does not have, stages 5 and 6 stride instead and every dilation shrinks in
    proportion (never below 1). `layer7` and `layer8` are the paper's degridding layers (section 4).
    """

    def __init__(self, in_chans: int = 3, output_stride: int = 8) -> None:
        super().__init__()
        dense = 32 // output_stride  # 4, 2, 1: how much denser than stride 32
        self.layer0 = _plain(in_chans, 16, 7)
        self.layer1 = _plain(16, 16, 3)
        self.layer2 = _plain(16, 32, 3, stride=2)
        self.layer3 = _stage(32, 3, stride=2)
        self.layer4 = _stage(256, 4, stride=2)
        self.layer5 = _stage(512, 5, stride=1 if output_stride == 8 else 2, dilation=max(1, dense // 2))
        self.layer6 = _stage(1024, 6, stride=2 if output_stride == 32 else 1, dilation=dense)
        self.layer7 = _plain(2048, 512, 3, dilation=max(1, dense // 2))
        self.layer8 = _plain(512, 512, 3)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Map B x in_chans x H x W to features of 32, 256, 512, 1024 and 512 channels at strides 2, 4, 8, … output_stride."""
        half = self.layer2(self.layer1(self.layer0(image)))
        quarter = self.layer3(half)
        eighth = self.layer4(quarter)
        middle = self.layer5(eighth)
        return [half, quarter, eighth, middle, self.layer8(self.layer7(self.layer6(middle)))]
