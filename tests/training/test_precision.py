"""bf16 on a CPU: the layers whose bf16 gradient is wrong in oneDNN compute in float32."""

import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

import deeplabzoo
from deeplabzoo.training.trainer import exclude_dilated_depthwise_from_bf16

CPU = torch.device("cpu")


def gradients(conv: nn.Conv2d, x_BCHW: torch.Tensor, *, bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x_BCHW = x_BCHW.clone(memory_format=torch.preserve_format).requires_grad_()
    conv.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out_BCHW = conv(x_BCHW)
    weights_BCHW = torch.randn(out_BCHW.shape, generator=torch.Generator().manual_seed(1))
    (out_BCHW.float() * weights_BCHW).sum().backward()
    assert conv.weight.grad is not None
    assert x_BCHW.grad is not None
    return conv.weight.grad, x_BCHW.grad


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
def test_a_dilated_depthwise_convolution_has_the_gradient_of_float32(kind: type[nn.Conv2d]) -> None:
    """A feature map 33 wide, as of a crop of 513 at output stride 16, where the error of bf16 is as large as the gradient."""
    torch.manual_seed(0)
    conv = kind(32, 32, 3, padding=2, dilation=2, groups=32, bias=False).to(memory_format=torch.channels_last)
    x_BCHW = torch.randn(2, 32, 33, 33).contiguous(memory_format=torch.channels_last)
    expected = gradients(conv, x_BCHW, bf16=False)
    assert exclude_dilated_depthwise_from_bf16(conv, torch.bfloat16, CPU) == 1
    assert isinstance(conv, kind)
    for _ in range(3):
        for found, right in zip(gradients(conv, x_BCHW, bf16=True), expected, strict=True):
            torch.testing.assert_close(found, right)
    conv = copy.deepcopy(conv)  # as the EMA is made
    torch.testing.assert_close(gradients(conv, x_BCHW, bf16=True)[0], expected[0])


def test_every_other_layer_stays_in_bf16() -> None:
    """Float32 are the dilated depthwise layers of the last stages and of the three atrous branches, and no others."""
    net = deeplabzoo.create("deeplabv3plus_mobilenetv2")
    layers = {name for name, one in net.named_modules() if isinstance(one, nn.Conv2d)}
    dilated = {name for name in layers if net.get_submodule(name).groups > 1 and max(net.get_submodule(name).dilation) > 1}
    assert exclude_dilated_depthwise_from_bf16(net, None, CPU) == 0
    assert exclude_dilated_depthwise_from_bf16(net, torch.bfloat16, torch.device("cuda")) == 0
    assert exclude_dilated_depthwise_from_bf16(net, torch.bfloat16, CPU) == len(dilated)
    assert {f"head.aspp.branches.{branch}.depthwise.conv" for branch in (1, 2, 3)} < dilated
    assert exclude_dilated_depthwise_from_bf16(net, torch.bfloat16, CPU) == 0, "a second call changes nothing"
    net.train()
    types = {}
    for name in layers:
        net.get_submodule(name).register_forward_hook(lambda _, inputs, out, name=name: types.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 3, 65, 65))
    assert {name for name, dtype in types.items() if dtype is torch.float32} == dilated
