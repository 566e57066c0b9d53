"""Measure every timm encoder and write `encoder_table.json` and `docs/encoders.md`: `python -m tools.encoders.probe`.

An encoder is built without memory (meta device) at each output stride and run on shapes: it counts as supported where its last
feature really has the stride asked for, a stride-4 feature exists, every image size works and a batch of one can be trained on.
Whether the dense network computes what the strided one does is measured with random weights on the smaller encoders.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from torch import nn
from tqdm import tqdm

from deeplabzoo.models import encoder_table
from deeplabzoo.models.encoder_surgery import make_single_sample_safe
from deeplabzoo.models.encoder_table import ALIASES, EncoderInfo, FeaturePlan
from deeplabzoo.models.encoders import CONFIG_VARIANTS, MIN_IMAGE_SIZE, build_feature_extractor, probe_features
from tools.encoders.encoder_docs import write_docs

_MAX_PARAMS = 400_000_000
"""Parameters above which an encoder is left out: such giants train on no machine that this library is meant for."""

_MAX_PARAMS_FOR_EXACTNESS = 30_000_000
"""Parameters up to which the exactness of the atrous conversion is measured, beside the encoders that have an alias."""

_EXACTNESS_SIZES = ((MIN_IMAGE_SIZE, MIN_IMAGE_SIZE), (200, 97))
"""Height and width in pixels of images that every encoder must train on: the smallest, and one that no power of two divides."""

_WITHOUT_IMAGENET = (
    "drnd54",
    "mobilenetv2_035",
    "mobilenetv2_075",
    *(f"efficientnet_lite{size}" for size in range(1, 5)),
    *CONFIG_VARIANTS,
)
"""Encoders beside timm's pretrained ones: our own, the widths that DeepLab checkpoints of other libraries come in, and the
symmetrically padded variants of those that timm has weights for with TensorFlow's padding only."""

_TABLE = Path(encoder_table.__file__).with_name("encoder_table.json")


class UnsupportedEncoderError(Exception):
    """An encoder that cannot be used at a stride, and why in a few words (they go into the table, never to a user)."""


def encoder_names() -> list[str]:
    """Return every encoder name to measure: timm's pretrained ones without their tags, and a few more."""
    return sorted({name.split(".")[0] for name in timm.list_models(pretrained=True)} | {*_WITHOUT_IMAGENET})


def probe(name: str) -> EncoderInfo:
    """Measure one encoder at every output stride, on shapes alone; stride 16, the default, is what it takes to be usable."""
    base, _ = CONFIG_VARIANTS.get(name, (name, {}))
    family = "drn" if name == "drnd54" else timm.model_entrypoint(base).__module__.rsplit(".", 1)[-1]
    try:
        fits = {16: build_meta_encoder(name, 16)}
    except UnsupportedEncoderError as reason:
        with torch.device("meta"):
            return EncoderInfo(name, family, _count(timm.create_model(name)), refused=str(reason))
    refused = ""
    for stride in (8, 32):
        try:
            fits[stride] = build_meta_encoder(name, stride)
        except UnsupportedEncoderError as reason:
            refused = str(reason)
    strides = tuple(sorted(fits))
    encoder, plan = fits[strides[-1]]
    sets = tuple(_weight_set(fits[stride][0]) for stride in strides)
    norms = tuple(fits[stride][1].single_cell_norms for stride in strides)
    return EncoderInfo(
        name,
        family,
        _count(encoder),
        strides,
        plan.channels,
        plan.reductions,
        sets,
        refused=refused,
        single_cell_norms=norms if any(norms) else (),
    )


