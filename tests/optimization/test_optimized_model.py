"""`optimize()`, backends by name, and optimized models in Predictor and `evaluate`."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, prune

import deeplabzoo
from deeplabzoo.errors import UsageError
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization import optimized_model
from deeplabzoo.optimization.optimized_model import (
    ENGINES,
    EngineTime,
    OptimizedDeepLab,
    TensorState,
    cached_engine,
    fastest_engine,
    optimize,
)
from deeplabzoo.processing.preprocessing import image_labels, prepare


def small_net(**config: int) -> DeepLab:
    torch.manual_seed(0)
    net = DeepLab(DeepLabConfig(architecture="deeplabv3plus", encoder="mobilenetv2_050", num_classes=5, **config)).eval()
    torch.nn.init.normal_(net.head.classifier.weight, std=1.0)
    return net


def test_an_optimized_model_equals_the_model() -> None:
    """Calls, logits, labels and attributes are those of the model."""
    net, image = small_net(), torch.randn(2, 3, 65, 98)
    fast = net.optimize()
    with torch.inference_mode():
        logits, labels = net(image), net.predict_labels(image)
    torch.testing.assert_close(fast(image), logits, rtol=0, atol=1e-4 * float(logits.abs().max()))
    assert fast(image).shape == (2, 5, 65, 98)
    assert (fast.predict_labels(image).long() == labels).float().mean() > 0.999
    assert (fast.engine, fast.precision, fast.num_classes, fast.output_stride) == ("torch", "fp32", 5, 16)
    assert (fast.config, fast.classes, fast.palette, fast.device) == (net.config, net.classes, net.palette, net.device)


def test_an_optimized_model_rejects_what_the_model_rejects() -> None:
    """Invalid tensors raise the same error for every backend."""
    fast = small_net().optimize()
    with pytest.raises(UsageError, match="B x 3 x H x W"):
        fast(torch.randn(1, 4, 65, 65))
    with pytest.raises(UsageError, match="normalized float image"):
        fast.predict_labels(torch.zeros(1, 3, 65, 65, dtype=torch.uint8))


def test_optimize_is_a_snapshot() -> None:
    """An optimized model does not change with the model, and `current` becomes False."""
    net, image = small_net(), torch.randn(1, 3, 65, 65)
    fast = net.optimize()
    before = fast(image)
    assert fast.current
    with torch.no_grad():
        net.head.classifier.weight.mul_(-1)
    assert not fast.current
    assert torch.equal(fast(image), before)


def test_a_predictor_never_serves_stale_weights() -> None:
    """After any change of the model between two images, the second is predicted by the changed model."""
    photo = np.random.default_rng(0).integers(0, 256, (65, 65, 3), np.uint8)
    net = small_net()
    predictor = Predictor(net, device="cpu")

    def expected() -> np.ndarray:
        return Predictor(net.optimize(), device="cpu")(photo).labels

    first = predictor(photo).labels
    assert np.array_equal(first, expected())
    with torch.no_grad():
        net.head.classifier.weight.mul_(-1)
    assert not np.array_equal(predictor(photo).labels, first)
    assert np.array_equal(predictor(photo).labels, expected())
    net.reset_classifier(2)
    torch.nn.init.normal_(net.head.classifier.weight, std=1.0)
    assert predictor(photo).labels.max() <= 1
    net.set_output_stride(8)
    assert np.array_equal(predictor(photo).labels, expected())


def test_a_predictor_builds_its_optimized_model_once(caplog: pytest.LogCaptureFixture) -> None:
    """Unchanged weights are fused once, and the start-up time is logged once."""
    predictor = Predictor(small_net(), device="cpu")
    photo = np.zeros((65, 65, 3), np.uint8)
    predictor([photo, photo, photo])
    assert caplog.text.count("engine torch, fp32: ready after") == 1


def test_unknown_engines_and_precisions_are_rejected() -> None:
    """The error suggests the nearest name; an unsupported precision is never replaced silently."""
    net = small_net()
    with pytest.raises(UsageError, match="Did you mean 'torch'"):
        net.optimize("torhc")
    with pytest.raises(UsageError, match="Unknown precision 'fp23'"):
        net.optimize(precision="fp23")
    with pytest.raises(UsageError, match="fp16 is no faster"):
        net.optimize(precision="fp16")
    with pytest.raises(UsageError, match="The engine 'torch' runs"):
        net.optimize(precision="int8")


def test_bf16_is_rejected_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated bf16 is slower than fp32 and less accurate."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    with pytest.raises(UsageError, match="no bf16 arithmetic"):
        small_net().optimize(precision="bf16")


def test_bf16_returns_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is used inside only; the logits are float32 and close to those of fp32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    net, image = small_net(), torch.randn(1, 3, 65, 65)
    low, exact = net.optimize(precision="bf16").forward_low_resolution(image), net.optimize().forward_low_resolution(image)
    assert low.dtype == torch.float32
    assert (low - exact).abs().max() < 0.1 * exact.abs().max()


def test_auto_measures_once_and_never_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The choice is logged and cached by model, size, precision and thread count; a second call does not measure."""
    monkeypatch.setenv("DEEPLABZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(optimized_model, "_installed_engines", lambda net: ["torch"])
    net = small_net()
    assert cached_engine(net, (65, 65)) is None
    assert net.optimize("auto", size=(65, 65)).engine == "torch"
    assert "engine auto: torch (torch" in caplog.text
    assert cached_engine(net, (65, 65)) == "torch"
    assert cached_engine(net, (65, 97)) is None
    monkeypatch.setattr(optimized_model, "measure_engines", lambda *_: pytest.fail("measured again"))
    assert fastest_engine(net, (65, 65)) == "torch"
    assert "compiled" in ENGINES
    assert "compiled" not in optimized_model._CANDIDATES


def test_a_choice_that_is_no_longer_installed_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cached backend that was uninstalled is ignored."""
    monkeypatch.setenv("DEEPLABZOO_CACHE", str(tmp_path))
    net = small_net()
    monkeypatch.setattr(optimized_model, "_installed_engines", lambda net: ["torch", "openvino"])
    monkeypatch.setattr(optimized_model, "measure_engines", lambda *_: [EngineTime("openvino", 1.0, 0.0)])
    assert fastest_engine(net) == "openvino"
    monkeypatch.setattr(optimized_model, "_installed_engines", lambda net: ["torch"])
    assert cached_engine(net) is None


def test_a_predictor_measures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Predictor does not time the backends at its first image."""
    monkeypatch.setenv("DEEPLABZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(optimized_model, "measure_engines", lambda *_: pytest.fail("measured"))
    assert Predictor(small_net(), device="cpu")(np.zeros((65, 65, 3), np.uint8)).labels.shape == (65, 65)


def test_a_model_with_its_own_forward_cannot_be_optimized() -> None:
    """Layer fusion would ignore the forward of a subclass, so it is rejected."""

    class Constant(DeepLab):
        def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(image_BCHW), 5, 4, 4)

    with pytest.raises(UsageError, match="Constant computes its logits in its own way"):
        optimize(Constant(DeepLabConfig(architecture="deeplabv3", encoder="mobilenetv2_050", num_classes=5)))


def test_evaluate_accepts_an_optimized_model_and_rejects_an_outdated_one(tmp_path: Path) -> None:
    """mIoU is that of the model without optimization; an outdated optimized model raises an error."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "val" / folder).mkdir(parents=True)
    for index in range(2):
        Image.fromarray(rng.integers(0, 256, (65, 80, 3), np.uint8)).save(tmp_path / "val" / "images" / f"{index}.png")
        Image.fromarray(rng.integers(0, 5, (65, 80), np.uint8)).save(tmp_path / "val" / "masks" / f"{index}.png")
    net = small_net()
    fast = net.optimize()

    def miou(network: DeepLab | OptimizedDeepLab, **options: str | None) -> float:
        return deeplabzoo.evaluate(network, "folder", tmp_path, "val", progress=False, device="cpu", **options).miou

    assert miou(net) == pytest.approx(miou(net, engine=None), abs=1e-4)
    assert miou(fast) == miou(net)
    with pytest.raises(UsageError, match="output stride 16"):
        deeplabzoo.evaluate(fast, "folder", tmp_path, "val", output_stride=8)
    with torch.no_grad():
        net.head.classifier.weight.mul_(-1)
    with pytest.raises(UsageError, match="has changed since"):
        miou(fast)


@pytest.mark.slow
def test_the_compiled_engine_freezes_its_weights() -> None:
    """Without freezing no convolution is packed, and `compiled` is slower than `torch`."""
    from torch._dynamo.utils import counters

    counters.clear()
    net = deeplabzoo.create("deeplabv3plus_mobilenetv2_050", num_classes=3, encoder_pretrained=False).eval()
    fast = net.optimize("compiled", size=(65, 97))
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] > 40
    for size in ((65, 97), (97, 65)):
        image_BCHW = torch.randn(1, 3, *size)
        with torch.inference_mode():
            expected = net.forward_low_resolution(image_BCHW)
        found = fast.forward_low_resolution(image_BCHW)
        assert (found - expected).abs().max() < 1e-4 * expected.std()


IMAGE_HWC = np.random.default_rng(0).integers(0, 256, (65, 65, 3), np.uint8)


def plain_labels(net: DeepLab) -> np.ndarray:
    """Labels without an optimized model."""
    prepared = prepare(IMAGE_HWC, net.preprocessing)
    with torch.inference_mode():
        return image_labels(net, prepared)


def _ema_like(net: DeepLab) -> None:
    for parameter in net.parameters():
        parameter.data.mul_(0.5).add_(0.01)


def _replace_data(net: DeepLab) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data.flip(0)


def _copy_state(net: DeepLab) -> None:
    for name, tensor in net.state_dict().items():
        if name.endswith("weight"):
            tensor.data.copy_(tensor.roll(1, 0))


def _one_buffer(net: DeepLab) -> None:
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.data.add_(0.5)


def _one_element(net: DeepLab) -> None:
    net.head.classifier.weight.data[3, 7] += 30


@pytest.mark.parametrize("write", [_ema_like, _replace_data, _copy_state, _one_buffer, _one_element])
def test_writes_through_data_are_noticed(write: Callable[[DeepLab], None]) -> None:
    """Writes through `tensor.data`, usual in EMA code, do not change the version counter of a tensor."""
    net = small_net()
    predictor = Predictor(net, device="cpu")
    predictor(IMAGE_HWC)
    fast = net.optimize()
    write(net)
    assert not fast.current
    assert np.array_equal(predictor(IMAGE_HWC).labels, plain_labels(net))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_writes_through_data_are_noticed_in_every_dtype(dtype: torch.dtype) -> None:
    net = small_net().to(dtype)
    state = TensorState(net)
    assert state.matches(net)
    net.head.classifier.weight.data.neg_()
    assert not state.matches(net)


class LoRA(nn.Module):
    """A convolution and a low-rank update beside it, as adapter libraries wrap layers."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _prune(net: DeepLab) -> None:
    prune.l1_unstructured(net.head.classifier, "weight", amount=0.5)


def _prune_encoder(net: DeepLab) -> None:
    conv = next(module for module in net.encoder.modules() if isinstance(module, nn.Conv2d))
    prune.random_unstructured(conv, "weight", amount=0.5)


def _weight_norm(net: DeepLab) -> None:
    parametrizations.weight_norm(net.head.classifier)


def _spectral_norm_encoder(net: DeepLab) -> None:
    conv = next(module for module in net.encoder.modules() if isinstance(module, nn.Conv2d) and module.groups == 1)
    parametrizations.spectral_norm(conv)


def _hook(net: DeepLab) -> None:
    net.head.aspp.register_forward_hook(lambda module, inputs, output: output * 0)


def _pre_hook(net: DeepLab) -> None:
    net.head.classifier.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))


