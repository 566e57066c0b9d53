"""Fused models compute what the model does, compared with float64, for every head and a sample of encoders."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.fused_conv import FusedResidual
from deeplabzoo.optimization.fused_model import build_fused_model
from deeplabzoo.optimization.fusion import fold_batchnorms
from deeplabzoo.optimization.onednn import PackedConv, PackedLinear, onednn_available, prepack


@pytest.fixture(autouse=True)
def _flushing_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


HEADS: dict[str, dict[str, Any]] = {
    "v3": {"architecture": "deeplabv3"},
    "v3_no_refine": {"architecture": "deeplabv3", "refine_conv": False},
    "v3_no_rates": {"architecture": "deeplabv3", "atrous_rates": ()},
    "v3_pooling_first": {"architecture": "deeplabv3", "pooling_first": True},
    "v3_pooling_bare": {"architecture": "deeplabv3", "pooling_norm": False},
    "v3_pooling_window": {"architecture": "deeplabv3", "pooling_window": (64, 48), "align_corners": True},
    "v3_pooling_window_kernel3": {"architecture": "deeplabv3", "pooling_window": (64, 48), "aspp_project_kernel": 3},
    "v3_kernel3": {"architecture": "deeplabv3", "aspp_project_kernel": 3, "pooling_first": True},
    "v3_separable": {"architecture": "deeplabv3", "aspp_separable": True},
    "v3_group": {"architecture": "deeplabv3", "norm": "group"},
    "v3_aux": {"architecture": "deeplabv3", "aux_head": True},
    "v3plus": {"architecture": "deeplabv3plus"},
    "v3plus_low_first": {"architecture": "deeplabv3plus", "decoder_low_level_first": True, "align_corners": True},
    "v3plus_dense": {"architecture": "deeplabv3plus", "decoder_separable": False, "aspp_separable": False},
    "v3plus_refine_bare_depthwise": {"architecture": "deeplabv3plus", "decoder_refine_conv": True, "depthwise_norm": False},
    "v3plus_no_decoder": {"architecture": "deeplabv3plus", "decoder_convs": 0},
    "v3plus_no_decoder_low_first": {"architecture": "deeplabv3plus", "decoder_convs": 0, "decoder_low_level_first": True},
    "v3plus_one_conv": {"architecture": "deeplabv3plus", "decoder_convs": 1},
    "v3plus_group": {"architecture": "deeplabv3plus", "norm": "group"},
}
ENCODERS = ("resnet18c", "resnet50", "mobilenetv2", "mobilenetv3", "efficientnetb0", "xception41", "regnety002", "convnextatto",
            "mobilevitxxs", "mobilevitv2w050", "mobilenetv4small")  # fmt: skip


def network(seed: int = 0, **config: Any) -> DeepLab:
    """Return a model with non-trivial batch norm parameters and statistics, whose feature maps keep their variance."""
    torch.manual_seed(seed)
    net = DeepLab(DeepLabConfig(num_classes=5, **{"encoder": "mobilenetv2_050", "head_channels": 32, **config})).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    nn.init.normal_(net.head.classifier.weight, std=0.2)
    with torch.no_grad():
        # The pooled branch has one value per image: a variance of two values may be nearly 0 and amplify rounding.
        pooled = {id(module) for module in net.head.aspp.pool.modules()}
        norms = [one for one in net.modules() if isinstance(one, nn.BatchNorm2d) and id(one) not in pooled]
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        net.forward_low_resolution(torch.randn(2, net.config.in_chans, 97, 129))
    return net.eval()


def assert_as_exact_as_eager(packed: bool, size: tuple[int, int] = (65, 98), batch: int = 2, **config: Any) -> None:
    net = network(**config)
    image = torch.randn(batch, net.config.in_chans, *size)
    with torch.inference_mode():
        form = build_fused_model(net)
        if packed:
            prepack(form)
        ours, eager = form(image), net.forward_low_resolution(image)
        truth = net.double().forward_low_resolution(image.double())
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)
    error, unavoidable = ((one.double() - truth).square().mean().sqrt() for one in (ours, eager))
    assert error <= 2 * unavoidable, (error, unavoidable)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_as_exact_as_eager(head: str, packed: bool) -> None:
    """For every head, the error of the fused model against float64 is at most twice that of the model itself."""
    assert_as_exact_as_eager(packed, **HEADS[head])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders_are_as_exact_as_eager(encoder: str) -> None:
    """Folding and packing does not increase the error, for encoders of every kind."""
    assert_as_exact_as_eager(True, batch=1, encoder=encoder, architecture="deeplabv3plus")


@pytest.mark.parametrize("options", [{"output_stride": 8, "encoder": "drnd54"}, {"encoder_padding": "same"}, {"in_chans": 1}])
def test_options_of_encoders_are_as_exact_as_eager(options: dict[str, Any]) -> None:
    """TensorFlow's padding at even and odd sizes, an encoder of this package, and other channel counts are supported."""
    for size in ((97, 129), (64, 98)):
        assert_as_exact_as_eager(True, size, 1, architecture="deeplabv3", **options)


