"""The encoders that exist, the output strides at which they run and the shapes of their features.

All of it was measured once, is committed as `encoder_table.json` and is read here, without torch or timm, so that listing
names is instant. `python -m tools.encoders.probe` writes the table and a test measures it again: what timm declares about its
models has been wrong for whole families, so nothing is taken from declarations.
"""

import difflib
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deeplabzoo.errors import UnknownNameError, UnsupportedStrideError, did_you_mean

ALIASES: Mapping[str, str] = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv3": "mobilenetv3_large_100",
    "mobilenetv3small": "mobilenetv3_small_100",
    "mobilenetv4small": "mobilenetv4_conv_small",
    "mobilenetv4medium": "mobilenetv4_conv_medium",
    "mobilenetv4large": "mobilenetv4_conv_large",
    **{f"xception{depth}": f"xception{depth}" for depth in (41, 65, 71)},
    **{f"efficientnetb{size}": f"efficientnet_b{size}" for size in range(6)},
    **{f"efficientnetb{size}": f"tf_efficientnet_b{size}" for size in (6, 7)},
    **{f"efficientnetlite{size}": f"efficientnet_lite{size}" for size in range(5)},
    "efficientnetv2s": "tf_efficientnetv2_s",
    "efficientnetv2m": "tf_efficientnetv2_m",
    "efficientnetv2l": "tf_efficientnetv2_l",
    **{f"regnetx{size}": f"regnetx_{size}" for size in ("002", "004", "006", "008", "016", "032", "040", "064", "080", "120")},
    **{f"regnety{size}": f"regnety_{size}" for size in ("002", "004", "006", "008", "016", "032", "040", "064", "080", "120")},
    **{f"convnext{size}": f"convnext_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")},
    **{f"mobilevit{size}": f"mobilevit_{size}" for size in ("s", "xs", "xxs")},
    **{f"mobilevitv2w{width}": f"mobilevitv2_{width}" for width in ("050", "075", "100", "125", "150", "175", "200")},
    "drnd54": "drnd54",
}
"""Short name -> canonical name (a timm name without tag, or an encoder of our own). `tf_` where timm has no other weights."""

_SHORT = {canonical: short for short, canonical in ALIASES.items()}


@dataclass(frozen=True)
class EncoderInfo:
    """What was measured about one encoder; `strides` is empty, and `refused` gives the reason, where it cannot be used."""

    name: str
    family: str
    """The timm module that builds it, e.g. `resnet`; `drn` for our own."""
    params: int
    """Parameters of the feature extractor alone, with three input channels."""
    strides: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    reductions: tuple[int, ...] = ()
    """Stride of each feature at the largest output stride; a smaller one caps them."""
    weight_sets: tuple[str, ...] = ()
    """One fingerprint of tensor names and shapes per entry of `strides`: weights move between strides where they are equal."""
    exact16: tuple[float | None, ...] | None = None
    """Largest relative difference between strided and dense features at output stride 16, for images of 128 and 129 pixels
    and random weights: 0 is exact up to rounding, None where the two maps do not correspond. None was not measured."""
    exact8: tuple[float | None, ...] | None = None
    refused: str = ""
    single_cell_norms: tuple[tuple[str, ...], ...] = ()
    """One entry per entry of `strides`, or () where all are empty: names of the batch norms that are fed a 1x1 map when the
    image is the smallest that is supported, after global pooling or in the last stage."""

    @property
    def short_name(self) -> str:
        """The alias, or the canonical name where there is none."""
        return _SHORT.get(self.name, self.name)

    @property
    def exactness(self) -> str:
        """One sentence on whether the dense network computes what the strided one does."""
        if self.exact16 is None or self.exact8 is None:
            return "The atrous conversion was not measured for this encoder; see its family."
        if not any(self.exact16 + self.exact8):
            return "The atrous conversion is exact at output strides 16 and 8."
        at_16, at_8 = _max_difference(self.exact16), _max_difference(self.exact8)
        return f"The atrous conversion is not exact: {at_16} at output stride 16, {at_8} at 8."

    def shares_weights(self, one_stride: int, other_stride: int) -> bool:
        """Whether weights made for one output stride fit the encoder at the other."""
        sets = dict(zip(self.strides, self.weight_sets, strict=True))
        return one_stride in sets and sets[one_stride] == sets.get(other_stride)

    def feature_plan(self, output_stride: int) -> "FeaturePlan":
        """Return the features that the encoder yields at one of its `strides`."""
        norm_layers = self.single_cell_norms[self.strides.index(output_stride)] if self.single_cell_norms else ()
        return FeaturePlan(self.channels, tuple(min(one, output_stride) for one in self.reductions), norm_layers)


