"""What both sides of the training benchmark are given, and what a side is."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

MODELS = {
    "deeplabv3_mobilenetv3": "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50": "deeplabv3_resnet50",
    "deeplabv3_resnet101": "deeplabv3_resnet101",
}
"""Our names of the networks that both sides have, and torchvision's."""
SideName = Literal["ours", "torchvision", "ours_bf16"]
SIDES: dict[SideName, str] = {
    "ours": "deeplabzoo, float32",
    "torchvision": "torchvision's reference recipe, float32",
    "ours_bf16": "deeplabzoo, amp=bf16 (asked for; not the default on a CPU)",
}
"""Every side and its name in the table."""
CLASSES, VOID = 21, 255
_BASE_PER_CROP = 520 / 480
LR, MOMENTUM, DECAY, POWER = 0.01, 0.9, 1e-4, 0.9
SCHEDULED_STEPS = 100_000
"""The length of the run whose first steps are measured: more than ever are."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both sides are given."""

    model: str = "deeplabv3_mobilenetv3"
    device: str = "cpu"
    batch: int = 8
    crop: int = 321
    """Side of the square crop in pixels."""
    workers: int = 0
    seed: int = 0

    @property
    def base(self) -> int:
        """Shorter side, in pixels, that a scale of 1 means: as far above the crop as in the reference recipe."""
        return round(self.crop * _BASE_PER_CROP)


class Side(Protocol):
    """One way to train the network; a step takes what `batches` yields."""

    def batches(self, count: int) -> Iterator[Any]:
        """Yield the next `count` batches of the run, augmented anew."""
        ...

    def pictures(self, batch: Any) -> int:
        """Return how many pictures a batch holds."""
        ...

    def step(self, batch: Any) -> float:
        """Learn from a batch and return its loss."""
        ...

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """Return a context with the global switches that this side trains under."""
        ...
