"""The published TensorFlow Lite files give what two independent implementations give: the TFLite runtime and transformers.

The first runs the 8-bit file itself, so labels are compared; the second takes the same float weights, so logits are.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplabzoo.checkpoints.converters.tensorflow.tflite import convert
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoders import build_encoder

VOC = Path("voc2012_subset") / "VOCdevkit" / "VOC2012"


@pytest.fixture(scope="module")
def deeplab_file(shared_data: Path) -> Path:
    return shared_data / "tflite" / "deeplabv3_mnv2_pascal_quant.tflite"


@pytest.fixture(scope="module")
def published(deeplab_file: Path) -> Checkpoint:
    return convert(deeplab_file)


@pytest.fixture(scope="module")
def net(published: Checkpoint) -> DeepLab:
    assert published.config is not None
    return DeepLab.from_weights(published.config, published.state_dict)


def photos(shared_data: Path, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (photo padded to 513 with the grey that becomes 0, true labels at the photo's own size)."""
    root = shared_data / VOC
    names = (root / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    pairs = []
    for name in names[:: len(names) // count][:count]:
        photo = np.asarray(Image.open(root / "JPEGImages" / f"{name}.jpg").convert("RGB"))
        padded = np.full((513, 513, 3), 128, np.uint8)
        padded[: photo.shape[0], : photo.shape[1]] = photo
        pairs.append((padded, np.asarray(Image.open(root / "SegmentationClass" / f"{name}.png"))))
    return pairs


def test_the_published_deeplab_is_read_off_its_graph(published: Checkpoint) -> None:
    """What shared/data/README.md says of the file, found without being told."""
    assert published.config == DeepLabConfig(
        architecture="deeplabv3",
        encoder="mobilenetv2_100",
        num_classes=21,
        output_stride=16,
        atrous_rates=(),
        pooling_first=True,
        refine_conv=False,
        align_corners=True,
        encoder_padding="same",
    )
    assert published.classes is not None
    assert published.classes[8] == "cat"
    assert published.dropped == ("ARG_MAX",)
    preprocessing = published.preprocessing
    assert (preprocessing.size, preprocessing.resize, preprocessing.pad) == ((513, 513), "longest", True)
    # (u8 - 128) / 128
    assert preprocessing.mean == pytest.approx((128 / 255,) * 3)
    assert preprocessing.std == pytest.approx((128 / 255,) * 3)


def test_labels_agree_with_the_tflite_runtime(deeplab_file: Path, net: DeepLab, shared_data: Path) -> None:
    """98 % of pixels at least, on six VOC photos: 8-bit rounding in the runtime moves 0.8 % of them over all 173.

    All 173 are compared by tests/helpers/tflite_runtime_miou.py.
    """
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(str(deeplab_file), num_threads=1)
    interpreter.allocate_tensors()
    equal = pixels = 0
    scores = {"runtime": ConfusionMatrix(21), "ours": ConfusionMatrix(21)}
    for padded, truth in photos(shared_data, 6):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], padded[None])
        interpreter.invoke()
        height, width = truth.shape
        theirs = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0, :height, :width]
        image_BCHW = (torch.from_numpy(padded).permute(2, 0, 1)[None] - 128.0) / 128
        ours = net.predict_labels(image_BCHW)[0].numpy()[:height, :width]
        scores["runtime"].update(theirs, truth)
        scores["ours"].update(ours, truth)
        equal += int((ours == theirs).sum())
        pixels += truth.size
    assert equal / pixels > 0.98
    assert scores["ours"].scores().pixel_accuracy == pytest.approx(scores["runtime"].scores().pixel_accuracy, abs=0.02)
    assert scores["ours"].scores().pixel_accuracy > 0.8