@dataclass(frozen=True)
class FeaturePlan:
    """The feature maps that an encoder's forward pass yields, and which of them a DeepLab uses."""

    channels: tuple[int, ...]
    reductions: tuple[int, ...]
    """Stride in pixels of each feature."""
    single_cell_norms: tuple[str, ...] = ()
    """Names of the batch norms that are fed a 1x1 map when the image is the smallest that is supported."""

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


def _max_difference(differences: tuple[float | None, ...]) -> str:
    if None in differences:
        return "maps that do not correspond"
    return f"a relative difference up to {max(one for one in differences if one is not None):.1g}"


def canonical_encoder(name: str) -> str:
    """Return the canonical name of an encoder.

    Args:
        name: An alias, or a timm name without its tag.

    Raises:
        UnknownNameError: There is no such encoder; the message has the nearest names.

    >>> canonical_encoder("mobilenetv3")
    'mobilenetv3_large_100'
    """
    canonical = ALIASES.get(name, name)
    if canonical in _rows():
        return canonical
    usable = [*ALIASES, *(info.name for info in all_encoders() if info.strides)]
    raise UnknownNameError(
        f"Unknown encoder '{name}'.{did_you_mean(name, usable)} deeplabzoo.list_encoders('*pattern*') lists all {len(usable)}."
    )


def short_name(canonical: str) -> str:
    """Return the alias of a canonical encoder name, or the name where it has none; `canonical_encoder` is the inverse."""
    return _SHORT.get(canonical, canonical)


@functools.cache
def encoder_info(name: str) -> EncoderInfo:
    """Return what was measured about an encoder, by alias or canonical name; raises UnknownNameError."""
    canonical = canonical_encoder(name)
    return EncoderInfo(name=canonical, **{key: _frozen(value) for key, value in _rows()[canonical].items()})


def supports(encoder: str, output_stride: int) -> bool:
    """Return whether an encoder runs at an output stride; nothing is built for the answer.

    Args:
        encoder: An alias or a canonical name.
        output_stride: Pixels per cell of the encoder's last feature: 8, 16 or 32.

    Raises:
        UnknownNameError: There is no such encoder.

    >>> supports("resnet50", 8), supports("densenet121", 8)
    (True, False)
    """
    return output_stride in encoder_info(encoder).strides


def list_encoders(pattern: str = "*", output_stride: int | None = None) -> list[str]:
    """Return the canonical names of usable encoders, sorted.

    Args:
        pattern: Shell pattern that the canonical or the short name has to match.
        output_stride: Only encoders that run at this output stride; None for all.
    """
    return sorted(
        info.name
        for info in all_encoders()
        if (info.strides if output_stride is None else output_stride in info.strides)
        and (fnmatchcase(info.name, pattern) or fnmatchcase(info.short_name, pattern))
    )


def check_output_stride(encoder: str, output_stride: int) -> EncoderInfo:
    """Return what was measured about an encoder; raises UnsupportedStrideError, naming three others, where it cannot run so."""
    info = encoder_info(encoder)
    if output_stride in info.strides:
        return info
    reason = f" ({info.refused})" if info.refused else ""
    near = ", ".join(one.short_name for one in similar_encoders(info, output_stride))
    raise UnsupportedStrideError(
        f"Encoder '{info.short_name}' cannot run at output stride {output_stride}{reason}; encoders near it that can: {near}."
    )


def similar_encoders(info: EncoderInfo, output_stride: int, count: int = 3) -> list[EncoderInfo]:
    """Return the `count` encoders most like `info` that run at `output_stride`: by family, then by name and size."""

    def distance(other: EncoderInfo) -> tuple[bool, float, str]:
        unlike_name = 1 - difflib.SequenceMatcher(None, info.name, other.name).ratio()
        unlike_size = abs(math.log(max(1, other.params) / max(1, info.params)))
        return other.family != info.family, unlike_name + unlike_size, other.name

    able = (one for one in all_encoders() if output_stride in one.strides and one.name != info.name)
    return sorted(able, key=distance)[:count]


def all_encoders() -> tuple[EncoderInfo, ...]:
    """Return every row of the table, unusable encoders included."""
    return tuple(map(encoder_info, _rows()))


def measured_with() -> str:
    """Return the version of timm that the table was measured with."""
    return str(_table()["timm"])


def _rows() -> Mapping[str, Mapping[str, Any]]:
    rows: Mapping[str, Mapping[str, Any]] = _table()["encoders"]
    return rows


@functools.cache
def _table() -> Mapping[str, Any]:
    text = Path(__file__).with_name("encoder_table.json").read_text(encoding="utf-8")
    table: Mapping[str, Any] = json.loads(text)
    return table


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
