"""ONNX graphs compute what the model does, for every head, batch and image size."""

import json
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.parity import randomised

from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization import onnx_export
from deeplabzoo.optimization.graph_backend import onnxruntime_runner
from deeplabzoo.optimization.onnx_export import ExportModule, Output, onnx_bytes, require_parity
from deeplabzoo.optional_imports import require_module

SHAPES = ((1, 64, 96), (3, 65, 33), (2, 81, 131))

HEADS: dict[str, dict[str, Any]] = {
    "v3": {"architecture": "deeplabv3", "encoder": "resnet18"},
    "v3-os8": {"architecture": "deeplabv3", "encoder": "mobilenetv3_small_050", "output_stride": 8},
    "v3-tensorflow": {
        "architecture": "deeplabv3",
        "encoder": "mobilenetv2_050",
        "atrous_rates": (),
        "refine_conv": False,
        "align_corners": True,
        "encoder_padding": "same",
        "pooling_first": True,
    },
    "v3-aux": {"architecture": "deeplabv3", "encoder": "mobilenetv3_small_050", "aux_head": True},
    "v3-window": {
        "architecture": "deeplabv3",
        "encoder": "mobilenetv2_050",
        "pooling_window": (80, 120),
        "pooling_norm": False,
    },
    "v3plus": {"architecture": "deeplabv3plus", "encoder": "mobilenetv2_050"},
    "v3plus-os8": {"architecture": "deeplabv3plus", "encoder": "mobilenetv2_050", "output_stride": 8, "align_corners": True},
    "v3plus-os32": {"architecture": "deeplabv3plus", "encoder": "resnet18", "output_stride": 32},
    "v3plus-smp": {
        "architecture": "deeplabv3plus",
        "encoder": "mobilenetv2_050",
        "encoder_final_conv": True,
        "depthwise_norm": False,
        "decoder_refine_conv": True,
        "decoder_convs": 1,
    },
    "v3plus-group": {"architecture": "deeplabv3plus", "encoder": "resnet18", "norm": "group"},
    "v3plus-plain": {
        "architecture": "deeplabv3plus",
        "encoder": "mobilenetv2_050",
        "decoder_separable": False,
        "aspp_project_kernel": 3,
        "decoder_low_level_first": True,
    },
    "mobilevit": {"architecture": "deeplabv3", "encoder": "mobilevit_xxs"},
    "mobilevit-os8": {"architecture": "deeplabv3plus", "encoder": "mobilevit_xxs", "output_stride": 8},
    "mobilevitv2": {"architecture": "deeplabv3", "encoder": "mobilevitv2_050"},
    "convnext": {"architecture": "deeplabv3plus", "encoder": "convnext_atto", "output_stride": 8},
}

SLOW = {"v3", "v3-os8", "v3-aux", "v3plus-os32", "v3plus-plain", "v3plus-group", "mobilevit-os8", "mobilevitv2", "convnext"}
"""Heads that differ from the others only in what torch's exporter handles; run with the slow tests."""


def network(**fields: Any) -> DeepLab:
    torch.manual_seed(0)
    net = DeepLab(DeepLabConfig(**{"num_classes": 5, "head_channels": 32, "decoder_channels": 32, **fields}))
    randomised(net)
    return net.eval()


@pytest.mark.parametrize("head", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in HEADS])
def test_every_head_gives_the_models_logits_at_any_batch_and_size(head: str) -> None:
    """The difference is below 1e-4 of the largest logit at three shapes other than the traced one, odd ones among them."""
    net = network(**HEADS[head])
    assert require_parity(net, onnxruntime_runner(onnx_bytes(net, "low")), "low", SHAPES) < 1e-4


@pytest.mark.parametrize("output", ["logits", "argmax", "uint8"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_outputs_at_the_images_own_size(output: Output, align_corners: bool) -> None:
    """The graph upsamples as the model does; labels are int32 or uint8."""
    net = network(architecture="deeplabv3plus", encoder="mobilenetv2_050", align_corners=align_corners)
    run = onnxruntime_runner(onnx_bytes(net, output))
    require_parity(net, run, output, SHAPES)
    image_BCHW = torch.randn(2, 3, 67, 45)
    given = run(image_BCHW.numpy())
    assert given.dtype == {"logits": np.float32, "argmax": np.int32, "uint8": np.uint8}[output]
    with torch.inference_mode():
        expected = net(image_BCHW) if output == "logits" else net.predict_labels(image_BCHW)
    assert onnx_export.output_difference(expected.numpy().astype(given.dtype), given) < 1e-3


def test_a_size_stored_as_a_constant_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing timm's own MobileViT block stores the number of patches; the parity check rejects that graph."""
    net = network(**HEADS["mobilevit"])
    with monkeypatch.context() as patched:
        patched.setattr("deeplabzoo.optimization.onnx_export._TRACEABLE", {})
        wrong = onnx_bytes(net, "low")
    with pytest.raises(DeepLabZooError, match="does not compute what the model does"):
        require_parity(net, onnxruntime_runner(wrong), "low", SHAPES)


def test_a_fixed_size_is_fixed() -> None:
    """With `size` all dimensions of input and output are numbers, which some runtimes require."""
    net = network(**HEADS["v3plus"])
    model = onnx.load_from_string(onnx_bytes(net, "logits", (65, 97)))
    assert [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 65, 97]
    assert [axis.dim_value for axis in model.graph.output[0].type.tensor_type.shape.dim] == [1, 5, 65, 97]


def test_the_file_describes_itself() -> None:
    """Classes, palette, preprocessing, configuration and source are stored as metadata, and the model is unchanged."""
    net = network(**HEADS["v3-aux"]).train()
    net.weights_source = {"name": "mine", "sha256": "00"}
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = onnx.load_from_string(onnx_bytes(net, "uint8"))
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["classes"]) == list(net.classes)
    assert json.loads(facts["palette"]) == [list(color) for color in net.palette]
    assert json.loads(facts["preprocessing"]) == json.loads(json.dumps(net.preprocessing.to_dict()))
    assert DeepLabConfig.from_dict(json.loads(facts["config"])) == net.config
    assert json.loads(facts["source"]) == net.weights_source
    assert facts["output"] == "uint8"
    assert net.training
    assert net.aux_head is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_invalid_arguments_are_rejected() -> None:
    """An unknown output, and more classes than uint8 can hold."""
    with pytest.raises(UsageError, match="Unknown output"):
        onnx_bytes(network(**HEADS["v3plus"]), "labels")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="uint8 holds 256"):
        onnx_bytes(network(**HEADS["v3plus"], num_classes=300), "uint8")