def _lora(net: DeepLab) -> None:
    net.head.classifier = LoRA(net.head.classifier)  # type: ignore[assignment]


def _quantization_aware(net: DeepLab) -> None:
    net.train()
    with warnings.catch_warnings(action="ignore"):  # torch.ao announces the end of an option of its own default
        net.encoder.qconfig = quantization.get_default_qat_qconfig()  # type: ignore[assignment]
        quantization.prepare_qat(net.encoder, inplace=True)
    net.eval()
    net.apply(quantization.disable_observer)  # observers would change the ranges with every image


def _replaced_forward(net: DeepLab) -> None:
    forward = net.head.classifier.forward
    net.head.classifier.forward = lambda x: forward(x).flip(1)  # type: ignore[method-assign]


def _replaced_forward_encoder(net: DeepLab) -> None:
    conv = next(module for module in net.encoder.modules() if isinstance(module, nn.Conv2d))
    forward = conv.forward
    conv.forward = lambda x: -forward(x)  # type: ignore[method-assign]


def _two_layer_classifier(net: DeepLab) -> None:
    net.head.classifier = nn.Sequential(nn.Conv2d(256, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))  # type: ignore[assignment]


def _other_low_level(net: DeepLab) -> None:
    channels = net.head.low_level.conv.in_channels  # type: ignore[union-attr]
    net.head.low_level = nn.Sequential(nn.Conv2d(channels, 48, 1), nn.Tanh())  # type: ignore[assignment]