def build_meta_encoder(name: str, stride: int) -> tuple[nn.Module, FeaturePlan]:
    """Return the encoder on the meta device and its feature plan; raises UnsupportedEncoderError where it cannot be used."""
    try:
        with torch.device("meta"):
            encoder = build_feature_extractor(name, stride)
    except (TypeError, AssertionError):
        raise UnsupportedEncoderError("timm cannot dilate it") from None
    except (RuntimeError, ValueError, AttributeError, KeyError) as error:
        raise UnsupportedEncoderError(f"timm gives no features of it: {type(error).__name__}") from None
    if _count(encoder) > _MAX_PARAMS:
        raise UnsupportedEncoderError(f"not measured: over {_MAX_PARAMS // 1_000_000} M parameters")
    try:
        plan = probe_features(encoder, 3)
        make_single_sample_safe(encoder, plan.single_cell_norms)
        with torch.no_grad():
            for size in _EXACTNESS_SIZES:
                encoder.train()(torch.empty(1, 3, *size, device="meta"))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError):
        raise UnsupportedEncoderError("it takes images of certain sizes only") from None
    if plan.reductions[-1] != stride or 4 not in plan.reductions:
        raise UnsupportedEncoderError(f"its features come at strides {plan.reductions}")
    return encoder, plan


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _weight_set(encoder: nn.Module) -> str:
    """Fingerprint the tensor names and shapes, so that a table row can say between which strides weights move."""
    listing = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in encoder.state_dict().items())
    return hashlib.sha256(listing.encode()).hexdigest()[:8]


def measure_exactness(name: str, stride: int) -> tuple[float | None, ...] | None:
    """Return the largest relative difference between strided and dense last features, for images of 128 and 129 pixels.

    Both networks have the same random weights; the dense map is sampled where the strided one has its cells. One decimal
    digit, and 0 below 1e-3 (rounding); None in place of a number where the maps do not correspond, None where weights differ.
    """
    torch.manual_seed(0)
    strided, dense = build_feature_extractor(name, 32), build_feature_extractor(name, stride)
    if _weight_set(strided) != _weight_set(dense):
        return None
    _randomise(strided)
    dense.load_state_dict(strided.state_dict())
    return tuple(_difference(strided.eval(), dense.eval(), 32 // stride, side) for side in (128, 129))


def _randomise(encoder: nn.Module) -> None:
    """Give every layer a say (fresh residual branches are multiplied by zero), then let batch norm see its own statistics."""
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # cumulative average: the statistics of the one batch below
    with torch.no_grad():
        encoder.train()(torch.randn(2, 3, 128, 128))


@torch.no_grad()
def _difference(strided: nn.Module, dense: nn.Module, step: int, side: int) -> float | None:
    image = torch.randn(1, 3, side, side)
    expected, found = list(strided(image))[-1], list(dense(image))[-1][..., ::step, ::step]
    if expected.shape != found.shape:
        return None
    difference = float((expected - found).abs().max() / expected.abs().max())
    return 0.0 if difference < 1e-3 else float(f"{difference:.1g}")


def with_exactness(info: EncoderInfo) -> EncoderInfo:
    """Return the facts with the exactness measured, where the encoder is one of those that it is measured for."""
    if info.name not in ALIASES.values() and info.params > _MAX_PARAMS_FOR_EXACTNESS:
        return info
    measured = {f"exact{stride}": measure_exactness(info.name, stride) for stride in (16, 8) if _comparable(info, stride)}
    return EncoderInfo(**{**vars(info), **measured})


def _comparable(info: EncoderInfo, stride: int) -> bool:
    return 32 in info.strides and stride in info.strides


def write_table(info: Iterable[EncoderInfo], path: Path = _TABLE) -> None:
    """Write the table, one encoder a line, fields at their defaults left out."""
    defaults = vars(EncoderInfo("", "", 0))
    rows = [
        f"{json.dumps(one.name)}: "
        + json.dumps({key: value for key, value in vars(one).items() if key != "name" and value != defaults[key]})
        for one in sorted(info, key=lambda one: one.name)
    ]
    head = f'{{"timm": "{timm.__version__}", "encoders": {{\n'
    path.write_text(head + ",\n".join(rows) + "\n}}\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Measure every encoder and write the table and its page in the docs."""
    parser = argparse.ArgumentParser(prog="python -m tools.encoders.probe", description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, default=Path("docs/encoders.md"), help="page to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    info = [probe(name) for name in tqdm(encoder_names(), desc="strides")]
    usable = [one for one in info if one.strides]
    measured = [with_exactness(one) for one in tqdm(usable, desc="exactness")]
    write_table(measured + [one for one in info if not one.strides])
    write_docs(measured, options.docs, timm.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
