"""Segmentation losses, each a sum over images divided by a number that depends on the labels alone.

So a step is the same however the global batch is divided into processes and accumulated pieces: the divisors are summed over
the whole batch first, and every piece then contributes its part. For this reason losses that are not means over pixels (hard
pixels, Dice, Lovasz) are defined per image here; only `lovasz_batch` is not. All arithmetic is float32, also under autocast.

Shapes: logits_BCHW float, labels_BHW int64 with `ignore_index` for pixels that do not count. Logits of one channel are those of
a
sigmoid: cross-entropy is then binary cross-entropy, with labels 0 and 1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deeplabzoo.errors import UsageError, did_you_mean
from deeplabzoo.models.deeplab import DeepLab, TrainingOutput
from deeplabzoo.training.initialization import load_weights
from deeplabzoo.training.recipe import LossOptions, Recipe


def _pixel_loss(logits_BCHW: Tensor, labels_BHW: Tensor, ignore_index: int, weights_C: Tensor | None) -> Tensor:
    """Weighted negative log-likelihood of every pixel, 0 where ignored."""
    loss_BHW: Tensor = F.cross_entropy(logits_BCHW, labels_BHW, weight=weights_C, ignore_index=ignore_index, reduction="none")
    return loss_BHW


def _pixel_weight(labels_BHW: Tensor, ignore_index: int, weights_C: Tensor | None) -> Tensor:
    valid_BHW = labels_BHW != ignore_index
    if weights_C is None:
        return valid_BHW.float()
    return weights_C[labels_BHW.where(valid_BHW, 0)] * valid_BHW


def _has_valid(labels_BHW: Tensor, ignore_index: int) -> Tensor:
    return (labels_BHW != ignore_index).flatten(1).any(1).float()


def _num_kept_pixels(labels_BHW: Tensor, ignore_index: int, share: float) -> Tensor:
    """Return a share of each image's valid pixels, rounded up, so that one valid pixel keeps one."""
    return ((labels_BHW != ignore_index).flatten(1).sum(1) * share).ceil()


def _cross_entropy(logits: Tensor, labels: Tensor, ignore: int, weights: Tensor | None, options: LossOptions) -> Tensor:
    return _pixel_loss(logits, labels, ignore, weights).flatten(1).sum(1)


def _focal(logits: Tensor, labels: Tensor, ignore: int, weights: Tensor | None, options: LossOptions) -> Tensor:
    """Focal loss pixel by pixel: (1 - p)^gamma inside the sum, not applied to a mean."""
    plain_BHW = _pixel_loss(logits, labels, ignore, None)
    weighted_BHW = plain_BHW * _pixel_weight(labels, ignore, weights)
    return ((1 - (-plain_BHW).exp()) ** options.focal_gamma * weighted_BHW).flatten(1).sum(1)


def _top_k(logits: Tensor, labels: Tensor, ignore: int, weights: Tensor | None, options: LossOptions) -> Tensor:
    loss_BN = _pixel_loss(logits, labels, ignore, weights).flatten(1).sort(dim=1, descending=True).values
    place_N = torch.arange(loss_BN.shape[1], device=loss_BN.device)
    return (loss_BN * (place_N < _num_kept_pixels(labels, ignore, options.top_k)[:, None])).sum(1)


def _ohem(logits: Tensor, labels: Tensor, ignore: int, weights: Tensor | None, options: LossOptions) -> Tensor:
    """Online hard example mining: mean over an image's pixels below the threshold or among its hardest share."""
    plain_BN = _pixel_loss(logits, labels, ignore, None).flatten(1)
    order_BN = plain_BN.detach().argsort(dim=1, descending=True)
    place_BN = torch.empty_like(order_BN).scatter_(
        1, order_BN, torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN)
    )
    valid_BN = (labels != ignore).flatten(1)
    hard_BN = (-plain_BN.detach()).exp() < options.ohem_threshold
    keep_BN = valid_BN & (hard_BN | (place_BN < _num_kept_pixels(labels, ignore, options.ohem_keep)[:, None]))
    weight_BN = _pixel_weight(labels, ignore, weights).flatten(1) * keep_BN
    return (plain_BN * weight_BN).sum(1) / weight_BN.sum(1).clamp_min(1e-12)


