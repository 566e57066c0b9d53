"""What defines a model and its input, as plain data: two frozen dataclasses that go through JSON unchanged.

And the arithmetic of output strides and atrous rates: a rate keeps its reach *in pixels of the image*. Halving the output
stride doubles every rate, so a model trained at stride 16 has the same receptive field at stride 8 (DeepLabV3, section 3.3).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from deeplabzoo.errors import UsageError

Architecture = Literal["deeplabv3", "deeplabv3plus"]
ARCHITECTURES: tuple[Architecture, ...] = ("deeplabv3", "deeplabv3plus")
OUTPUT_STRIDES = (8, 16, 32)
_ASPP_RATE_TIMES_STRIDE = 96
"""Reach in pixels of the smallest ASPP rate: 6 cells of 16 pixels (DeepLabV3, section 3.3); the others are 2 and 3 times it."""


def aspp_rates(output_stride: int) -> tuple[int, int, int]:
    """Return the papers' three ASPP rates, in cells, for an output stride of 8, 16 or 32; raises UsageError for others.

    >>> aspp_rates(32), aspp_rates(16), aspp_rates(8)
    ((3, 6, 9), (6, 12, 18), (12, 24, 36))
    """
    if output_stride not in OUTPUT_STRIDES:
        raise UsageError(f"output_stride must be 8, 16 or 32, not {output_stride!r}.")
    unit = _ASPP_RATE_TIMES_STRIDE // output_stride
    return unit, 2 * unit, 3 * unit


def scale_atrous_rates(rates: tuple[int, ...], from_stride: int, to_stride: int) -> tuple[int, ...]:
    """Return the atrous rates that reach as far in pixels at `to_stride` as `rates` do at `from_stride`.

    Args:
        rates: Atrous rates, in cells of the encoder's last feature.
        from_stride: Output stride that `rates` belong to.
        to_stride: Output stride of the result.

    Raises:
        UsageError: A rate would become a fraction; rounding it would change the model's receptive field.

    >>> scale_atrous_rates((12, 24, 36), 16, 8)
    (24, 48, 72)
    """
    if any(dilation * from_stride % to_stride for dilation in rates):
        raise UsageError(
            f"Atrous rates {rates} at output stride {from_stride} have no whole equivalent at stride {to_stride}; "
            "build the model with atrous_rates given for that stride."
        )
    return tuple(dilation * from_stride // to_stride for dilation in rates)


_MAX_RATES = 64
_MAX_SCALE = 1e6
"""Largest mean, std and 1 / std of an input whose pixels are 0...1."""
_MAX_SIDE, _MAX_PADDED_PIXELS = 65_535, 1 << 26
"""Pixels; the longer side of a JPEG, and an input of 800 MB in float32."""


class _JsonDataclass:
    """JSON round trip for the dataclasses below: lists become tuples, unknown fields are refused by name."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain JSON values; raises UsageError on unknown fields or values of the wrong kind."""
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        try:
            return cls(**plain)
        except TypeError as error:
            raise UsageError(f"{cls.__name__} cannot be built from {dict(values)!r}: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class DeepLabConfig(_JsonDataclass):
    """Everything that decides a model's shape and arithmetic; published checkpoints differ only in these fields.

    Raises UsageError for impossible values; an unsupported (encoder, stride) pair is found when the model is built.
    """

    architecture: Architecture
    encoder: str
    """Canonical encoder name: a timm name without tag, or `drnd54`."""
    num_classes: int = 21
    in_chans: int = 3
    output_stride: int = 16
    atrous_rates: tuple[int, ...] | None = None
    """ASPP rates at `output_stride`; None derives them (32: 3,6,9; 16: 6,12,18; 8: 12,24,36); () means no atrous branch
    (the 1x1 + image pooling head of the TensorFlow mobile models)."""
    multi_grid: tuple[int, ...] | None = None
    """Unit rates of the blocks of the last encoder stage, e.g. (1, 2, 4) (DeepLabV3, section 3.2.1); None leaves timm's."""
    multi_grid_halved: bool = False
    """Unit rates count half of the last stage's dilation instead of all of it: mmsegmentation's (1, 2, 4) are the dilations
    themselves at output stride 16."""
    norm: Literal["batch", "group"] = "batch"
    """Batch or group norm in encoder and head; "group" has 32 groups, or the largest number below that divides the channels
    and leaves two in a group."""
    norm_eps: float = 1e-5
    """Epsilon of the head's batch or group norms."""
    dropout: float = 0.1
    aux_head: bool = False
    head_channels: int = 256
    aspp_separable: bool | None = None
    """Depthwise-separable atrous branches; None: as the papers, no for V3 and yes for V3+."""
    depthwise_norm: bool = True
    """Normalize and activate after the depthwise half of separable convolutions too, as the TensorFlow models do (SMP: no)."""
    pooling_first: bool = False
    """Concatenation order of the image-pooling branch: before the other branches, or after (default)."""
    pooling_norm: bool = True
    """Batch or group norm in the pooled branch (papers: yes; detectron2: no)."""
    pooling_window: tuple[int, int] | None = None
    """(height, width) in pixels of the window that the pooled branch averages over at each place; None is the whole map, as in
    the papers (detectron2: the crop that it was trained on)."""
    aspp_project_kernel: Literal[1, 3] = 1
    """Kernel of the convolution that follows ASPP's concatenation: 1 in the papers, 3 in mmsegmentation."""
    refine_conv: bool = True
    """V3 only: a 3x3 convolution between the ASPP projection and the classifier (torchvision: yes; TensorFlow: no)."""
    decoder_channels: int = 256
    decoder_low_level_channels: int = 48
    decoder_convs: int = 2
    decoder_kernel: Literal[1, 3] = 3
    """Kernel of the decoder's convolutions: 3 in the papers, 1 in keras-hub."""
    decoder_separable: bool = True
    decoder_refine_conv: bool = False
    """V3+ only: a 3x3 convolution between the ASPP projection and the decoder's upsampling (SMP: yes)."""
    decoder_low_level_first: bool = False
    """Concatenation order in the decoder: low-level projection before the ASPP output, or after (default)."""
    decoder_low_level_activated: bool = True
    """In Xception the decoder reads the stride-4 map after its ReLU, as timm yields it, or before (TensorFlow, SegmenTron)."""
    decoder_low_level_expanded: bool = False
    """In MobileNetV2 the decoder reads what the last stride-4 block projects, 144 channels, instead of the 24 that it makes of
    them (TensorFlow)."""
    align_corners: bool = False
    """How features and logits are upsampled; False as torch's default, True as the TensorFlow models."""
    encoder_padding: Literal["symmetric", "same"] = "symmetric"
    """`same` is TensorFlow's asymmetric padding (encoders of timm's EfficientNet builder only)."""
    encoder_norm_eps: float | None = None
    """Epsilon of the encoder's batch or group norms; None leaves timm's."""
    encoder_dilate_strided: bool = False
    """Where a stage's stride was traded for dilation, dilate the convolution that had the stride like the rest of its stage
    (SMP, torchvision's MobileNetV3); timm leaves it at the rate of the stage before."""
    encoder_final_conv: bool | None = None
    """Whether ASPP reads the 1x1 convolution that ends a classifier before its pooling rather than the last stage, e.g.
    MobileNetV2's 1280 channels (SMP); None leaves timm's choice: in MobileViT it does (Apple: no), in all others not."""
    encoder_dilate_local_conv: bool = True
    """Dilate the 3x3 convolution before the attention of a MobileViT block like its stage, as timm does (Apple: no)."""
    encoder_dilates: Literal["all", "first_convs", "first_blocks"] = "all"
    """Which 3x3 convolutions of a dilated stage are dilated: all; only the first of each basic block (mmsegmentation's
    ResNet-18); or only that of the stage's first block (its MobileNetV2)."""
    encoder_pooled_shortcut: bool = True
    """Average 2x2 cells at stride 1 in the shortcut of a stage that lost its stride, as timm does wherever the strided shortcut
    is pooled (ResNet-D, ResNeSt; mmsegmentation: no)."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UsageError(f"Unknown architecture {self.architecture!r}; expected one of {', '.join(ARCHITECTURES)}.")
        if not isinstance(self.encoder, str):
            raise UsageError(f"encoder must be a name, not {self.encoder!r}.")
        for field in ("num_classes", "in_chans", "head_channels", "decoder_channels", "decoder_low_level_channels"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{field} must be a whole number of at least 1, not {value!r}.")
        if not 0 <= self.decoder_convs <= 8:
            raise UsageError(f"decoder_convs must be from 0 to 8, not {self.decoder_convs!r}.")
        if self.output_stride not in (8, 16, 32):
            raise UsageError(f"output_stride must be 8, 16 or 32, not {self.output_stride!r}.")
        if self.pooling_window is not None and len(self.pooling_window) != 2:
            raise UsageError(f"pooling_window must be (height, width) in pixels, not {self.pooling_window!r}.")
        for field in ("atrous_rates", "multi_grid", "pooling_window"):
            rates = getattr(self, field)
            if rates is not None and len(rates) > _MAX_RATES:  # a file could state so many that building takes minutes
                raise UsageError(f"{field} must be at most {_MAX_RATES} numbers, not {len(rates)}.")
            if rates is not None and not all(isinstance(rate, int) and rate >= 1 for rate in rates):
                raise UsageError(f"{field} must be whole numbers of at least 1, not {rates!r}.")
        if self.aspp_project_kernel not in (1, 3) or self.decoder_kernel not in (1, 3):
            kernels = f"{self.aspp_project_kernel!r} and {self.decoder_kernel!r}"
            raise UsageError(f"aspp_project_kernel and decoder_kernel must be 1 or 3, not {kernels}.")
        if self.decoder_kernel == 1 and self.decoder_separable:
            raise UsageError("decoder_kernel=1 cannot be separable; set decoder_separable=False with it.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be in [0, 1), not {self.dropout!r}.")
        if not (self.norm_eps > 0 and (self.encoder_norm_eps is None or self.encoder_norm_eps > 0)):
            raise UsageError(
                f"norm_eps and encoder_norm_eps must be above 0, not {self.norm_eps!r}, {self.encoder_norm_eps!r}."
            )
        if self.encoder_dilates not in ("all", "first_convs", "first_blocks"):
            raise UsageError(f"encoder_dilates must be all, first_convs or first_blocks, not {self.encoder_dilates!r}.")
        if self.norm not in ("batch", "group") or self.encoder_padding not in ("symmetric", "same"):
            raise UsageError(f"Unknown norm {self.norm!r} or encoder_padding {self.encoder_padding!r}.")


@dataclass(frozen=True, kw_only=True)
class Preprocessing(_JsonDataclass):
    """How an 8-bit image becomes the tensor that the weights expect; it is stored with the weights.

    The value fed is `(pixel / 255 - mean) / std` per channel in `channel_order`. The image is first resized (`resize`,
    `only_shrink`), then, if `pad`, extended at the bottom and right to `size` with the value that normalises to 0.
    """

    size: tuple[int, int] = (513, 513)
    """Nominal input (height, width) in pixels: the target of `resize` and `pad`."""
    resize: Literal["none", "longest", "shortest"] = "longest"
    """Keep the image's size, or bring its longest / shortest side to `size` keeping the aspect ratio."""
    only_shrink: bool = True
    """Do not upsample an image that is already small enough."""
    pad: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """One value per input channel; three values serve a model of another number of channels, too."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: Literal["RGB", "BGR"] = "RGB"

    def __post_init__(self) -> None:
        numbers_ok = len(self.mean) == len(self.std) > 0 and all(map(math.isfinite, (*self.mean, *self.std)))
        if not numbers_ok or min(self.std) <= 0:
            raise UsageError(
                "mean and std must be finite numbers, one of each per input channel, and std above 0, not "
                f"{self.mean!r} and {self.std!r}."
            )
        if max(map(abs, self.mean)) > _MAX_SCALE or not 1 / _MAX_SCALE <= min(self.std) <= max(self.std) <= _MAX_SCALE:
            raise UsageError(
                f"mean must be at most {_MAX_SCALE:g} and std {1 / _MAX_SCALE:g} to {_MAX_SCALE:g}, or the input overflows, "
                f"not {self.mean!r} and {self.std!r}."
            )
        if len(self.size) != 2 or min(self.size) < 1 or max(self.size) > _MAX_SIDE:
            raise UsageError(f"size must be (height, width) in pixels, each at most {_MAX_SIDE}, not {self.size!r}.")
        if self.pad and self.size[0] * self.size[1] > _MAX_PADDED_PIXELS:
            raise UsageError(
                f"size must be at most {_MAX_PADDED_PIXELS} pixels where images are padded to it, not {self.size!r}."
            )
        if self.resize not in ("none", "longest", "shortest") or self.channel_order not in ("RGB", "BGR"):
            raise UsageError(f"Unknown resize {self.resize!r} or channel_order {self.channel_order!r}.")
