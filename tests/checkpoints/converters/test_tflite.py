"""TensorFlow Lite files become our networks exactly, whatever dialect they are written in, and bad ones become one sentence.

The oracle is the TFLite runtime, on files that the tests write themselves (tflite_writer.py).
"""

import functools
import random
import struct
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
import torch
from torch import nn

from deeplabzoo.checkpoints.converters.tensorflow import tflite_mobilenetv2
from deeplabzoo.checkpoints.converters.tensorflow.tflite import can_convert, convert
from deeplabzoo.checkpoints.converters.tensorflow.tflite_graph import Table
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoders import build_encoder

pytest.importorskip("ai_edge_litert", reason="the TFLite runtime is not installed")
from ai_edge_litert import schema_py_generated as schema
from helpers.tflite_writer import Dialect, folded, run_tflite, write_classifier, write_deeplab

TENSORFLOW = DeepLabConfig(
    architecture="deeplabv3",
    encoder="mobilenetv2_050",
    num_classes=5,
    output_stride=16,
    atrous_rates=(),
    head_channels=32,
    pooling_first=True,
    refine_conv=False,
    align_corners=True,
    encoder_padding="same",
)
"""The head of TensorFlow's mobile models, small."""


def randomised_deeplab(**changes: object) -> DeepLab:
    """Return a network with random weights whose batch norms have seen data, so that no activation dies out or explodes."""
    torch.manual_seed(0)
    net = DeepLab(DeepLabConfig.from_dict(TENSORFLOW.to_dict() | changes))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # running statistics are the plain average of what was seen
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    with torch.no_grad():
        net.train()(torch.rand(2, 3, 65, 65) * 2 - 1)
        net.head.classifier.weight.mul_(30)
    return net.eval()


def converted(data: bytes, tmp_path: Path) -> Checkpoint:
    path = tmp_path / "net.tflite"
    path.write_bytes(data)
    assert can_convert(path)
    return convert(path)


def logits_of(found: Checkpoint, image_BHWC: np.ndarray) -> np.ndarray:
    assert found.config is not None
    net = DeepLab.from_weights(found.config, found.state_dict)
    with torch.inference_mode():
        return net(torch.from_numpy(image_BHWC).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)