CHANGES = [
    *(_prune, _prune_encoder, _weight_norm, _spectral_norm_encoder, _hook, _pre_hook, _lora, _quantization_aware),
    *(_replaced_forward, _replaced_forward_encoder, _two_layer_classifier, _other_low_level),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after the first image"])
def test_modified_layers_run_as_they_are(
    change: Callable[[DeepLab], None], late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Pruned, parametrized, hooked and wrapped layers: the labels are the model's own, and one warning says why."""
    net = small_net()
    predictor = Predictor(net, device="cpu")
    if late:
        predictor(IMAGE_HWC)
    change(net)
    net.eval()
    assert np.array_equal(predictor(IMAGE_HWC).labels, plain_labels(net))
    predictor(IMAGE_HWC)
    assert caplog.text.count("running the model without layer fusion, since ") == 1
    with pytest.raises(UsageError, match="cannot be optimized, since"):
        net.optimize()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_run_in_float32(dtype: torch.dtype) -> None:
    """Its weights are exact in float32; the model itself keeps its type."""
    net = small_net().to(dtype)
    image_BCHW = torch.randn(1, 3, 65, 65)
    found = net.optimize("torch")(image_BCHW)
    assert next(net.parameters()).dtype is dtype
    expected = net.float()(image_BCHW).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_an_engine_that_is_no_text_and_a_model_without_values_are_refused() -> None:
    """One sentence each."""
    with pytest.raises(UsageError, match="Unknown engine None"):
        Predictor(small_net(), engine=None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="holds no values"):
        Predictor(small_net().to("meta"))
