"""The sides of the training benchmark: our Trainer with its data loader, and torchvision's reference recipe.

Both train one of torchvision's models without an auxiliary head, from the same weights.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, default_collate

from deeplabzoo.benchmark import TRAINING_MODELS, BackendName, library
from deeplabzoo.checkpoints.converters.torchvision import PREPROCESSING, convert
from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.device import choose_device
from deeplabzoo.hub.factory import load
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.dataloader import Batch, open_splits
from deeplabzoo.training.distributed import DistributedContext
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.trainer import Trainer

CLASSES, VOID = 21, 255

LR, MOMENTUM, DECAY, POWER = 0.01, 0.9, 1e-4, 0.9

SCHEDULED_STEPS = 100_000
"""Length of the run whose first steps are measured."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a benchmark, the same for all sides."""

    model: str = "deeplabv3_mobilenetv3"
    device: str = "cpu"
    batch: int = 8
    crop: int = 321
    """Side of the square crop in pixels."""
    workers: int = 0
    seed: int = 0
    images: int = 64
    """Images to generate."""
    longest: int = 500
    """Their longer side in pixels."""
    rounds: int = 7
    """Interleaved rounds of each side."""
    steps: int = 4
    """Measured steps of a round."""
    warmup: int = 1
    """Steps of a round before those."""
    memory_steps: int = 4
    """Steps for which peak memory is measured."""

    @property
    def base(self) -> int:
        """Shorter side in pixels at scale 1, in the same proportion to the crop as in the reference recipe."""
        return round(self.crop * _BASE_PER_CROP)


class TrainingBackend(Protocol):
    """One way to train the model; `step` takes what `batches` yields."""

    def batches(self, count: int) -> Iterator[Any]:
        """Yield the next `count` augmented batches of the run."""
        ...

    def num_images(self, batch: Any) -> int:
        """Return the number of images in a batch."""
        ...

    def step(self, batch: Any) -> float:
        """Run one train step and return its loss."""
        ...

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """Return a context with the global switches of this side."""
        ...


_BASE_PER_CROP = 520 / 480


# torchvision's reference recipe, implemented from its documentation of the segmentation references:
# RandomResize to 0.5-2 of a base size of 520 for a crop of 480, mirror, pad, crop, normalise; batch norm in training; SGD with
# momentum 0.9, weight decay 1e-4 and lr 0.01 on a polynomial of power 0.9; contiguous float32; transforms v2 on tensors.


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TorchvisionBackend:
    """torchvision's side of the benchmark."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        from torchvision.datasets import VOCSegmentation, wrap_dataset_for_transforms_v2

        self._given, self._device = settings, torch.device(settings.device)
        dataset = VOCSegmentation(str(folder), year="2012", image_set="train", transforms=_transforms(settings))
        self._dataset = wrap_dataset_for_transforms_v2(dataset)
        net = reference_model(settings)
        net.load_state_dict(torch.load(folder / "torchvision.pth", weights_only=True))
        self._net = net.to(self._device)
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
        self._rate = torch.optim.lr_scheduler.PolynomialLR(self._optimizer, total_iters=SCHEDULED_STEPS, power=POWER)
        self._draws = torch.Generator().manual_seed(settings.seed)

    def batches(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the next `count` batches: B x 3 x H x W floats and B x H x W labels."""
        sampler = RandomSampler(self._dataset, num_samples=count * self._given.batch, generator=self._draws)
        loader = DataLoader(
            self._dataset,
            batch_size=self._given.batch,
            sampler=sampler,
            num_workers=self._given.workers,
            drop_last=True,
            collate_fn=_collated,
        )
        return iter(loader)

    def num_images(self, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
        """Return the number of images in a batch."""
        return len(batch[0])

    def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Run one train step and return its loss."""
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
        """Switch on cuDNN's algorithm search, as the reference recipe does."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


def reference_model(settings: Settings) -> nn.Module:
    """Return torchvision's model with random weights and no auxiliary head; raises UsageError if it is not installed."""
    build = getattr(library("torchvision").models.segmentation, TRAINING_MODELS[settings.model])
    net: nn.Module = build(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=False)
    return net


def _transforms(settings: Settings) -> Any:
    from torchvision import tv_tensors as their_tensors
    from torchvision.transforms import v2 as their_transforms

    tv_tensors: Any = their_tensors  # torchvision re-exports names implicitly, which mypy refuses
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


def write_networks(folder: Path, settings: Settings) -> dict[str, Any]:
    """Write the same random weights for both sides into `folder`; return the difference of their logits on a fixed batch."""
    torch.manual_seed(settings.seed)
    theirs = reference_model(settings).eval()
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
    """Return logits in training mode (batch statistics) without dropout."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    output = net(image_BCHW)
    logits_BCHW: torch.Tensor = output["out"] if isinstance(output, dict) else output
    return logits_BCHW


def open_training_backend(name: BackendName, folder: Path, settings: Settings) -> TrainingBackend:
    """Return a side, ready for its first step, from the images and checkpoints in `folder`."""
    if name == "torchvision":
        return TorchvisionBackend(folder, settings)
    return OwnTrainingBackend(folder, settings, "bf16" if name == "ours_bf16" else "off")


class OwnTrainingBackend:
    """Our Trainer and data loader, called as `python -m deeplabzoo.train` calls them."""

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
        self._trainer = Trainer(recipe, data, net, DistributedContext(0, 1, choose_device(settings.device)), None)

    def batches(self, count: int) -> Iterator[Batch]:
        """Yield the next `count` batches."""
        self._trainer.steps = self._trainer.step + count
        return self._trainer.batches()

    def num_images(self, batch: Batch) -> int:
        """Return the number of images in a batch."""
        return len(batch.image_BCHW)

    def step(self, batch: Batch) -> float:
        """Run one train step and return its loss."""
        step_result = self._trainer.train_step(batch)
        assert step_result.finite, step_result
        return step_result.loss

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """Return an empty context: the Trainer sets its own switches."""
        return contextlib.nullcontext()
