"""What a step minimises: the recipe's losses, the auxiliary head's, and what a teacher says."""

import dataclasses

import torch
from torch import Tensor

from deeplabzoo.errors import UsageError
from deeplabzoo.models.deeplab import DeepLab, TrainingOutput
from deeplabzoo.train.losses import Objective, distillation_share
from deeplabzoo.train.network import weights
from deeplabzoo.train.recipe import Recipe


class TrainingLoss:
    """The recipe's whole loss, as shares of the global batch that add up."""

    def __init__(
        self,
        recipe: Recipe,
        ignore_index: int,
        class_weights: list[float] | None,
        net: DeepLab,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        weights_C = torch.tensor(class_weights, device=device) if class_weights else None
        self._objective = Objective(
            recipe.loss, ignore_index=ignore_index, class_weights=weights_C, options=recipe.loss_options
        )
        self._aux_weight, self._distill_weight = recipe.aux_weight, recipe.distill_weight
        self._teacher = Teacher(recipe.teacher, recipe.teacher_scales, net, device, dtype) if recipe.teacher else None

    def divisors(self, labels_BHW: Tensor) -> Tensor:
        """Return what the sums are divided by: one number a loss, and the number of pixels for the teacher."""
        pixels = torch.tensor([float(labels_BHW.numel())], dtype=torch.float64, device=labels_BHW.device)
        return torch.cat([self._objective.divisors(labels_BHW), pixels])

    def share(self, output: Tensor | TrainingOutput, image_BCHW: Tensor, labels_BHW: Tensor, divisors: Tensor) -> Tensor:
        """Return this piece's part of the global loss; an auxiliary head always has a part in it (asks.md theme M)."""
        logits_BCHW = output.logits if isinstance(output, TrainingOutput) else output
        total = self._objective.share(logits_BCHW, labels_BHW, divisors[:-1])
        if isinstance(output, TrainingOutput):
            total = total + self._aux_weight * self._objective.share(output.aux_logits, labels_BHW, divisors[:-1])
        if self._teacher is not None:
            taught_BCHW = self._teacher(image_BCHW)
            total = total + self._distill_weight * distillation_share(logits_BCHW, taught_BCHW, float(divisors[-1]))
        return total


class Teacher:
    """A frozen network of the same classes; it answers with probabilities averaged over scales and mirror images.

    It computes in the student's precision. Raises UsageError where its classes, or the way it wants its input, are not the
    student's.
    """

    def __init__(
        self,
        source: str,
        scales: tuple[float, ...],
        student: DeepLab,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._net = weights(source).to(device).requires_grad_(False).eval()
        self._scales, self._dtype = scales, dtype
        if self._net.classes != student.classes:
            raise UsageError(f"The teacher '{source}' knows other classes than the recipe's data; choose one trained on them.")
        alike = [dataclasses.replace(one.preprocessing, size=(1, 1), resize="none", pad=False) for one in (self._net, student)]
        if alike[0] != alike[1]:
            raise UsageError(
                f"The teacher '{source}' scales pixels in another way than the student, so they cannot share a crop."
            )

    @torch.no_grad()
    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Return probabilities for a normalised crop, at its size."""
        height, width = image_BCHW.shape[-2:]
        total = torch.zeros((), device=image_BCHW.device)
        for scale in self._scales:
            size = (max(33, round((height - 1) * scale) + 1), max(33, round((width - 1) * scale) + 1))
            x = image_BCHW if scale == 1 else _resize(image_BCHW, size)
            for flipped in (False, True):
                with torch.autocast(image_BCHW.device.type, self._dtype, enabled=self._dtype is not None):
                    logits = self._net(x.flip(3) if flipped else x)
                back = logits.flip(3) if flipped else logits
                total = total + _resize(back.float(), (height, width)).softmax(1)
        return total / (2 * len(self._scales))


def _resize(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(x_BCHW, size=size, mode="bilinear", align_corners=False)
