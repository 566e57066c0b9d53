"""One network, one answer: on one or two threads, alone or in a batch, in either memory layout, plain or optimised."""

import copy
import time
from collections.abc import Callable

import pytest
import torch
from golden_logits import FLOAT32_TOLERANCE, SIZE, Kind, kinds
from trust_record import TrustRecord, write_record

from deeplabzoo.device import eval_mode
from deeplabzoo.evaluation.reproduce import golden_input
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.trainer import to_channels_last

KINDS = [kind for kind in kinds() if kind.light]
SAMPLE = {
    "bundled/deeplabv3plus_mobilenetv2_voc.v1",
    "encoder/convnext",
    "head/v3_group",
    "layout/tf_zoo/deeplabv3plus_mobilenetv2_ade20k.tf_train",
}


def plain(net: DeepLab, image_BCHW: torch.Tensor) -> torch.Tensor:
    with eval_mode(net):
        return net(image_BCHW)


def on_two_threads(net: DeepLab, image_1CHW: torch.Tensor) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return plain(net, image_1CHW)
    finally:
        torch.set_num_threads(before)


def in_a_batch_of_four(net: DeepLab, image_1CHW: torch.Tensor) -> torch.Tensor:
    """Behind a brighter picture and before two others: whatever they hold must not reach it."""
    batch = torch.cat([image_1CHW + 2, image_1CHW, -image_1CHW, image_1CHW.flip(-1)])
    return plain(net, batch)[1:2]


def in_channels_last(net: DeepLab, image_1CHW: torch.Tensor) -> torch.Tensor:
    turned = copy.deepcopy(net)
    to_channels_last(turned)
    return plain(turned, image_1CHW.contiguous(memory_format=torch.channels_last))


def optimised(net: DeepLab, image_1CHW: torch.Tensor) -> torch.Tensor:
    return net.optimize()(image_1CHW)


FORMS: dict[str, Callable[[DeepLab, torch.Tensor], torch.Tensor]] = {
    "2 threads": on_two_threads,
    "batch of 4": in_a_batch_of_four,
    "channels_last": in_channels_last,
    "optimised": optimised,
}


def compared(kind: Kind) -> dict[str, tuple[float, int]]:
    """For each form the largest difference of a logit, as a share of the largest, and how many labels differ for no reason.

    A label has a reason to differ where the two best logits are so close that both may have been moved past each other.
    """
    net = kind.build()
    image_1CHW = golden_input(net.config.in_chans, SIZE)
    expected = plain(net, image_1CHW)
    largest = float(expected.abs().max())
    best = expected.topk(2, dim=1)
    clear = (best.values[:, 0] - best.values[:, 1]) > 2 * FLOAT32_TOLERANCE * largest
    assert clear.float().mean() > 0.9, "labels that are all unclear prove nothing"
    found = {}
    for name, form in FORMS.items():
        logits = form(net, image_1CHW)
        differing = int(((logits.argmax(1) != best.indices[:, 0]) & clear).sum())
        found[name] = (float((logits - expected).abs().max()) / largest, differing)
    return found


def wrong(found: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    return {form: one for form, one in found.items() if not (one[0] <= FLOAT32_TOLERANCE and one[1] == 0)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in SAMPLE], ids=str)
def test_every_form_gives_the_same_answer(kind: Kind) -> None:
    """Logits within rounding, and the same label wherever rounding cannot decide it."""
    assert wrong(compared(kind)) == {}


def test_kernels_of_five_dimensions_do_not_stop_a_training() -> None:
    """Lambda networks have them, and torch turns no such kernel into channels_last, the default layout of a recipe."""
    net = DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="lambda_resnet26t", num_classes=2, head_channels=16))
    to_channels_last(net)
    kernels = [parameter for parameter in net.parameters() if parameter.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert {parameter.ndim for parameter in net.parameters()} >= {4, 5}


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_form_of_every_kind_gives_the_same_answer() -> None:
    """All families, heads and layouts but those with the largest encoders."""
    started = time.perf_counter()
    found = {kind.name: compared(kind) for kind in KINDS}
    write_record(
        TrustRecord(
            name="golden_forms",
            area="numbers",
            what="Logits and labels on two threads, in a batch of four, in channels_last and optimised, against plain ones",
            command="python -m pytest -m soak tests/trust/test_golden_forms.py",
            seconds=round(time.perf_counter() - started, 1),
            inputs=len(found) * len(FORMS),
            survived=len(found) * len(FORMS) - sum(len(wrong(one)) for one in found.values()),
            details={
                "tolerance_of_largest_logit": FLOAT32_TOLERANCE,
                "largest_difference": {form: float(f"{max(one[form][0] for one in found.values()):.2g}") for form in FORMS},
                "labels_that_differ_beyond_rounding": sum(differing for one in found.values() for _, differing in one.values()),
            },
        )
    )
    assert {name: wrong(one) for name, one in found.items() if wrong(one)} == {}
