"""The networks to measure, by name: with their weights where these are at hand, else with made ones, and it is said which."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import deeplabzoo
from deeplabzoo.benchmarking.libraries import SMP_PREFIX, smp_network
from deeplabzoo.benchmarking.random_weights import estimate_norms
from deeplabzoo.cli import named_network
from deeplabzoo.errors import DownloadError, UnknownNameError
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.say import say
from deeplabzoo.zoo.manifest import WeightRow
from deeplabzoo.zoo.registry import find_weights, parse_name


@dataclass(frozen=True)
class Subject:
    """A network and what is known of its weights."""

    name: str
    net: DeepLab
    weights: str
    """`random, norms estimated, seed 0`, or the file's name and hash."""


def open_subject(name: str, seed: int, num_classes: int = 21) -> Subject:
    """Return the network of a name of the zoo, of a checkpoint, or of SMP's own (`smp:deeplabv3plus_resnet50`).

    Weights are taken from the package and the caches; nothing is downloaded. Where they are elsewhere, the network that they
    belong to gets random ones. Raises what `create` and `load` raise, and UsageError.
    """
    if name.startswith(SMP_PREFIX):
        return _made(name, _through_ours(name, seed, num_classes), seed)
    if Path(name).exists():
        return _trained(name, named_network(name, None))
    parsed = parse_name(name)
    row = _row(name)
    if row is not None:
        try:
            with _offline():
                return _trained(name, deeplabzoo.create(row.full_name, pretrained=True))
        except DownloadError:
            pass  # said below
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DeepLab(row.config) if row else deeplabzoo.create(str(parsed), num_classes=None if parsed.data else num_classes)
    return _made(name, net, seed)


def _row(name: str) -> WeightRow | None:
    try:
        return find_weights(parse_name(name))
    except UnknownNameError:
        if parse_name(name).tag:
            raise
        return None


def _trained(name: str, net: DeepLab) -> Subject:
    source = net.weights_source
    return Subject(name, net.eval(), f"{source.get('name') or source.get('source')}, sha256 {source['sha256'][:12]}")


def _made(name: str, net: DeepLab, seed: int) -> Subject:
    estimate_norms(net, seed, net.config.in_chans)
    weights = f"random, norms estimated, seed {seed}"
    say(f"{name}: weights are {weights} (none are at hand; speed does not depend on them, labels mean nothing)")
    return Subject(name, net, weights)


def _through_ours(name: str, seed: int, num_classes: int) -> DeepLab:
    """Return SMP's own network with its own defaults as one of ours, converted as any of its checkpoints is."""
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
