"""Losses against closed forms and other people's implementations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.segmentation import dice_score

from deeplabzoo.errors import UsageError
from deeplabzoo.training.dataloader import class_weights
from deeplabzoo.training.losses import LOSSES, LossOptions, WeightedLoss, distillation_partial_loss


def _batch(seed: int = 0, batch: int = 3, classes: int = 4, size: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, size, size + 2, generator=generator) * 2
    labels = torch.randint(0, classes, (batch, size, size + 2), generator=generator)
    labels[:, :2] = 255
    return logits, labels


def _one(name: str, **options: float) -> WeightedLoss:
    return WeightedLoss(((name, 1.0),), options=LossOptions(**options))


def test_cross_entropy_is_torchs_mean_over_valid_pixels() -> None:
    """With and without class weights, the ignored pixels count neither above nor below the line."""
    logits, labels = _batch()
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    for weight in (None, weights):
        expected = F.cross_entropy(logits, labels, weight=weight, ignore_index=255)
        torch.testing.assert_close(WeightedLoss((("ce", 1.0),), class_weights=weight).mean(logits, labels), expected)


def test_focal_is_pixelwise_and_gamma_zero_is_cross_entropy() -> None:
    """The focusing factor belongs inside the sum over pixels (jfzhang95 applies it to the batch mean)."""
    logits, labels = _batch()
    torch.testing.assert_close(_one("focal", focal_gamma=0).mean(logits, labels), _one("ce").mean(logits, labels))
    p = torch.tensor([0.9, 0.3])
    two_pixels = torch.stack([p.log(), (1 - p).log()])[None, :, None]
    value = _one("focal", focal_gamma=2).mean(two_pixels, torch.zeros(1, 1, 2, dtype=torch.int64))
    expected = -(0.1**2 * math.log(0.9) + 0.7**2 * math.log(0.3)) / 2
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_top_k_is_the_mean_of_the_hardest_share() -> None:
    """Share 1 is cross-entropy; share 0.2 is the mean of the hardest fifth of each image's valid pixels."""
    logits, labels = _batch()
    torch.testing.assert_close(_one("top_k", top_k=1.0).mean(logits, labels), _one("ce").mean(logits, labels))
    pixels = F.cross_entropy(logits, labels, ignore_index=255, reduction="none").flatten(1)
    kept = math.ceil(0.2 * int((labels[0] != 255).sum()))
    expected = pixels.topk(kept, dim=1).values.mean()
    torch.testing.assert_close(_one("top_k", top_k=0.2).mean(logits, labels), expected)


def test_ohem_keeps_hard_pixels_and_at_least_a_share() -> None:
    """Threshold above 1 keeps everything; where all pixels are easy the hardest share is still trained on."""
    logits, labels = _batch(batch=1)
    torch.testing.assert_close(_one("ohem", ohem_threshold=1.1).mean(logits, labels), _one("ce").mean(logits, labels))
    pixels = F.cross_entropy(logits, labels, ignore_index=255, reduction="none").flatten()
    hard = (labels.flatten() != 255) & (pixels > -math.log(0.3))
    torch.testing.assert_close(_one("ohem", ohem_threshold=0.3, ohem_keep=0.0).mean(logits, labels), pixels[hard].mean())
    easy = F.one_hot(labels.where(labels != 255, 0), 4).permute(0, 3, 1, 2) * 8.0 + logits * 0.01
    assert float(_one("ohem", ohem_keep=0.1).mean(easy, labels)) > 0