def _one_hot(labels_BHW: Tensor, ignore_index: int, classes: int) -> Tensor:
    """Classes as planes, B x C x N; an ignored pixel is 0 in all of them."""
    valid_BHW = labels_BHW != ignore_index
    planes_BHWC = F.one_hot(labels_BHW.where(valid_BHW, 0), classes) * valid_BHW[..., None]
    return planes_BHWC.flatten(1, 2).transpose(1, 2).float()


def _class_mean(loss_BC: Tensor, truth_BCN: Tensor, weights_C: Tensor | None) -> Tensor:
    """Average over the classes that an image contains: an absent class has nothing to overlap with."""
    weight_BC = (truth_BCN.sum(2) > 0).float()
    if weights_C is not None:
        weight_BC = weight_BC * weights_C
    return (loss_BC * weight_BC).sum(1) / weight_BC.sum(1).clamp_min(1e-12)


def _dice(logits: Tensor, labels: Tensor, ignore: int, weights: Tensor | None, options: LossOptions) -> Tensor:
    """One minus the soft Dice coefficient (Milletari et al., arXiv:1606.04797, section 3), per image and class present."""
    truth_BCN = _one_hot(labels, ignore, logits.shape[1])
    probability_BCN = logits.softmax(1).flatten(2) * (labels != ignore).flatten(1)[:, None]
    overlap_BC = 2 * (probability_BCN * truth_BCN).sum(2) + options.dice_smooth
    total_BC = probability_BCN.sum(2) + truth_BCN.sum(2) + options.dice_smooth
    return _class_mean(1 - overlap_BC / total_BC, truth_BCN, weights)


def _lovasz(logits: Tensor, labels: Tensor, ignore: int, weights: Tensor | None, options: LossOptions) -> Tensor:
    """Lovasz-softmax (Berman et al., arXiv:1705.08790, section 3.2 and algorithm 1), per image, classes present.

    Only pairs of an image and a class that it contains are sorted. Ignored pixels have error 0 and truth 0: they sort last, and
    an error of 0 adds nothing.
    """
    images, classes = logits.shape[:2]
    labels_BN = labels.flatten(1)
    counted_BC = labels_BN.new_zeros(images, classes + 1)
    counted_BC.scatter_add_(1, labels_BN.where(labels_BN != ignore, classes), torch.ones_like(labels_BN))
    image_P, class_P = counted_BC[:, :classes].nonzero(as_tuple=True)
    truth_PN = (labels_BN[image_P] == class_P[:, None]).float()
    probability_PN = logits.softmax(1).flatten(2)[image_P, class_P]
    error_PN = (truth_PN - probability_PN).abs() * (labels_BN != ignore)[image_P]
    error_PN, order_PN = error_PN.sort(dim=1, descending=True)
    sorted_PN = truth_PN.gather(1, order_PN)
    positives_P1 = sorted_PN.sum(1, keepdim=True)
    jaccard_PN = 1 - (positives_P1 - sorted_PN.cumsum(1)) / (positives_P1 + (1 - sorted_PN).cumsum(1))
    slope_PN = torch.cat([jaccard_PN[:, :1], jaccard_PN.diff(dim=1)], dim=1)
    weight_P = torch.ones_like(positives_P1[:, 0]) if weights is None else weights[class_P]
    sums_B = logits.new_zeros(images).index_add(0, image_P, ((error_PN * slope_PN).sum(1) * weight_P).to(logits.dtype))
    weights_B = logits.new_zeros(images).index_add(0, image_P, weight_P.to(logits.dtype))
    return sums_B / weights_B.clamp_min(1e-12)


def _lovasz_batch(logits: Tensor, labels: Tensor, ignore: int, weights: Tensor | None, options: LossOptions) -> Tensor:
    """Lovasz-softmax over all images of a piece at once (Berman et al., section 3.1: IoU of a dataset).

    mIoU of a dataset counts a class once, however many images contain it: so does this, and `lovasz` does not. Sorting
    dominates the cost, so only every `lovasz_stride`-th row and column is used. With several pieces or processes it is the mean
    of theirs, which is not the value of one piece; this holds for no other loss here.
    """
    step = options.lovasz_stride
    width = logits[..., ::step].shape[-1]
    whole = logits[:, :, ::step, ::step].transpose(0, 1).reshape(1, logits.shape[1], -1, width)
    loss = _lovasz(whole, labels[:, ::step, ::step].reshape(1, -1, width), ignore, weights, options)
    return loss * _has_valid(labels, ignore)


