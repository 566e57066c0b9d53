"""Which encoders exist and at which output strides they run: measured once, committed as `encoder_table.json`, read here.

Nothing of torch or timm is imported, so that listing names stays instant. `python -m tools.encoders.probe` writes the
table and a test measures it again: what timm declares about itself has been wrong, so nothing here is taken from declarations.
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
    """What was measured about one encoder; `strides` is empty, and `refused` says why, where it cannot be used."""

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
        return f"The atrous conversion is not exact: {_max_difference(self.exact16)} at output stride 16, {_max_difference(self.exact8)} at 8."

    def shares_weights(self, one_stride: int, other_stride: int) -> bool:
        """Whether weights made for one output stride fit the network at the other."""
        sets = dict(zip(self.strides, self.weight_sets, strict=True))
        return one_stride in sets and sets[one_stride] == sets.get(other_stride)


def _max_difference(differences: tuple[float | None, ...]) -> str:
    if None in differences:
        return "maps that do not correspond"
    return f"a relative difference up to {max(one for one in differences if one is not None):.1g}"


def canonical_encoder(name: str) -> str:
    """Return the canonical name for an alias or a full timm name; raises UnknownNameError naming the nearest ones.

    >>> canonical_encoder("mobilenetv3")
    'mobilenetv3_large_100'
    """
    canonical = ALIASES.get(name, name)
    if canonical in _table():
        return canonical
    usable = [*ALIASES, *(info.name for info in _table().values() if info.strides)]
    raise UnknownNameError(
        f"Unknown encoder '{name}'.{did_you_mean(name, usable)} deeplabzoo.list_encoders('*pattern*') lists all {len(usable)}."
    )


def short_name(canonical: str) -> str:
    """Return the alias of a canonical encoder name, or the name itself; `canonical_encoder` undoes it."""
    return _SHORT.get(canonical, canonical)


def encoder_info(name: str) -> EncoderInfo:
    """Return what was measured about an encoder, by alias or canonical name; raises UnknownNameError."""
    return _table()[canonical_encoder(name)]


def supports(encoder: str, output_stride: int) -> bool:
    """Whether an encoder runs at an output stride; raises UnknownNameError for names that do not exist.

    >>> supports("resnet50", 8), supports("densenet121", 8)
    (True, False)
    """
    return output_stride in encoder_info(encoder).strides


def list_encoders(pattern: str = "*", output_stride: int | None = None) -> list[str]:
    """Return the canonical names of usable encoders whose canonical or short name matches, sorted.

    `pattern` is a shell pattern; with `output_stride` only encoders that run at that stride are named.
    """
    return sorted(
        info.name
        for info in _table().values()
        if (info.strides if output_stride is None else output_stride in info.strides)
        and (fnmatchcase(info.name, pattern) or fnmatchcase(info.short_name, pattern))
    )


def check_output_stride(encoder: str, output_stride: int) -> EncoderInfo:
    """Return the facts of an encoder that runs at `output_stride`; raises UnsupportedStrideError naming three that do."""
    info = encoder_info(encoder)
    if output_stride in info.strides:
        return info
    reason = f" ({info.refused})" if info.refused else ""
    near = ", ".join(one.short_name for one in similar_encoders(info, output_stride))
    raise UnsupportedStrideError(
        f"Encoder '{info.short_name}' cannot run at output stride {output_stride}{reason}; encoders near it that can: {near}."
    )


def similar_encoders(info: EncoderInfo, output_stride: int, count: int = 3) -> list[EncoderInfo]:
    """Return the encoders most like `info` that run at `output_stride`: by family, then by name and size."""

    def distance(other: EncoderInfo) -> tuple[bool, float, str]:
        unlike_name = 1 - difflib.SequenceMatcher(None, info.name, other.name).ratio()
        unlike_size = abs(math.log(max(1, other.params) / max(1, info.params)))
        return other.family != info.family, unlike_name + unlike_size, other.name

    able = (one for one in _table().values() if output_stride in one.strides and one.name != info.name)
    return sorted(able, key=distance)[:count]


@functools.cache
def _table() -> Mapping[str, EncoderInfo]:
    text = Path(__file__).with_name("encoder_table.json").read_text(encoding="utf-8")
    rows: Mapping[str, Mapping[str, Any]] = json.loads(text)["encoders"]
    return {name: EncoderInfo(name=name, **{key: _frozen(value) for key, value in row.items()}) for name, row in rows.items()}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
