"""Tap-by-tap depthwise convolutions equal those of torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplabzoo.optimization.fused_conv import RELU, FusedConv
from deeplabzoo.optimization.onednn import PackedConv, onednn_available, prepack, wide_depthwise_conv


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.integers(1, 3), st.booleans())
def test_any_size_and_dilation(height: int, width: int, rate: int, batch: int, biased: bool) -> None:
    """At a dilation larger than the map only the centre tap contributes."""
    torch.manual_seed(rate)
    x, weight, bias = torch.randn(batch, 5, height, width), torch.randn(5, 1, 3, 3), torch.randn(5) if biased else None
    expected = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), 1, rate, rate, 5)
    found = wide_depthwise_conv(x, weight, bias, rate)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.skipif(not onednn_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("channels", "rate", "taps"), [(1024, 12, True), (1024, 6, False), (64, 12, False)])
def test_wide_maps_at_large_dilation_are_convolved_tap_by_tap(channels: int, rate: int, taps: bool) -> None:
    """Others keep oneDNN's kernel; both give the same result."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels)
    fused = FusedConv(conv, conv.weight, conv.bias, RELU)
    x = torch.randn(1, channels, 17, 15)
    with torch.inference_mode():
        expected = fused(x)
        prepack(fused)
        assert isinstance(fused, PackedConv)
        assert fused.is_slow_depthwise is taps
        assert (fused(x) - expected).abs().max() < 1e-5