_LossSum = Callable[[Tensor, Tensor, int, Tensor | None, LossOptions], Tensor]
_Divisor = Callable[[Tensor, int, Tensor | None, LossOptions], Tensor]


def _pixel_weight_sum(labels: Tensor, ignore: int, weights: Tensor | None, options: LossOptions) -> Tensor:
    return _pixel_weight(labels, ignore, weights).flatten(1).sum(1)


def _kept_pixel_count(labels: Tensor, ignore: int, weights: Tensor | None, options: LossOptions) -> Tensor:
    return _num_kept_pixels(labels, ignore, options.top_k)


def _valid_image_count(labels: Tensor, ignore: int, weights: Tensor | None, options: LossOptions) -> Tensor:
    return _has_valid(labels, ignore)


LOSSES: dict[str, tuple[_LossSum, _Divisor]] = {
    "ce": (_cross_entropy, _pixel_weight_sum),
    "focal": (_focal, _pixel_weight_sum),
    "top_k": (_top_k, _kept_pixel_count),
    "ohem": (_ohem, _valid_image_count),
    "dice": (_dice, _valid_image_count),
    "lovasz": (_lovasz, _valid_image_count),
    "lovasz_batch": (_lovasz_batch, _valid_image_count),
}


class WeightedLoss:
    """A weighted sum of losses.

    Args:
        terms: Names and weights, e.g. `(("ce", 1.0), ("lovasz", 0.5))`.
        ignore_index: Label of pixels that do not count.
        class_weights: One weight per class, C.
        options: Constants of the losses.

    Raises:
        UsageError: A loss does not exist, or there is none.

    >>> weighted_loss = WeightedLoss((("ce", 1.0),), ignore_index=255)
    >>> logits_BCHW, labels_BHW = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    >>> round(float(weighted_loss.mean(logits_BCHW, labels_BHW)), 4)
    0.6931
    """

    def __init__(
        self,
        terms: tuple[tuple[str, float], ...],
        *,
        ignore_index: int = 255,
        class_weights: Tensor | None = None,
        options: LossOptions | None = None,
    ) -> None:
        for name, _ in terms:
            if name not in LOSSES:
                raise UsageError(f"There is no loss {name!r}; there are {', '.join(LOSSES)}.{did_you_mean(name, LOSSES)}")
        if not terms:
            raise UsageError(f"A run needs at least one loss; there are {', '.join(LOSSES)}.")
        self.terms, self.ignore_index, self.options = terms, ignore_index, options or LossOptions()
        self.class_weights = class_weights

    def divisors(self, labels_BHW: Tensor) -> Tensor:
        """Return the divisor of each term's sum; to be summed over the global batch."""
        sums = [
            LOSSES[name][1](labels_BHW, self.ignore_index, self.class_weights, self.options).sum() for name, _ in self.terms
        ]
        return torch.stack(sums).double()

    def partial_loss(self, logits_BCHW: Tensor, labels_BHW: Tensor, divisors: Tensor) -> Tensor:
        """Return this piece's part of the global loss, a scalar; the parts of all pieces sum to it.

        A batch whose pixels are all ignored has divisors of 0 and a loss of 0, not NaN.

        Args:
            logits_BCHW: Logits of this piece, at the labels' size.
            labels_BHW: Its labels.
            divisors: Sum of `divisors` over the global batch.
        """
        with torch.autocast(logits_BCHW.device.type, enabled=False):
            logits_BCHW = logits_BCHW.float()
            if logits_BCHW.shape[1] == 1:  # one sigmoid channel: softmax of (0, x) is the sigmoid of x
                logits_BCHW = torch.cat([torch.zeros_like(logits_BCHW), logits_BCHW], dim=1)
            total = logits_BCHW.new_zeros(())
            for (name, factor), divisor in zip(self.terms, divisors, strict=True):
                sums_B = LOSSES[name][0](logits_BCHW, labels_BHW, self.ignore_index, self.class_weights, self.options)
                total = total + factor * sums_B.sum() / divisor.float().clamp_min(1e-12)
            return total

    def mean(self, logits_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
        """Return the loss of one batch."""
        return self.partial_loss(logits_BCHW, labels_BHW, self.divisors(labels_BHW))


def distillation_partial_loss(logits_BCHW: Tensor, teacher_BCHW: Tensor, pixels: float) -> Tensor:
    """Return the sum of KL(teacher || student) over all pixels, divided by `pixels` of the global batch.

    `teacher_BCHW` are probabilities (Hinton et al., arXiv:1503.02531, at temperature 1). Pixels without a label count too.
    """
    log_student_BCHW = logits_BCHW.float().log_softmax(1)
    return F.kl_div(log_student_BCHW, teacher_BCHW.float(), reduction="sum") / pixels


class TrainingLoss:
    """The recipe's loss: its terms on the main and the auxiliary head, and distillation from a teacher.

    Args:
        recipe: Terms, weights and teacher.
        ignore_index: Label of pixels that do not count.
        class_weights: One weight per class, or None.
        net: The model that is trained.
        device: Its device.
        dtype: Autocast type of the forward pass, or None.
    """

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
        self._weighted_loss = WeightedLoss(
            recipe.loss, ignore_index=ignore_index, class_weights=weights_C, options=recipe.loss_options
        )
        self._aux_weight, self._distill_weight = recipe.aux_weight, recipe.distill_weight
        self._teacher = Teacher(recipe.teacher, recipe.teacher_scales, net, device, dtype) if recipe.teacher else None

    def divisors(self, labels_BHW: Tensor) -> Tensor:
        """Return the divisors of the sums: one per loss, and the number of pixels for the teacher."""
        pixels = torch.tensor([float(labels_BHW.numel())], dtype=torch.float64, device=labels_BHW.device)
        return torch.cat([self._weighted_loss.divisors(labels_BHW), pixels])

    def partial_loss(self, output: Tensor | TrainingOutput, image_BCHW: Tensor, labels_BHW: Tensor, divisors: Tensor) -> Tensor:
        """Return this piece's part of the global loss; an auxiliary head, where there is one, always contributes."""
        logits_BCHW = output.logits if isinstance(output, TrainingOutput) else output
        total = self._weighted_loss.partial_loss(logits_BCHW, labels_BHW, divisors[:-1])
        if isinstance(output, TrainingOutput):
            total = total + self._aux_weight * self._weighted_loss.partial_loss(output.aux_logits, labels_BHW, divisors[:-1])
        if self._teacher is not None:
            teacher_probabilities_BCHW = self._teacher(image_BCHW)
            total = total + self._distill_weight * distillation_partial_loss(
                logits_BCHW, teacher_probabilities_BCHW, float(divisors[-1])
            )
        return total


class Teacher:
    """A frozen model of the same classes, whose probabilities are averaged over scales and mirrored images.

    It sees crops normalized with its own mean and std, which may differ from the student's.

    Args:
        source: A name, `name.tag` or checkpoint file.
        scales: Factors that crops are resized by.
        student: The model that is trained.
        device: Where to run.
        dtype: Autocast type, as the student's.

    Raises:
        UsageError: Classes or channel order are not the student's.
    """

    def __init__(
        self,
        source: str,
        scales: tuple[float, ...],
        student: DeepLab,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._net = load_weights(source).to(device).requires_grad_(False).eval()
        self._scales, self._dtype = scales, dtype
        if self._net.classes != student.classes:
            raise UsageError(f"The teacher '{source}' has other classes than the recipe's data; choose one trained on them.")
        own, other = self._net.preprocessing, student.preprocessing
        if own.channel_order != other.channel_order:
            raise UsageError(
                f"The teacher '{source}' reads {own.channel_order} images and the student {other.channel_order}, so they "
                "cannot share a crop; choose a teacher with the student's channel order."
            )
        own_mean, own_std, mean, std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (own.mean, own.std, other.mean, other.std)
        )
        self._same_scale = (own.mean, own.std) == (other.mean, other.std)
        self._factor, self._offset = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Return probabilities for crops that are normalized for the student, B x C x H x W at their size."""
        if not self._same_scale:
            image_BCHW = image_BCHW * self._factor + self._offset
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
