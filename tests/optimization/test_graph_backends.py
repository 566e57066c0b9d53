"""Backends onnxruntime and openvino: logits of the model, one cached graph, int8 calibrated on real images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.parity import randomised
from PIL import Image

import deeplabzoo
from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.hub.download import cache_folder
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization import graph_backend
from deeplabzoo.optimization.onnx_export import cached_graph
from deeplabzoo.optimization.quantization import save_quantized
from deeplabzoo.processing.preprocessing import prepare

ENGINES = pytest.mark.parametrize(
    "build", [graph_backend.build_onnxruntime, graph_backend.build_openvino], ids=["onnxruntime", "openvino"]
)
IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"


def network(seed: int = 0, **fields: Any) -> DeepLab:
    torch.manual_seed(seed)
    small = {"architecture": "deeplabv3plus", "encoder": "mobilenetv2_050", "num_classes": 5}
    net = DeepLab(DeepLabConfig(**{**small, "head_channels": 32, "decoder_channels": 32, **fields}))
    randomised(net)
    return net.eval()


def cached() -> list[str]:
    return sorted(path.name for path in (cache_folder() / "graphs").glob("*"))


def furthest(net: DeepLab, run: Any, *shape: int) -> float:
    image_BCHW = torch.randn(*shape)
    with torch.inference_mode():
        expected = net.forward_low_resolution(image_BCHW)
    given = run(image_BCHW)
    assert given.shape == expected.shape
    assert given.dtype == torch.float32
    assert given.is_contiguous(memory_format=torch.channels_last)
    return float((given - expected).abs().max() / expected.abs().max())


@ENGINES
def test_logits_are_the_models_at_any_size(build: Callable[..., graph_backend.Forward]) -> None:
    """New sizes, repeated sizes (run by a graph of fixed size), batches of 1 and 3."""
    net = network()
    run = build(net)
    for shape in ((1, 65, 97), (3, 64, 33), (3, 64, 33), (3, 64, 33), (1, 129, 65), (1, 65, 97), (1, 65, 97)):
        assert furthest(net, run, shape[0], 3, *shape[1:]) < 1e-4


@ENGINES
def test_the_denormal_setting_of_the_caller_is_unchanged(build: Callable[..., graph_backend.Forward]) -> None:
    """A backend that flushes denormals to zero does so only while it runs."""
    smallest = np.float64(5e-324)
    run = build(network())
    assert smallest * 1.0 != 0
    run(torch.randn(1, 3, 65, 65))
    assert smallest * 1.0 != 0


@ENGINES
def test_the_graph_is_written_once(
    build: Callable[..., graph_backend.Forward], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A second start reads the cache, other weights get another graph, and the start-up time is logged."""
    caplog.set_level("INFO", logger="deeplabzoo")
    net = network()
    build(net)
    first = cached()
    assert len(first) == 1
    assert "ONNX graph written in" in caplog.text
    assert "ready after" in caplog.text
    caplog.clear()
    build(net)
    assert cached() == first
    assert "ONNX graph written" not in caplog.text
    build(network(seed=1))
    assert len(cached()) == 2
    assert not [name for name in cached() if name.endswith(".part")]


def test_both_engines_share_the_graph() -> None:
    """Both backends read the same file."""
    net = network()
    graph_backend.build_onnxruntime(net)
    graph_backend.build_openvino(net)
    assert len(cached()) == 1


@ENGINES
def test_an_unsupported_precision_is_rejected(build: Callable[..., graph_backend.Forward]) -> None:
    """The error lists the supported ones."""
    with pytest.raises(UsageError, match="not 'fp16'"):
        build(network(), "fp16")


@ENGINES
def test_a_missing_library_is_named_with_its_extra(
    build: Callable[..., graph_backend.Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the extra to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeepLabZooError, match=r"install it with `pip install"):
        build(network())


@ENGINES
def test_int8_without_images_is_rejected(build: Callable[..., graph_backend.Forward]) -> None:
    """int8 requires calibration images; the error says how many and in which form."""
    net = network()
    for none in (None, []):
        with pytest.raises(UsageError, match="precision='int8' needs calibration="):
            build(net, "int8", calibration=none)


@pytest.mark.slow
def test_int8_of_openvino_labels_an_image() -> None:
    """Calibrated on two images, 97 % of the pixels keep their label; a second start reads the model from the cache."""
    net = deeplabzoo.create("deeplabv3plus_mobilenetv2_person", pretrained=True)
    images = [np.asarray(Image.open(IMAGES / name).convert("RGB").resize((160, 160))) for name in ("astronaut.jpg", "cat.jpg")]
    run = graph_backend.build_openvino(net, "int8", calibration=images)
    image_BCHW = prepare(images[0], net.preprocessing).tensor_1CHW
    with torch.inference_mode():
        expected = net.forward_low_resolution(image_BCHW)
    low = run(image_BCHW)
    assert not torch.allclose(low, expected, rtol=1e-4)
    assert float((low.argmax(1) == expected.argmax(1)).float().mean()) > 0.97
    files = cached()
    assert torch.equal(graph_backend.build_openvino(net, "int8", calibration=images)(image_BCHW), low)
    assert cached() == files


def test_int8_labels_an_image_and_can_be_saved_and_loaded(tmp_path: Path) -> None:
    """Calibrated on the same images, 97 % of the pixels keep their label; a saved graph gives identical logits."""
    net = deeplabzoo.create("deeplabv3plus_mobilenetv2_person", pretrained=True)
    images = []
    for name in ("astronaut.jpg", "cat.jpg"):
        image = Image.open(IMAGES / name).convert("RGB").resize((160, 160))
        image.save(tmp_path / f"{name}.png")
        images.append(np.asarray(image))
    run = graph_backend.build_onnxruntime(net, "int8", calibration=tmp_path)
    image_BCHW = prepare(images[0], net.preprocessing).tensor_1CHW
    with torch.inference_mode():
        expected = net.forward_low_resolution(image_BCHW)
    low = run(image_BCHW)
    assert not torch.allclose(low, expected, rtol=1e-4)  # quantized indeed
    assert float((low.argmax(1) == expected.argmax(1)).float().mean()) > 0.97
    assert len(cached()) == 2
    saved = tmp_path / "mine.onnx"
    save_quantized(net, cached_graph(net, graph_backend.onnxruntime_runner), tmp_path, saved)
    assert len(cached()) == 2
    loaded = graph_backend.build_onnxruntime(net, "int8", calibration=saved)
    assert torch.equal(run(image_BCHW), loaded(image_BCHW))
    with pytest.raises(UsageError, match="not an int8 graph of this model"):
        graph_backend.build_onnxruntime(network(seed=1), "int8", calibration=saved)


def test_int8_takes_a_list_of_arrays(tmp_path: Path) -> None:
    """Arrays and files with equal pixels share one cached graph."""
    net = network()
    images = [np.random.default_rng(index).integers(0, 255, (64, 80, 3), dtype=np.uint8) for index in range(2)]
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    graph_backend.build_onnxruntime(net, "int8", calibration=images)
    graph_backend.build_onnxruntime(net, "int8", calibration=tmp_path)
    assert len(cached()) == 2