def test_a_missing_library_is_named_with_its_extra() -> None:
    """The error contains the install command."""
    with pytest.raises(DeepLabZooError, match=r'pip install "deeplabzoo\[export\]"'):
        require_module("no_such_library_at_all", extra="export", purpose="Writing ONNX")


def test_low_resolution_logits_have_the_layout_of_the_postprocessing() -> None:
    """B x h x w x classes, so that the permuted output is in channels_last memory without a copy."""
    net = network(**HEADS["v3plus"])
    with torch.inference_mode():
        low = ExportModule(net, "low")(torch.zeros(1, 3, 65, 97))
    assert low.shape == (1, 17, 25, 5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["byobnet", "cspnet", "nfnet", "regnet", "resnest", "resnetv2", "rexnet", "sknet"])
def test_other_families_give_the_models_logits(family: str) -> None:
    """The smallest encoder of eight other families of timm passes the parity check."""
    encoder = {
        "byobnet": "test_byobnet",
        "cspnet": "cs3darknet_focus_s",
        "nfnet": "test_nfnet",
        "regnet": "regnetx_002",
        "resnest": "resnest14d",
        "resnetv2": "resnetv2_18",
        "rexnet": "rexnet_100",
        "sknet": "skresnet18",
    }[family]
    net = network(architecture="deeplabv3plus", encoder=encoder)
    assert require_parity(net, onnxruntime_runner(onnx_bytes(net, "low")), "low", SHAPES) < 1e-4


SHAPE_ARITHMETIC = {"Shape", "Cast", "Ceil", "ConstantOfShape", "Gather", "Slice", "Constant", "Unsqueeze", "Range", "Where"}


@pytest.mark.parametrize("output", ["logits", "argmax"])
@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite0", "mobilenetv2_050", "resnet18"])
def test_a_file_of_a_fixed_size_has_no_shape_arithmetic(encoder: str, output: Output) -> None:
    """OpenCV 4 and small runtimes do not support Shape and Ceil, of which TensorFlow's padding needs dozens."""
    net = network(**{**HEADS["v3plus"], "encoder": encoder})
    model = onnx_bytes(net, output, (65, 97))
    graph = onnx.load_from_string(model)
    casts = {"Cast"} if output == "argmax" else set()  # class numbers from int64 to int32
    assert {node.op_type for node in graph.graph.node} & (SHAPE_ARITHMETIC - casts) == set()
    assert [one.domain for one in graph.opset_import] == [""]
    assert require_parity(net, onnxruntime_runner(model), output, ((1, 65, 97),)) <= (1e-4 if output == "logits" else 0.01)


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_the_operator_set_can_be_chosen(opset: int) -> None:
    """The outputs are equal for every operator set."""
    net = network(**HEADS["v3plus"])
    model = onnx_bytes(net, "logits", opset=opset)
    assert onnx.load_from_string(model).opset_import[0].version == opset
    assert require_parity(net, onnxruntime_runner(model), "logits", SHAPES) < 1e-4
    with pytest.raises(UsageError, match="expected 11 to 21"):
        onnx_bytes(net, opset=10)


def test_dynamic_dimensions_have_names() -> None:
    """`batch`, `height` and `width` are named at the input and at the output."""

    def dimensions(model: bytes) -> list[list[str | int]]:
        graph = onnx.load_from_string(model).graph
        return [
            [one.dim_param or one.dim_value for one in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        ]

    net = network(**HEADS["v3plus"])
    assert dimensions(onnx_bytes(net, "logits")) == [
        ["batch", 3, "height", "width"],
        ["batch", net.num_classes, "height", "width"],
    ]
    assert dimensions(onnx_bytes(net, "argmax")) == [["batch", 3, "height", "width"], ["batch", "height", "width"]]
    assert dimensions(onnx_bytes(net, "argmax", (65, 97))) == [[1, 3, 65, 97], [1, 65, 97]]


def test_a_fixed_size_can_have_a_dynamic_batch() -> None:
    """With fixed height and width, batches of 1 and 3 run."""
    net = network(**HEADS["v3plus"])
    model = onnx_bytes(net, "logits", (65, 97), dynamic_batch=True)
    assert require_parity(net, onnxruntime_runner(model), "logits", ((1, 65, 97), (3, 65, 97))) < 1e-4
