"""The two sides of the training benchmark: our Trainer on its stream, and torchvision's reference recipe, on one network.

The network is one of torchvision's without an auxiliary head, with the same weights on both sides.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from deeplabzoo.benchmarking.training_reference import Torchvision, their_network
from deeplabzoo.benchmarking.training_settings import (
    DECAY,
    LR,
    MOMENTUM,
    POWER,
    SCHEDULED_STEPS,
    Settings,
    Side,
    SideName,
)
from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.inference.device import choose_device
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.train.distributed import Processes
from deeplabzoo.train.recipe import Recipe
from deeplabzoo.train.splits import open_splits
from deeplabzoo.train.stream import Batch
from deeplabzoo.train.trainer import Trainer
from deeplabzoo.zoo.factory import load
from deeplabzoo.zoo.origins.torchvision import PREPROCESSING, convert


def write_networks(folder: Path, settings: Settings) -> dict[str, Any]:
    """Write the same random weights for both sides into `folder`; return how far their logits differ on a fixed batch."""
    torch.manual_seed(settings.seed)
    theirs = their_network(settings).eval()
    file = folder / "torchvision.pth"
    torch.save(theirs.state_dict(), file)
    converted = convert(theirs.state_dict(), file)
    assert converted.config is not None
    ours = DeepLab.from_weights(
        converted.config,
        converted.state_dict,
        classes=converted.classes,
        palette=converted.palette,
        preprocessing=dataclasses.replace(PREPROCESSING, size=(settings.base, settings.base)),
    )
    ours.save(folder / "ours.safetensors")
    image_BCHW = torch.randn(2, 3, settings.crop, settings.crop, generator=torch.Generator().manual_seed(settings.seed))
    expected, found = _training_logits(theirs, image_BCHW), _training_logits(ours, image_BCHW)
    return {
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "torchvision_parameters": sum(parameter.numel() for parameter in theirs.parameters()),
        "largest_logit": float(expected.abs().max()),
        "largest_logit_difference": float((expected - found).abs().max()),
    }


@torch.no_grad()
def _training_logits(net: nn.Module, image_BCHW: torch.Tensor) -> torch.Tensor:
    """Return what a network answers in training, from the batch's own statistics, but without dropout's chance."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    output = net(image_BCHW)
    logits_BCHW: torch.Tensor = output["out"] if isinstance(output, dict) else output
    return logits_BCHW


def open_side(name: SideName, folder: Path, settings: Settings) -> Side:
    """Return a side, ready for its first step, from the photos and networks in `folder`."""
    if name == "torchvision":
        return Torchvision(folder, settings)
    return _Ours(folder, settings, "bf16" if name == "ours_bf16" else "off")


class _Ours:
    """The Trainer and its batches, called as the loop of `python -m deeplabzoo.train` calls them."""

    def __init__(self, folder: Path, settings: Settings, amp: Literal["off", "bf16"]) -> None:
        recipe = Recipe(
            name="training_step",
            model=settings.model,
            data="voc",
            steps=SCHEDULED_STEPS,
            batch=settings.batch,
            seed=settings.seed,
            augmentation=Augmentation(crop=(settings.crop, settings.crop)),
            optimizer="sgd",
            lr=LR,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            power=POWER,
            amp=amp,
            workers=settings.workers,
        )
        data = open_splits(recipe, folder)
        net = load(folder / "ours.safetensors")
        self._trainer = Trainer(recipe, data, net, Processes(0, 1, choose_device(settings.device)), None)

    def batches(self, count: int) -> Iterator[Batch]:
        self._trainer.steps = self._trainer.step + count
        return self._trainer.batches()

    def pictures(self, batch: Batch) -> int:
        return len(batch.image_BCHW)

    def step(self, batch: Batch) -> float:
        update = self._trainer.update(batch)
        assert update.finite, update
        return update.loss

    def settings(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
