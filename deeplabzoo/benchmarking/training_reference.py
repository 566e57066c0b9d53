"""torchvision's reference recipe, written anew from what torchvision documents of its references for segmentation.

RandomResize to 0.5-2 of a base size of 520 for a crop of 480, mirror, pad, crop, normalise; batch norm in training; SGD with
momentum 0.9, weight decay 1e-4 and lr 0.01 on a polynomial of power 0.9; contiguous float32; transforms v2 on tensors.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, default_collate

from deeplabzoo.benchmarking.libraries import library
from deeplabzoo.benchmarking.training_settings import (
    CLASSES,
    DECAY,
    LR,
    MODELS,
    MOMENTUM,
    POWER,
    SCHEDULED_STEPS,
    VOID,
    Settings,
)

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Torchvision:
    """Their side of the benchmark."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        from torchvision.datasets import VOCSegmentation, wrap_dataset_for_transforms_v2

        self._given, self._device = settings, torch.device(settings.device)
        photos = VOCSegmentation(str(folder), year="2012", image_set="train", transforms=_transforms(settings))
        self._photos = wrap_dataset_for_transforms_v2(photos)
        net = their_network(settings)
        net.load_state_dict(torch.load(folder / "torchvision.pth", weights_only=True))
        self._net = net.to(self._device)
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
        self._rate = torch.optim.lr_scheduler.PolynomialLR(self._optimizer, total_iters=SCHEDULED_STEPS, power=POWER)
        self._draws = torch.Generator().manual_seed(settings.seed)

    def batches(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the next `count` batches: B x 3 x H x W floats and B x H x W labels."""
        sampler = RandomSampler(self._photos, num_samples=count * self._given.batch, generator=self._draws)
        loader = DataLoader(
            self._photos,
            batch_size=self._given.batch,
            sampler=sampler,
            num_workers=self._given.workers,
            drop_last=True,
            collate_fn=_collated,
        )
        return iter(loader)

    def pictures(self, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
        """Return how many pictures a batch holds."""
        return len(batch[0])

    def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Learn from a batch and return its loss."""
        image_BCHW, labels_BHW = (tensor.to(self._device) for tensor in batch)
        self._net.train()
        logits_BCHW = self._net(image_BCHW)["out"]
        loss = nn.functional.cross_entropy(logits_BCHW, labels_BHW, ignore_index=VOID)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._rate.step()
        return float(loss.item())

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Let cuDNN search for algorithms meanwhile."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True  # as the reference does where it need not be deterministic
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


def their_network(settings: Settings) -> nn.Module:
    """Return torchvision's network with random weights and no auxiliary head; raises UsageError where it is missing."""
    build = getattr(library("torchvision").models.segmentation, MODELS[settings.model])
    net: nn.Module = build(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=False)
    return net


def _transforms(settings: Settings) -> Any:
    from torchvision import tv_tensors as their_tensors
    from torchvision.transforms import v2 as their_transforms

    tv_tensors: Any = their_tensors  # their modules hand on names without declaring it, which a type checker takes for a slip
    v2: Any = their_transforms
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResize(min_size=settings.base // 2, max_size=2 * settings.base),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomCrop(settings.crop, pad_if_needed=True, fill={tv_tensors.Mask: VOID, "others": 0}),
            v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}, scale=True),
            v2.Normalize(mean=_MEAN, std=_STD),
            v2.ToPureTensor(),
        ]
    )


def _collated(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    image_BCHW, labels_B1HW = default_collate(pairs)
    return image_BCHW, labels_B1HW.reshape(len(pairs), *labels_B1HW.shape[-2:])