def test_dice_of_a_hard_answer_is_one_minus_torchmetrics_dice() -> None:
    """At probabilities of 0 and 1 the soft Dice is the Dice score."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (2, 16, 16), generator=generator)
    answer = torch.randint(0, 3, (2, 16, 16), generator=generator)
    logits = F.one_hot(answer, 3).permute(0, 3, 1, 2) * 100.0
    score = dice_score(answer, labels, num_classes=3, input_format="index", average="macro")
    assert float(_one("dice", dice_smooth=0.0).mean(logits, labels)) == pytest.approx(float(1 - score.mean()), abs=1e-5)


def test_lovasz_of_a_hard_answer_is_the_jaccard_distance() -> None:
    """The Lovasz extension equals the set function at the corners: one minus the mean IoU of the classes present."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (1, 12, 12), generator=generator)
    labels[:, 0] = 255
    answer = torch.randint(0, 3, (1, 12, 12), generator=generator)
    logits = F.one_hot(answer, 3).permute(0, 3, 1, 2) * 100.0
    valid = labels != 255
    iou = []
    for one in range(3):
        a, b = (answer == one) & valid, (labels == one) & valid
        iou.append(float((a & b).sum() / (a | b).sum()))
    assert float(_one("lovasz").mean(logits, labels)) == pytest.approx(1 - float(np.mean(iou)), abs=1e-5)


def test_lovasz_matches_a_direct_evaluation_of_the_extension() -> None:
    """Against a slow NumPy evaluation: sum over sorted errors of the increase of the Jaccard set function."""
    logits, labels = _batch(batch=2, size=5)
    probability = logits.softmax(1).numpy().astype(np.float64)
    images = []
    for image in range(2):
        valid = labels[image].numpy().ravel() != 255
        per_class = []
        for one in range(4):
            truth = (labels[image].numpy().ravel() == one)[valid]
            if not truth.any():
                continue
            error = np.abs(truth - probability[image, one].ravel()[valid])
            value, before, wrong = 0.0, 0.0, np.zeros(len(truth), bool)
            for pixel in np.argsort(-error, kind="stable"):
                wrong[pixel] = True
                distance = 1 - (truth & ~wrong).sum() / (truth | wrong).sum()
                value, before = value + error[pixel] * (distance - before), distance
            per_class.append(value)
        images.append(np.mean(per_class))
    assert float(_one("lovasz").mean(logits, labels)) == pytest.approx(float(np.mean(images)), abs=1e-5)


def test_batch_lovasz_counts_a_class_once_however_many_images_hold_it() -> None:
    """It is the Lovász of one long picture made of the batch; void images change nothing; the stride keeps every n-th pixel."""
    logits, labels = _batch(batch=3)
    long = logits.transpose(0, 1).reshape(1, 4, -1, logits.shape[-1]), labels.reshape(1, -1, labels.shape[-1])
    expected = _one("lovasz").mean(*long)
    torch.testing.assert_close(_one("lovasz_batch").mean(logits, labels), expected)
    assert abs(float(_one("lovasz").mean(logits, labels)) - float(expected)) > 1e-4
    void = torch.cat([logits, logits[:1]]), torch.cat([labels, torch.full_like(labels[:1], 255)])
    torch.testing.assert_close(_one("lovasz_batch").mean(*void), expected)
    sparse = _one("lovasz_batch", lovasz_stride=2).mean(logits, labels)
    torch.testing.assert_close(sparse, _one("lovasz_batch").mean(logits[..., ::2, ::2], labels[..., ::2, ::2]))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "lovasz_batch"])