@pytest.mark.parametrize("encoder", ["resnet50", "mobilenetv2", "mobilenetv3"])
def test_no_batch_norm_is_left(encoder: str) -> None:
    """All batch norms and activations of these encoders are folded; each that is not costs another pass over its map."""
    form = build_fused_model(network(encoder=encoder, architecture="deeplabv3plus"))
    left = [
        type(one).__name__ for one in form.modules() if isinstance(one, nn.BatchNorm2d | nn.Conv2d | nn.Hardswish | nn.ReLU6)
    ]
    assert left == []


@pytest.mark.skipif(not onednn_available(), reason="this torch has no oneDNN")
def test_linear_layers_are_as_exact_as_eager_when_packed() -> None:
    """The linear layers of attention and MLP blocks run as 1x1 convolutions."""
    form = build_fused_model(network(encoder="mobilevitxxs", architecture="deeplabv3"))
    prepack(form)
    assert any(isinstance(module, PackedLinear) for module in form.modules())
    assert not any(type(module) is nn.Linear for module in form.modules())
    assert_as_exact_as_eager(True, encoder="mobilevitxxs", architecture="deeplabv3")


@pytest.mark.parametrize(("encoder", "blocks"), [("resnet18", 8), ("resnet50", 16), ("mobilenetv2", 10), ("mobilenetv3", 10)])
def test_shortcuts_are_added_by_convolutions(encoder: str, blocks: int) -> None:
    """Every residual block of these encoders is fused, and a second call is equal: no input was overwritten."""
    form = build_fused_model(network(encoder=encoder, architecture="deeplabv3plus"))
    assert sum(isinstance(module, FusedResidual) for module in form.modules()) == blocks
    prepack(form)
    image = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        first = form(image)
        before = image.clone()
        assert torch.equal(form(image), first)
    assert torch.equal(image, before)


def test_the_original_model_is_unchanged() -> None:
    """Training of the original model can continue after it was fused."""
    net = network(architecture="deeplabv3plus").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    layout = [(name, type(module)) for name, module in net.named_modules()]
    inplace = [getattr(module, "inplace", None) for module in net.modules()]
    build_fused_model(net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [(name, type(module)) for name, module in net.named_modules()] == layout
    assert [getattr(module, "inplace", None) for module in net.modules()] == inplace
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


class TwoReaders(nn.Module):
    """A convolution whose output is read by a batch norm and by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_a_batchnorm_whose_input_has_another_consumer_is_not_folded(caplog: pytest.LogCaptureFixture) -> None:
    """Folding it would change the input of the other reader; the remaining batch norm is logged."""
    block, x = TwoReaders().eval(), torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        expected = block(x)
        fold_batchnorms(block, x)
        assert torch.equal(block(x), expected)
    assert isinstance(block.norm, nn.BatchNorm2d)
    assert "1 BatchNorm2d in the encoder could not be folded" in caplog.text


def test_packed_weights_serve_every_size_and_batch() -> None:
    """Weights are packed for the size of the first image and are valid for other sizes and batches."""
    if not onednn_available():
        pytest.skip("this torch has no oneDNN")
    net = network(architecture="deeplabv3plus")
    with torch.inference_mode():
        form = build_fused_model(net)
        prepack(form)
        for shape in ((1, 3, 65, 65), (3, 3, 97, 161), (1, 3, 33, 47)):
            image = torch.randn(shape)
            expected = net.forward_low_resolution(image)
            torch.testing.assert_close(form(image), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert all(one.packed is not None and one.weight.numel() == 0 for one in form.modules() if isinstance(one, PackedConv))
