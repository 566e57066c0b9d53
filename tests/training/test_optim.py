"""Parameter groups and learning-rate schedules."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deeplabzoo.errors import UsageError
from deeplabzoo.training.optim import (
    flat_state,
    load_flat_state,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from deeplabzoo.training.schedule import SCHEDULES, PhasedSchedule, Schedule


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)


def test_norm_layers_and_biases_do_not_decay_and_the_head_learns_faster() -> None:
    """Each parameter is in exactly one group, with the lr factor and decay that its place asks for."""
    net = _Net()
    groups = parameter_groups(net, weight_decay=1e-4, encoder_lr_factor=0.5, head_lr_factor=10)
    seen = {name: group for group in groups for name in group["names"]}
    assert sorted(seen) == sorted(name for name, _ in net.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(seen)
    assert {name for name, group in seen.items() if group["weight_decay"]} == {"encoder.0.weight", "head.weight"}
    assert seen["head.bias"]["lr_factor"] == 10
    assert seen["encoder.1.weight"]["lr_factor"] == 0.5
    optimizer = make_optimizer("sgd", groups)
    set_learning_rate(optimizer, 0.1)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.05, 1.0])


def test_frozen_parameters_are_left_out() -> None:
    """A frozen stage is neither decayed nor moved; a net with nothing to train is refused."""
    net = _Net()
    net.encoder.requires_grad_(False)
    names = [name for group in parameter_groups(net, weight_decay=0.1) for name in group["names"]]
    assert names == ["head.weight", "head.bias"]
    net.requires_grad_(False)
    with pytest.raises(UsageError, match="frozen"):
        parameter_groups(net, weight_decay=0.1)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_optimizer_state_goes_through_flat_tensors(kind: str) -> None:
    """Saved by name and put back, the next update is bit for bit that of an optimizer that never stopped."""
    torch.manual_seed(0)
    nets = [_Net(), _Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [make_optimizer(kind, parameter_groups(net, weight_decay=1e-2)) for net in nets]
    image = torch.randn(2, 3, 8, 8)

    def update(which: int) -> None:
        set_learning_rate(optimizers[which], 0.01)
        optimizers[which].zero_grad()
        nets[which].head(nets[which].encoder(image)).square().sum().backward()
        optimizers[which].step()

    update(0)
    update(0)
    nets[1].load_state_dict(nets[0].state_dict())
    load_flat_state(optimizers[1], {key: value.clone() for key, value in flat_state(optimizers[0]).items()})
    update(0)
    update(1)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_unknown_optimizer_or_schedule_is_named() -> None:
    """The sentence lists what exists."""
    with pytest.raises(UsageError, match="adamw"):
        make_optimizer("lion", parameter_groups(_Net(), weight_decay=0))
    with pytest.raises(UsageError, match="cosine"):
        Schedule(kind="poli", lr=1, steps=1)  # type: ignore[arg-type]


def test_schedules_follow_their_formulae() -> None:
    """Poly and cosine at the middle, step at its milestones, warm-up linear."""
    assert Schedule(kind="poly", lr=2, steps=10)(5) == pytest.approx(2 * 0.5**0.9)
    assert Schedule(kind="cosine", lr=2, steps=10)(5) == pytest.approx(1)
    stairs = Schedule(kind="step", lr=1, steps=100, milestones=(0.5, 0.75), gamma=0.1)
    assert [stairs(step) for step in (0, 49, 50, 74, 75, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    warm = Schedule(kind="constant", lr=1, steps=100, warmup_steps=10, warmup_from=0.2)
    assert [warm(step) for step in (0, 5, 10, 99)] == pytest.approx([0.2, 0.6, 1, 1])


def test_a_recipe_of_two_phases_restarts_its_curve() -> None:
    """65 epochs at 1e-2, then 5 at 1e-3: the published Cityscapes schedule."""
    rate = PhasedSchedule((Schedule(kind="poly", lr=1e-2, steps=65), Schedule(kind="poly", lr=1e-3, steps=5)))
    assert rate.steps == 70
    assert rate(0) == 1e-2
    assert rate(64) == pytest.approx(1e-2 * (1 / 65) ** 0.9)
    assert rate(65) == 1e-3
    assert rate(69) == pytest.approx(1e-3 * 0.2**0.9)
    assert rate.at(66) == (1, 1)


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 500),
    st.integers(0, 600),
    st.integers(0, 100),
    st.floats(1e-6, 1.0),
    st.floats(0, 1),
)
def test_rates_stay_within_bounds(kind: str, steps: int, step: int, warmup: int, lr: float, floor: float) -> None:
    """At any step, past the end too, a rate is finite, not negative and never above the base rate."""
    value = Schedule(kind=kind, lr=lr, steps=steps, warmup_steps=warmup, floor=floor)(step)  # type: ignore[arg-type]
    assert math.isfinite(value)
    assert 0 <= value <= lr * (1 + 1e-12)
