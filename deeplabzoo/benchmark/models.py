"""Models and generated data of benchmarks; a model without available weights gets random ones, with a warning."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

import deeplabzoo
from deeplabzoo.benchmark.backends import SMP_PREFIX, smp_network
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import DownloadError, UnknownNameError
from deeplabzoo.hub.factory import load_named_model
from deeplabzoo.hub.manifest import WeightRow
from deeplabzoo.hub.registry import find_weights
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.names import parse_name

# Random weights and images. Speed hardly depends on the values as long as activations do not vanish (flat logits, slow
# denormals), so batch norm statistics are estimated from generated images.


_ESTIMATE_FROM = 6
_ESTIMATE_SIDE = 96


def synthetic_images(count: int, size: tuple[int, int], seed: int, channels: int = 3) -> torch.Tensor:
    """Return `count` x `channels` x H x W normalized images with coarse and fine structure and varying brightness."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 5, 7, generator=generator)
    shapes = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    grain = torch.randn(count, channels, *size, generator=generator)
    light = torch.randn(count, channels, 1, 1, generator=generator)
    return shapes + 0.3 * grain + 0.5 * light


def init_batch_norm_stats(net: nn.Module, seed: int, channels: int = 3) -> nn.Module:
    """Set every batch norm's statistics from a few generated images and return the model in eval mode.

    Activations then have a variance near one, whatever the convolutions were initialized with.
    """
    batch_norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in batch_norms]
    for norm in batch_norms:
        norm.momentum = 1.0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        net.train()(synthetic_images(_ESTIMATE_FROM, (_ESTIMATE_SIDE, _ESTIMATE_SIDE), seed, channels))
    for norm, momentum in zip(batch_norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()


@dataclass(frozen=True)
class BenchmarkModel:
    """A model and a description of its weights."""

    name: str
    net: DeepLab
    weights: str
    """`random, batch norm estimated, seed 0`, or the checkpoint's name and hash."""


def open_model(name: str, seed: int, num_classes: int = 21) -> BenchmarkModel:
    """Return a model by name, checkpoint file, or SMP model (`smp:deeplabv3plus_resnet50`).

    Weights come from the package and the caches; nothing is downloaded. A model whose weights are not available gets random
    ones. Raises what `create` and `load` raise, and UsageError.
    """
    if name.startswith(SMP_PREFIX):
        return _random_weights_model(name, _smp_as_deeplab(name, seed, num_classes), seed)
    if Path(name).exists():
        return _released_model(name, load_named_model(name, None))
    parsed = parse_name(name)
    row = _row(name)
    if row is not None:
        try:
            with _offline():
                return _released_model(name, deeplabzoo.create(row.full_name, pretrained=True))
        except DownloadError:
            pass  # random weights, with a warning below
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DeepLab(row.config) if row else deeplabzoo.create(str(parsed), num_classes=None if parsed.data else num_classes)
    return _random_weights_model(name, net, seed)


def _row(name: str) -> WeightRow | None:
    try:
        return find_weights(parse_name(name))
    except UnknownNameError:
        if parse_name(name).tag:
            raise
        return None


def _released_model(name: str, net: DeepLab) -> BenchmarkModel:
    source = net.weights_source
    return BenchmarkModel(name, net.eval(), f"{source.get('name') or source.get('source')}, sha256 {source['sha256'][:12]}")


def _random_weights_model(name: str, net: DeepLab, seed: int) -> BenchmarkModel:
    init_batch_norm_stats(net, seed, net.config.in_chans)
    weights = f"random, batch norm estimated, seed {seed}"
    logger.warning(f"{name}: no weights available, using {weights} (valid for speed; labels are meaningless)")
    return BenchmarkModel(name, net, weights)


def _smp_as_deeplab(name: str, seed: int, num_classes: int) -> DeepLab:
    """Return an SMP model with its defaults, converted to deeplabzoo."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place:
        torch.manual_seed(seed)
        smp_network(name, num_classes).save_pretrained(place)
        return deeplabzoo.load(place)


@contextmanager
def _offline() -> Iterator[None]:
    before = os.environ.get("DEEPLABZOO_OFFLINE")
    os.environ["DEEPLABZOO_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DEEPLABZOO_OFFLINE"]
        else:
            os.environ["DEEPLABZOO_OFFLINE"] = before


# Generated images and masks in the layout of PASCAL VOC. Reading and augmenting time depends on size in pixels and bytes, so
# they have VOC's: 500 pixels on the longer side, and enough fine detail for JPEG files of about 90 kB.


_SIZES_WH = ((500, 375), (500, 333), (375, 500), (500, 375))
_VOID = 255
_DETAIL = 19.0
"""Standard deviation of the fine detail in grey levels, which sets the size of the JPEG."""


def write_synthetic_voc(root: Path, *, train: int, val: int, seed: int, longest: int = 500) -> None:
    """Write `train` + `val` images with masks below `root`/VOCdevkit/VOC2012; `longest` is their longer side in pixels."""
    home = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    colours = np.zeros((256, 3), np.uint8)
    colours[:21] = CLASS_LISTS["voc"].palette
    colours[_VOID] = (224, 224, 192)
    names = [f"made_{number:06d}" for number in range(train + val)]
    for number, name in enumerate(names):
        rng = np.random.default_rng([seed, number])
        width, height = (max(1, round(side * longest / 500)) for side in _SIZES_WH[number % len(_SIZES_WH)])
        image, mask = _draw_image(rng, (width, height))
        mask.putpalette(colours.tobytes())
        image.save(home / "JPEGImages" / f"{name}.jpg", quality=90)
        mask.save(home / "SegmentationClass" / f"{name}.png")
    for split, stems in (("train", names[:train]), ("val", names[train:])):
        (home / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def _draw_image(rng: np.random.Generator, size_wh: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Return an image and its mask: smooth background, two to four objects with void borders, fine detail on top."""
    width, height = size_wh
    image = Image.fromarray(rng.integers(40, 216, (9, 12, 3), np.uint8)).resize(size_wh, Image.Resampling.BICUBIC)
    mask = Image.new("P", size_wh, 0)
    on_image, on_mask = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    for _ in range(int(rng.integers(2, 5))):
        left, top = int(rng.integers(0, max(1, width // 2))), int(rng.integers(0, max(1, height // 2)))
        right, bottom = left + int(rng.integers(width // 5, width // 2)), top + int(rng.integers(height // 5, height // 2))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        on_image.ellipse((left, top, right, bottom), fill=colour)
        on_mask.ellipse((left, top, right, bottom), fill=int(rng.integers(1, 21)), outline=_VOID, width=max(1, width // 100))
    detail = rng.normal(0.0, _DETAIL, (height, width, 1))
    pixels = np.clip(np.asarray(image, np.float64) + detail, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), mask