LOGITS = Dialect(argmax=False)
VARIANTS = {
    "odd size": ({}, (65, 97), {}),
    "even size": ({}, (64, 96), {}),
    "one odd side, one even": ({}, (65, 64), {}),
    "width 0.35": ({"encoder": "mobilenetv2_035"}, (65, 65), {}),
    "width 0.75": ({"encoder": "mobilenetv2_075"}, (65, 65), {}),
    "width 1": ({"encoder": "mobilenetv2_100"}, (65, 65), {}),
    "width 1.4": ({"encoder": "mobilenetv2_140"}, (65, 65), {}),
    "deeper": ({"encoder": "mobilenetv2_110d"}, (65, 65), {}),
    "output stride 8": ({"output_stride": 8}, (65, 97), {}),
    "output stride 32": ({"output_stride": 32}, (65, 97), {}),
    "two classes": ({"num_classes": 2}, (33, 33), {}),
    "pooled branch last": ({"pooling_first": False}, (65, 65), {}),
    "atrous branches": ({"atrous_rates": (1, 2, 3), "aspp_separable": False}, (97, 65), {}),
    "separable atrous branches": ({"atrous_rates": (2, 3), "aspp_separable": True, "output_stride": 8}, (65, 65), {}),
    "branches in another order": ({"atrous_rates": (1, 2)}, (65, 65), {"reverse_branches": True}),
    "3x3 after the pyramid": ({"refine_conv": True, "pooling_first": False}, (65, 65), {}),
    "pixel centres": ({"align_corners": False}, (65, 97), {"half_pixel_centers": True}),
    "mean for pooling": ({}, (65, 97), {"pool_by_mean": True}),
    "dilation by batches": ({"output_stride": 8}, (65, 97), {"batches_around_dilation": True}),
    "dilation by batches, even size": ({"output_stride": 16}, (80, 64), {"batches_around_dilation": True}),
    "atrous branches by batches": (
        {"atrous_rates": (2, 3), "aspp_separable": False},
        (65, 65),
        {"batches_around_dilation": True},
    ),
    "explicit 'SAME' padding": ({}, (64, 96), {"explicit_padding": True}),
    "symmetric padding": ({"encoder_padding": "symmetric"}, (64, 96), {"explicit_padding": True}),
    "bias and activation apart": ({}, (65, 65), {"separate_steps": True}),
    "bias apart, dilation by batches": ({}, (65, 65), {"separate_steps": True, "batches_around_dilation": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_float_files_convert_exactly(name: str, tmp_path: Path) -> None:
    """Same logits as the TFLite runtime, and the network's own configuration read back off the graph."""
    changes, (height, width), dialect = VARIANTS[name]
    net = randomised_deeplab(**changes)
    data = write_deeplab(net, height, width, Dialect(argmax=False, **dialect))
    found, image = converted(data, tmp_path), random_image(height, width)
    expected = run_tflite(data, image)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits_of(found, image), expected, atol=2e-4 * expected.std() + 1e-5)
    config = net.config
    assert found.config is not None
    if not dialect.get("reverse_branches"):
        assert found.config == config
    assert found.encoder == config.encoder
    assert found.preprocessing.size == (height, width)
    assert found.preprocessing.mean == pytest.approx((0.5,) * 3)
    assert found.preprocessing.std == pytest.approx((0.5,) * 3)
    assert any("not 8-bit" in note for note in found.notes)


WIDTHS = {
    # width 0.5 with channels that are no multiples of 8, as TensorFlow's DeepLab has them
    "0.5, not rounded": ("mobilenetv2_050", {1: 12}, {}),
    "0.5, not rounded, atrous": ("mobilenetv2_050", {1: 12, 6: 150}, {"atrous_rates": (1, 2), "aspp_separable": True}),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_that_timm_has_not_convert_exactly(width: str, tmp_path: Path) -> None:
    """Fewer channels than the next encoder has are filled with zeros, which change nothing; the loading line says so."""
    encoder, narrow, changes = WIDTHS[width]
    net = randomised_deeplab(encoder=encoder, **changes)
    data = write_deeplab(net, 65, 65, Dialect(argmax=False, narrow=narrow))
    found, image = converted(data, tmp_path), random_image(65, 65)
    assert found.encoder == encoder
    assert any("filled with zero channels" in note for note in found.notes)
    assert found.state_dict["encoder.blocks.1.0.conv_pwl.weight"][narrow[1] :].abs().sum() == 0
    expected = run_tflite(data, image)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits_of(found, image), expected, atol=2e-4 * expected.std() + 1e-5)


def test_float16_weights_convert_exactly(tmp_path: Path) -> None:
    """Half-precision files keep their weights behind DEQUANTIZE operators."""
    data = write_deeplab(randomised_deeplab(), 65, 65, Dialect(argmax=False, weights="float16"))
    image = random_image(65, 65)
    expected = run_tflite(data, image)
    np.testing.assert_allclose(logits_of(converted(data, tmp_path), image), expected, atol=2e-3 * expected.std())


@pytest.mark.parametrize(("weights", "first"), [("uint8", 0), ("int8", -128), ("hybrid", None)])
def test_8_bit_files_convert_up_to_their_rounding(weights: str, first: int | None, tmp_path: Path) -> None:
    """Per tensor and per channel: every weight is within half a step of the one that was rounded.

    The logits only correlate: the runtime rounds activations too, which 50 untrained layers amplify. On the published
    files, which were trained to be rounded, labels are compared (checkpoints/converters/test_tflite_parity.py).
    """
    net = randomised_deeplab()
    data = write_deeplab(net, 65, 65, Dialect(argmax=False, weights=weights))
    found = converted(data, tmp_path)
    convolutions = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    norms = iter([(name, module) for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)])
    for name, convolution in convolutions.items():
        norm_name, norm = ("head.classifier", None) if name == "head.classifier" else next(norms)
        weight, bias = folded(convolution, norm)
        np.testing.assert_allclose(found.state_dict[f"{norm_name}.bias"].numpy(), bias, rtol=1e-3, atol=1e-2)
        per_tensor, per_channel = weight.max() - min(0, weight.min()), np.abs(weight).max((1, 2, 3), keepdims=True)
        step = per_tensor / 255 if weights == "uint8" else per_channel / 127
        assert (np.abs(found.state_dict[f"{name}.weight"].numpy() - weight) <= 0.51 * step + 1e-7).all(), name
    photo = np.random.default_rng(3).integers(0, 256, (1, 65, 65, 3))
    fed = (photo / 127.5 - 1).astype(np.float32) if first is None else (photo + first).astype(weights)
    expected = run_tflite(data, fed)
    mean, std = np.float32(found.preprocessing.mean), np.float32(found.preprocessing.std)
    ours = logits_of(found, ((photo / 255 - mean) / std).astype(np.float32))
    assert found.preprocessing.mean[0] == pytest.approx(0.5, abs=0.01)
    assert any("not 8-bit" in note for note in found.notes) == (first is None)
    assert np.corrcoef(ours.reshape(-1), expected.reshape(-1))[0, 1] > 0.7


def test_final_argmax_is_left_out(tmp_path: Path) -> None:
    """With it the file gives labels; our logits have their maximum there, and the loading line says what was dropped."""
    data = write_deeplab(randomised_deeplab(), 65, 65)
    found, image = converted(data, tmp_path), random_image(65, 65)
    assert found.dropped == ("ARG_MAX",)
    assert (logits_of(found, image).argmax(3) == run_tflite(data, image)).mean() > 0.999


def test_logits_at_low_resolution_convert(tmp_path: Path) -> None:
    """A file that leaves the upsampling to its user does not say how: align_corners is assumed, and said."""
    net = randomised_deeplab()
    data = write_deeplab(net, 65, 65, Dialect(argmax=False, upsample=False))
    found, image = converted(data, tmp_path), random_image(65, 65)
    assert found.config is not None
    assert found.config.align_corners
    assert any("not upsampled" in note for note in found.notes)
    ours = DeepLab.from_weights(found.config, found.state_dict)
    with torch.inference_mode():
        low = ours.forward_low_resolution(torch.from_numpy(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    expected = run_tflite(data, image)
    np.testing.assert_allclose(low, expected, atol=2e-4 * expected.std())


def test_scaling_inside_the_graph_becomes_preprocessing(tmp_path: Path) -> None:
    """Files that take 0 to 255 and scale it themselves must not be scaled twice."""
    data = write_deeplab(randomised_deeplab(), 65, 65, Dialect(argmax=False, scaling_in_graph=True))
    found = converted(data, tmp_path)
    assert found.preprocessing.mean == pytest.approx((0.5,) * 3)
    assert found.preprocessing.std == pytest.approx((0.5,) * 3)
    photo = np.random.default_rng(3).integers(0, 256, (1, 65, 65, 3)).astype(np.float32)
    expected = run_tflite(data, photo)
    np.testing.assert_allclose(logits_of(found, photo / 127.5 - 1), expected, atol=2e-4 * expected.std())


def test_class_names_come_from_the_file_or_are_reported_as_assumed(tmp_path: Path) -> None:
    """Attached labels win; 21 classes are VOC's; any other count gets numbered names, never a wrong data set's."""
    net = randomised_deeplab(num_classes=3)
    assert converted(write_deeplab(net, 33, 33), tmp_path).classes == ("class_0", "class_1", "class_2")
    named = converted(write_deeplab(net, 33, 33, Dialect(labels=("sky", "sea", "land"))), tmp_path)
    assert named.classes == ("sky", "sea", "land")
    assert not any("names no classes" in note for note in named.notes)
    wrong = converted(write_deeplab(net, 33, 33, Dialect(labels=("sky", "sea"))), tmp_path)
    assert wrong.classes == ("class_0", "class_1", "class_2")
    voc = converted(write_deeplab(randomised_deeplab(num_classes=21), 33, 33), tmp_path)
    assert voc.classes is not None
    assert voc.classes[15] == "person"
    assert len(voc.palette or ()) == 21


@pytest.mark.parametrize("fully_connected", [False, True])
def test_a_classifier_gives_an_encoder(fully_connected: bool, tmp_path: Path) -> None:
    """Its own head is dropped and said so; the features equal those of the network it was written from."""
    net = randomised_deeplab(encoder="mobilenetv2_050", output_stride=32)
    found = converted(write_classifier(net.encoder, 64, 11, fully_connected=fully_connected), tmp_path)
    assert found.config is None
    assert found.classes is None
    assert found.encoder == "mobilenetv2_050"
    assert found.dropped == ("SOFTMAX", "classifier (1280 -> 11)", "image pooling", "conv_head (160 -> 1280)")
    encoder, _ = build_encoder(DeepLabConfig.from_dict(net.config.to_dict() | {"output_stride": 8}))
    encoder.load_state_dict(found.state_dict, strict=True)
    strided, _ = build_encoder(net.config)
    strided.load_state_dict(found.state_dict, strict=True)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        ours, theirs = strided.eval()(image)[-1], net.encoder(image)[-1]
    assert (ours - theirs).abs().max() < 1e-4 * theirs.std()


def changed(data: bytes, change: object) -> bytes:
    """Return the file after `change(model)` on its unpacked schema."""
    model = schema.ModelT.InitFromPackedBuf(bytearray(data))
    assert callable(change)
    change(model)
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _first_is_custom(model: object) -> None:
    model.operatorCodes[0] = schema.OperatorCodeT(32, "edgetpu-custom-op", 1, 32)  # type: ignore[attr-defined]


def _stem_without_activation(model: object) -> None:
    model.subgraphs[0].operators[0].builtinOptions.fusedActivationFunction = 0  # type: ignore[attr-defined]


def _two_outputs(model: object) -> None:
    model.subgraphs[0].outputs = [4, 5]  # type: ignore[attr-defined]


def _no_graph(model: object) -> None:
    model.subgraphs = []  # type: ignore[attr-defined]


def _nan_weight(model: object) -> None:
    first = model.subgraphs[0].operators[0].inputs[1]  # type: ignore[attr-defined]
    buffer = model.buffers[model.subgraphs[0].tensors[first].buffer]  # type: ignore[attr-defined]
    buffer.data = np.frombuffer(np.full(len(buffer.data) // 4, np.nan, np.float32).tobytes(), np.uint8)


def _unsupported_stride(model: object) -> None:
    model.subgraphs[0].operators[0].builtinOptions.strideH = 3  # type: ignore[attr-defined]


def _four_channels_in(model: object) -> None:
    model.subgraphs[0].tensors[0].shape = [1, 33, 33, 4]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_first_is_custom, "edgetpu-custom-op"),
        (_stem_without_activation, "not a MobileNetV2"),
        (_two_outputs, "2 outputs"),
        (_no_graph, "no graph"),
        (_nan_weight, "not finite"),
        (_unsupported_stride, "stride"),
        (_four_channels_in, "shape"),
    ],
)
def test_other_models_are_refused_by_name(change: object, said: str, tmp_path: Path) -> None:
    """The sentence names the layer or the property that does not fit, so that the user can see what the file is."""
    data = changed(write_deeplab(randomised_deeplab(num_classes=2), 33, 33), change)
    with pytest.raises(WeightsError, match=said) as caught:
        converted(data, tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    """Empty, absent, a folder, another format: one sentence each."""
    for content in (b"", b"TFL3", b"\x00" * 64, b"\x08\x00\x00\x00TFL3", b"PK\x03\x04" + b"\x00" * 100):
        path = tmp_path / "file.tflite"
        path.write_bytes(content)
        with pytest.raises(WeightsError):
            convert(path)
    assert not can_convert(tmp_path / "absent.tflite")
    for path in (tmp_path / "absent.tflite", tmp_path):
        with pytest.raises(WeightsError, match="cannot be read"):
            convert(path)


def claims_too_much(count: int) -> bytes:
    """Return a file of about 8 x count bytes whose `count` tensors are one and the same, with `count` quantisation scales."""

    def table(slot: int, skip: int = 0) -> bytes:
        # vtable (its size, the table's, one offset per field), the table (distance to the vtable, offset to what follows it)
        vtable = struct.pack(f"<{slot + 3}H", 6 + 2 * slot, 8, *[0] * slot, 4)
        return vtable + struct.pack("<iI", len(vtable), 4 + skip)

    vtable_bytes = {slot: 6 + 2 * slot for slot in (0, 2, 4)}
    model, subgraph = table(2), table(0)
    one_subgraph = struct.pack("<II", 1, 4 + vtable_bytes[0])
    # each offset of the vector points to the one tensor that follows it
    offsets = struct.pack("<I", count) + b"".join(struct.pack("<I", 4 * left + vtable_bytes[4]) for left in range(count, 0, -1))
    tensor = table(4, skip=vtable_bytes[2]) + table(2)
    scales = struct.pack(f"<I{count}f", count, *[1.0] * count)
    return struct.pack("<I", 8 + vtable_bytes[2]) + b"TFL3" + model + one_subgraph + subgraph + offsets + tensor + scales


def test_small_files_that_claim_much_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors may overlap, so 400 kB could claim 2.5 billion numbers: reading stops at what the file can hold."""
    entries = [0]
    for reader in ("numbers", "tables"):
        read = getattr(Table, reader)

        def counting(table: Table, *arguments: object, read=read) -> object:
            found = read(table, *arguments)
            entries.append(len(found))
            return found

        monkeypatch.setattr(Table, reader, counting)
    path = tmp_path / "net.tflite"
    path.write_bytes(claims_too_much(50_000))
    with pytest.raises(WeightsError, match="lists more than it can hold"):
        convert(path)
    assert 50_000 < sum(entries) < path.stat().st_size


def structure_of(data: bytes) -> list[int]:
    """Return the positions of all bytes outside the weights: flipping those is what can confuse a reader."""
    inside = np.zeros(len(data), bool)
    for buffer in Table.root(data).tables(4):
        start, count = buffer.span(0)
        inside[start : start + count] = count > 64
    return np.flatnonzero(~inside).tolist()


@pytest.mark.timeout(300)
def test_mutated_and_truncated_files_never_crash_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrusted files: whatever the bytes say, the outcome is a network or a WeightsError, soon and without huge memory."""
    # building timm's network to compare with takes most of the time, and is the same every time
    monkeypatch.setattr(tflite_mobilenetv2, "build_encoder", functools.cache(build_encoder))
    data = write_deeplab(randomised_deeplab(num_classes=2, head_channels=8), 33, 33)
    random.seed(4)
    places = structure_of(data)
    assert 10_000 < len(places) < len(data)
    cut_files = [data[:size] for size in sorted(random.sample(range(len(data)), 150))]
    files = [*cut_files, *(mutated(data, places) for _ in range(2500))]
    path = tmp_path / "net.tflite"
    sentences = []
    for content in files:
        path.write_bytes(content)
        try:
            convert(path)
        except WeightsError as error:
            sentences.append(str(error))
    assert len(sentences) > 1000
    assert all(20 < len(sentence) < 700 for sentence in sentences)


def mutated(data: bytes, places: list[int]) -> bytes:
    """Return the file with one to four of the bytes at `places` replaced, by values that offsets and lengths dislike most."""
    content = bytearray(data)
    for place in random.sample(places, random.choice((1, 1, 2, 4))):
        content[place] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
    return bytes(content)