def test_pieces_add_up_to_the_whole_batch(name: str) -> None:
    """Accumulation and several processes train on the same loss and gradient as one piece."""
    logits, labels = _batch(batch=4)
    labels[1] = 255
    labels[2, :7] = 255
    objective = WeightedLoss(((name, 1.0),), class_weights=torch.tensor([0.5, 1.0, 2.0, 4.0]))
    logits.requires_grad_()
    whole = objective.mean(logits, labels)
    (expected,) = torch.autograd.grad(whole, logits)
    divisors = sum(objective.divisors(labels[part]) for part in (slice(0, 1), slice(1, 2), slice(2, 4)))
    assert isinstance(divisors, torch.Tensor)
    shares = [objective.partial_loss(logits[part], labels[part], divisors) for part in (slice(0, 1), slice(1, 2), slice(2, 4))]
    torch.testing.assert_close(sum(shares), whole)
    (gradient,) = torch.autograd.grad(sum(shares), logits)  # type: ignore[arg-type]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_fall_to_zero_and_survive_a_batch_without_labels(name: str) -> None:
    """A right and certain answer costs nothing; a batch of void pixels gives 0 with a finite gradient, not NaN."""
    logits, labels = _batch()
    right = F.one_hot(labels.where(labels != 255, 0), 4).permute(0, 3, 1, 2) * 50.0
    assert float(_one(name).mean(right, labels)) == pytest.approx(0, abs=1e-5)
    assert float(_one(name).mean(logits, labels)) > 0.01
    logits.requires_grad_()
    nothing = _one(name).mean(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right(name: str) -> None:
    """Against finite differences, in float64 through the same formulae."""
    logits, labels = _batch(batch=1, size=4)
    logits = logits.double().requires_grad_()
    total, _ = LOSSES[name]
    assert torch.autograd.gradcheck(lambda x: total(x, labels, 255, None, LossOptions()).sum(), (logits,), atol=1e-4)


def test_sums_of_losses_weigh_their_terms() -> None:
    """`(("ce", 1.0), ("lovasz", 0.5))` is what it says; an unknown loss is answered with the nearest one."""
    logits, labels = _batch()
    both = WeightedLoss((("ce", 1.0), ("lovasz", 0.5))).mean(logits, labels)
    torch.testing.assert_close(both, _one("ce").mean(logits, labels) + 0.5 * _one("lovasz").mean(logits, labels))
    with pytest.raises(UsageError, match="lovasz"):
        WeightedLoss((("lovash", 1.0),))


def test_distillation_is_zero_at_the_teachers_answer() -> None:
    """KL(teacher || student): 0 where they agree, torch's batch mean elsewhere."""
    logits, _ = _batch()
    other, _ = _batch(seed=5)
    pixels = logits.shape[0] * logits.shape[2] * logits.shape[3]
    assert float(distillation_partial_loss(logits, logits.softmax(1), pixels)) == pytest.approx(0, abs=1e-6)
    expected = F.kl_div(logits.log_softmax(1), other.softmax(1), reduction="none").sum(1).mean()
    torch.testing.assert_close(distillation_partial_loss(logits, other.softmax(1), pixels), expected)


def test_class_weights_follow_the_papers() -> None:
    """Median frequency by Eigen and Fergus, ENet's 1 / ln(1.02 + p), inverse square root with pixel mean 1."""
    pixels, present = np.array([800, 150, 50, 0]), np.array([1000, 500, 250, 0])
    frequency = np.array([0.8, 0.3, 0.2])
    np.testing.assert_allclose(class_weights("median_frequency", pixels, present)[:3], 0.3 / frequency)
    np.testing.assert_allclose(class_weights("enet", pixels)[:3], 1 / np.log(1.02 + np.array([0.8, 0.15, 0.05])))
    root = class_weights("inverse_sqrt", pixels)
    assert (root[:3] * pixels[:3]).sum() / 1000 == pytest.approx(1)
    assert root[2] / root[0] == pytest.approx(4)
    assert class_weights("none", pixels).tolist() == [1, 1, 1, 1]
    assert all(class_weights(kind, pixels)[3] == 1 for kind in ("median_frequency", "enet", "inverse_sqrt"))
    with pytest.raises(UsageError, match="median_frequency"):
        class_weights("median", pixels)


@pytest.mark.parametrize("name", ["ce", "focal", "dice", "lovasz", "ohem", "top_k"])
def test_one_channel_is_trained_as_a_sigmoid(name: str) -> None:
    """Binary cross-entropy, and the other losses of the two classes that a sigmoid has; never a softmax over one channel."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 8, 9, generator=generator)
    labels = torch.randint(0, 2, (2, 8, 9), generator=generator)
    labels[0, :2] = 255
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    assert float(_one(name).mean(logits, labels)) == pytest.approx(float(_one(name).mean(two, labels)))
    if name == "ce":
        valid = labels != 255
        expected = F.binary_cross_entropy_with_logits(logits[:, 0][valid], labels[valid].float())
        torch.testing.assert_close(_one(name).mean(logits, labels), expected)