def transformers_reference_model(converted: Checkpoint, output_stride: int) -> torch.nn.Module:
    """Return transformers' MobileNetV2 DeepLab with the converted weights under its own names and norm epsilons."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(
        output_stride=output_stride, num_labels=21, tf_padding=True, depth_multiplier=1.0, layer_norm_eps=1e-3
    )
    net = transformers.MobileNetV2ForSemanticSegmentation(config).eval()
    target = net.state_dict()
    for name, tensor in converted.state_dict.items():
        if name.startswith("head.classifier."):
            target[name.replace("head.classifier", "segmentation_head.classifier.convolution")] = tensor
        elif name.endswith(("conv_pw.weight", "conv_dw.weight", "conv_pwl.weight", "conv_stem.weight", ".conv.weight")):
            target[f"{transformers_layer(name.removesuffix('.weight'))}.convolution.weight"] = tensor
        elif name.endswith(".bias"):
            layer = transformers_layer(name.removesuffix(".bias"))
            eps = 1e-5 if layer.startswith("segmentation_head") else config.layer_norm_eps
            ones = torch.ones_like(tensor)
            target[f"{layer}.normalization.bias"] = tensor
            target[f"{layer}.normalization.weight"] = ones * (1 + eps) ** 0.5
            target[f"{layer}.normalization.running_mean"] = ones * 0
            target[f"{layer}.normalization.running_var"] = ones
    assert target.keys() == net.state_dict().keys()
    net.load_state_dict(target)
    return net


def transformers_layer(name: str) -> str:
    """Return transformers' name of the layer that our convolution or norm `name` belongs to."""
    head = {"branches.0": "conv_aspp", "pool": "conv_pool", "project": "conv_projection"}
    for ours, theirs in head.items():
        if name.startswith(f"head.aspp.{ours}."):
            return f"segmentation_head.{theirs}"
    if name in ("encoder.conv_stem", "encoder.bn1"):
        return "mobilenet_v2.conv_stem.first_conv"
    match = re.fullmatch(r"encoder\.blocks\.(\d)\.(\d)\.(conv_pw|conv_dw|conv_pwl|bn1|bn2|bn3)", name)
    assert match is not None, name
    stage, block, part = int(match[1]), int(match[2]), match[3]
    if stage == 0:
        return f"mobilenet_v2.conv_stem.{'conv_3x3' if part in ('conv_dw', 'bn1') else 'reduce_1x1'}"
    # blocks before each stage of 2, 3, 4, 3, 3 and 1 (MobileNetV2, table 2)
    index = (0, 2, 5, 9, 12, 15)[stage - 1] + block
    kinds = {"conv_pw": "expand_1x1", "bn1": "expand_1x1", "conv_dw": "conv_3x3", "bn2": "conv_3x3"}
    return f"mobilenet_v2.layer.{index}.{kinds.get(part, 'reduce_1x1')}"


@pytest.mark.parametrize(("output_stride", "size"), [(16, (513, 513)), (16, (320, 257)), (16, (256, 256)), (8, (256, 192))])
def test_logits_equal_those_of_transformers(
    output_stride: int, size: tuple[int, int], published: Checkpoint, net: DeepLab, shared_data: Path
) -> None:
    """Same weights, another implementation: equal up to float32 rounding, at odd and even sizes and both output strides."""
    theirs = transformers_reference_model(published, output_stride)
    padded = photos(shared_data, 1)[0][0]
    image_BCHW = (torch.from_numpy(padded[: size[0], : size[1]]).permute(2, 0, 1)[None] - 128.0) / 128
    net.set_output_stride(output_stride)
    try:
        with torch.inference_mode():
            ours, expected = net.forward_low_resolution(image_BCHW), theirs(image_BCHW).logits
    finally:
        net.set_output_stride(16)
    assert expected.std() > 1
    assert (ours - expected).abs().max() < 1e-4 * expected.std()


def test_the_published_classifier_gives_an_encoder(shared_data: Path) -> None:
    """Its last feature is the runtime's own, up to the 8-bit rounding of 50 layers."""
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    file = shared_data / "tflite" / "tf2_mobilenet_v2_1.0_224_ptq.tflite"
    found = convert(file)
    assert found.config is None
    assert found.encoder == "mobilenetv2_100"
    assert found.dropped == ("SOFTMAX", "classifier (1280 -> 1001)", "image pooling", "conv_head (320 -> 1280)")
    assert found.preprocessing.size == (224, 224)
    # (u8 - 127) / 127.5
    assert found.preprocessing.mean == pytest.approx((127 / 255,) * 3)
    assert found.preprocessing.std == pytest.approx((0.5,) * 3)
    config = DeepLabConfig(architecture="deeplabv3", encoder=found.encoder, output_stride=32, encoder_padding="same")
    encoder, _ = build_encoder(config)
    encoder.load_state_dict(found.state_dict, strict=True)
    interpreter = litert.Interpreter(
        str(file),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    tensors = interpreter.get_tensor_details()
    feature = next(one for one in reversed(tensors) if one["shape"].tolist() == [1, 7, 7, 320])
    scale, zero = feature["quantization"]
    for padded, _ in photos(shared_data, 3):
        photo = np.array(Image.fromarray(padded[:320, :480]).resize((224, 224)))
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], photo[None])
        interpreter.invoke()
        expected = (interpreter.get_tensor(feature["index"]).astype(np.float32) - zero) * scale
        with torch.inference_mode():
            ours = encoder.eval()((torch.from_numpy(photo).permute(2, 0, 1)[None] - 127.0) / 127.5)[-1]
        agreement = np.corrcoef(ours.permute(0, 2, 3, 1).numpy().reshape(-1), expected.reshape(-1))[0, 1]
        assert agreement > 0.95
