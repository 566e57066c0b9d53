"""Rates follow the output stride, as the papers say."""

import pytest

from deeplabzoo.errors import UsageError
from deeplabzoo.models.layers import aspp_rates, multi_grid_dilations, scale_atrous_rates


def test_rates_are_the_papers() -> None:
    """OS32: 3,6,9; OS16: 6,12,18; OS8: 12,24,36 (pytorch/vision#4105: "why rate is two times with paper")."""
    assert [aspp_rates(stride) for stride in (32, 16, 8)] == [(3, 6, 9), (6, 12, 18), (12, 24, 36)]


def test_derived_rates_keep_their_reach() -> None:
    """Scaling the rates of one stride gives the papers' rates of the other."""
    for from_stride in (8, 16, 32):
        for to_stride in (8, 16, 32):
            assert scale_atrous_rates(aspp_rates(from_stride), from_stride, to_stride) == aspp_rates(to_stride)


def test_given_rates_keep_their_reach() -> None:
    """A checkpoint's own rates scale as well, and no rates stay no rates (tensorflow/models#6257)."""
    assert scale_atrous_rates((12, 24, 36), 16, 8) == (24, 48, 72)
    assert scale_atrous_rates((), 16, 8) == ()


def test_rates_that_would_become_fractions_are_refused() -> None:
    """A rate of 9 at stride 8 would be 4.5 at stride 16: rounding it would change the network in silence."""
    with pytest.raises(UsageError, match="no whole equivalent at stride 16"):
        scale_atrous_rates((9,), 8, 16)


@pytest.mark.parametrize("stride", [0, 4, 12, 64])
def test_unknown_strides_are_refused(stride: int) -> None:
    """Output strides are 8, 16 and 32."""
    with pytest.raises(UsageError, match="must be 8, 16 or 32"):
        aspp_rates(stride)


def test_multi_grid_multiplies_the_stage_dilation() -> None:
    """(1, 2, 4) at output stride 16 is (2, 4, 8) (YudeWang/deeplabv3plus-pytorch#19 confused the two)."""
    assert multi_grid_dilations((1, 2, 4), 16, 3) == (2, 4, 8)
    assert multi_grid_dilations((1, 2, 4), 8, 3) == (4, 8, 16)
    assert multi_grid_dilations((1, 2, 1), 32, 3) == (1, 2, 1)
    assert multi_grid_dilations((1, 2), 16, 4) == (2, 4, 2, 4)


def test_halved_multi_grid_stays_whole() -> None:
    """mmsegmentation's networks take half of the stage's dilation; a half that is no whole number is refused."""
    assert multi_grid_dilations((1, 2, 4), 16, 3, halved=True) == (1, 2, 4)
    assert multi_grid_dilations((2, 4, 6), 32, 3, halved=True) == (1, 2, 3)
    with pytest.raises(UsageError, match="no whole dilations at output stride 32"):
        multi_grid_dilations((2, 3), 32, 2, halved=True)
    assert multi_grid_dilations((2, 3), 32, 2) == (2, 3)


def test_rates_are_integers() -> None:
    """6.0 equals 6 and is no dilation: torch's convolutions refuse it."""
    rates = (
        *aspp_rates(16),
        *scale_atrous_rates((6, 12), 16, 8),
        *multi_grid_dilations((1, 2), 16, 2),
        *multi_grid_dilations((2, 4), 16, 2, halved=True),
    )
    assert {type(rate) for rate in rates} == {int}
