"""What every kind of network answers, in a few numbers: `PYTHONPATH=tests python -m trust.golden_logits` writes them anew.

The kinds are the bundled checkpoints; the smallest encoder of every family of timm; every form of head; and every layout in
which foreign checkpoints come. All but the first have weights made by integer arithmetic, since random generators change
between versions. The numbers are those of the network in float64, where rounding is far below what a changed epsilon, rate or
padding does; the same network in float32, as users run it, is compared with them, too.
"""

import functools
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from test_fused_model import HEADS

import deeplabzoo
from deeplabzoo.device import eval_mode
from deeplabzoo.evaluation.reproduce import GOLDEN_TOLERANCE, golden_input
from deeplabzoo.hub.manifest import BundledSource, WeightRow, released
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import encoder_info, list_encoders
from deeplabzoo.models.encoders import SkipInit

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "logits.json"
SIZE = (65, 320)
"""Height and width in pixels: 20 cells at stride 16, so that a rate of 18 reads more than padding, and an even side, at which
TensorFlow's padding is another one."""
SAMPLES = 16
LIGHT_PARAMETERS = 12_000_000
"""Of an encoder; CI takes of the smaller ones, `make soak` all."""

FLOAT32_TOLERANCE = 5 * GOLDEN_TOLERANCE
"""Of the largest logit: weights that nobody trained amplify rounding, which took one kind to nine tenths of ROUNDING."""
FLOAT64_TOLERANCE = 1e-10
"""Of the largest logit. What makes 8e-5 of float32's u makes 1.5e-13 of float64's, 2^-53 = 1.1e-16; the file keeps twelve
digits; the rest is left to exponentials of other machines, and is a hundredth of what one per cent of an epsilon does."""


@dataclass(frozen=True)
class Kind:
    """One kind of network, and how to build it."""

    name: str
    build: Callable[[], DeepLab]
    light: bool
    """Whether it takes a fraction of a second."""

    def __str__(self) -> str:
        return self.name


def kinds() -> list[Kind]:
    """Return every kind, in the order of the file."""
    return [*_bundled(), *_encoders(), *_heads(), *_layouts()]


def _bundled() -> Iterator[Kind]:
    for row in released():
        if isinstance(row.source, BundledSource):
            build = functools.partial(deeplabzoo.create, row.full_name, pretrained=True)
            yield Kind(f"bundled/{row.full_name}", build, light=True)


def _encoders() -> Iterator[Kind]:
    families: dict[str, list[str]] = {}
    for name in list_encoders(output_stride=16):
        if not name.startswith("test_"):  # timm's own, of a few channels
            families.setdefault(encoder_info(name).family, []).append(name)
    for family, names in sorted(families.items()):
        smallest = min(names, key=lambda name: (encoder_info(name).params, name))
        config = DeepLabConfig(architecture="deeplabv3plus", encoder=smallest, num_classes=5, head_channels=64)
        yield _seeded(f"encoder/{family}", config)


def _heads() -> Iterator[Kind]:
    for name, options in HEADS.items():
        yield _seeded(f"head/{name}", DeepLabConfig(encoder="lcnet_050", num_classes=5, head_channels=32, **options))


def _layouts() -> Iterator[Kind]:
    """One row of every origin and set of options, the one with the smallest encoder at its own size."""
    rows: dict[tuple[Any, ...], list[WeightRow]] = {}
    for row in released():
        if not isinstance(row.source, BundledSource):
            plain = replace(row.config, encoder="", num_classes=2, output_stride=16, atrous_rates=None)
            rows.setdefault((row.origin, plain, row.config.atrous_rates == ()), []).append(row)
    for alike in rows.values():
        row = min(alike, key=lambda row: (encoder_info(row.config.encoder).params, row.config.output_stride, row.full_name))
        yield _seeded(f"layout/{row.origin}/{row.full_name}", replace(row.config, num_classes=5))


def _seeded(name: str, config: DeepLabConfig) -> Kind:
    return Kind(name, functools.partial(seeded, config), light=encoder_info(config.encoder).params < LIGHT_PARAMETERS)


def seeded(config: DeepLabConfig) -> DeepLab:
    """Return the network with weights made of its tensors' names and shapes by arithmetic alone, the same on every machine."""
    with SkipInit():
        net = DeepLab(config).eval()
    net.load_state_dict({name: _values(name, tensor) for name, tensor in net.state_dict().items()})
    return net


def _values(name: str, like: torch.Tensor) -> torch.Tensor:
    """Kernels keep the variance of what goes through them; scales are near 1, shifts near 0, variances near 1."""
    last = name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    noise = np.resize(np.roll(_noise(), zlib.crc32(name.encode()) % len(_noise())), like.numel()).reshape(like.shape)
    inputs = math.prod(like.shape[1:])
    if inputs > 1:
        values = noise * math.sqrt(6 / inputs)
    elif last in ("bias", "running_mean"):
        values = 0.2 * noise
    else:
        values = 1 + 0.3 * noise
    return torch.from_numpy(values.astype(np.float32))


@functools.cache
def _noise() -> npt.NDArray[np.float64]:
    """65521 numbers in -1...1 (a prime, so that no two rows of a kernel are alike): splitmix64's mixing of 0, 1, 2, …"""
    z = np.arange(65521, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def answer(net: DeepLab) -> torch.Tensor:
    """Return the network's logits of the fixed input, at the input's size, in the type of its weights."""
    with eval_mode(net):
        return net(golden_input(net.config.in_chans, SIZE).to(next(net.parameters()).dtype))


def in_numbers(logits: torch.Tensor) -> dict[str, Any]:
    """Return what is kept of logits: shape, largest, mean and Euclidean norm, and numbers at even distances."""
    flat = logits.double().flatten()
    places = [place * (flat.numel() - 1) // (SAMPLES - 1) for place in range(SAMPLES)]
    return {
        "shape": list(logits.shape),
        "largest": _short(flat.abs().max()),
        "mean": _short(flat.mean()),
        "norm": _short(flat.norm()),
        "samples": [_short(one) for one in flat[places]],
    }


def difference(found: dict[str, Any], golden: dict[str, Any]) -> float:
    """Return the largest difference between two answers in numbers: of a logit or their mean over the largest, of the norm
    over the norm; infinite where the shapes differ or a number is not finite."""
    if found["shape"] != golden["shape"]:
        return math.inf
    pairs = zip([found["mean"], *found["samples"]], [golden["mean"], *golden["samples"]], strict=True)
    logits = max(abs(one - other) for one, other in pairs) / golden["largest"]
    worst = max(logits, abs(found["largest"] / golden["largest"] - 1), abs(found["norm"] / golden["norm"] - 1))
    return worst if math.isfinite(worst) else math.inf


def spread(logits: torch.Tensor) -> float:
    """Return how much logits of one class vary over the picture, as a share of the largest; 0 where they are flat."""
    return float(logits.flatten(2).std(dim=2).mean() / logits.abs().max())


def _short(value: torch.Tensor) -> float:
    return float(f"{float(value):.12g}")


def read_golden() -> dict[str, dict[str, Any]]:
    """Return the kept answers by kind."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [f'"{kind}": {json.dumps(in_numbers(answer(kind.build().double())))}' for kind in kinds()]
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
