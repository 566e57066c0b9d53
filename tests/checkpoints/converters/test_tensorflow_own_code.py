"""Frozen graphs that TensorFlow itself wrote, and its own logits of them, where it is installed (the tests do without).

TensorFlow 2.21 in an environment of its own: `pip install tensorflow-cpu`, and this package. Its DeepLab code is no package and
needs TensorFlow 1, so networks are wired as in tf_reference.py; operations, dilation, freezing and the file are TensorFlow's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import parity
from helpers.parity import random_images, require_same_logits
from helpers.tf_reference import Map, Network

import deeplabzoo
from deeplabzoo.checkpoints.converters.tensorflow import (
    frozen_graph,  # and with it all of PyTorch, which must be there before TensorFlow is
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@dataclass
class InTensorFlow(Network):
    """The same network as a graph of TensorFlow, with the weights of another one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tf: Any = pytest.importorskip("tensorflow")

    def freeze(self, height: int, width: int) -> bytes:
        v1 = self.tf.compat.v1
        with self.tf.Graph().as_default(), v1.Session() as session:
            image = v1.placeholder(self.tf.uint8, [None, height, width, 3], name="ImageTensor")
            scaled = (2.0 / 255.0) * self.tf.cast(image, self.tf.float32) - 1.0
            self.enlarge(self.logits(Map(scaled, "")), (height, width), "ResizeBilinear_2")
            for variable in v1.global_variables():
                variable.load(self.weights[variable.op.name], session)
            graph = v1.graph_util.convert_variables_to_constants(
                session, v1.get_default_graph().as_graph_def(), ["ResizeBilinear_2"]
            )
        return bytes(graph.SerializeToString())

    def run(self, graph: bytes, pixels_BHWC: np.ndarray) -> torch.Tensor:
        v1 = self.tf.compat.v1
        with self.tf.Graph().as_default(), v1.Session() as session:
            definition = v1.GraphDef()
            definition.ParseFromString(graph)
            self.tf.import_graph_def(definition, name="")
            found = session.run("ResizeBilinear_2:0", {"ImageTensor:0": pixels_BHWC})
        return torch.from_numpy(found).permute(0, 3, 1, 2)

    def channels(self, x: Map) -> int:
        return int(x.values.shape[3])

    def size(self, x: Map) -> tuple[int, ...]:
        return tuple(x.values.shape[1:3])

    def plus(self, x: Map, other: Map, name: str) -> Map:
        return Map(self.tf.add(x.values, other.values, name=name), "")

    def pool(self, x: Map) -> Map:
        return Map(self.tf.compat.v1.nn.avg_pool(x.values, [1, *self.size(x), 1], [1, *self.size(x), 1], "VALID"), "")

    def conv(
        self,
        x: Map,
        scope: str,
        out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        rate: int = 1,
        act: str = "Relu",
        bias: bool = False,
    ) -> Map:
        v1, values = self.tf.compat.v1, x.values
        with v1.variable_scope(scope):
            weights = self.variable(f"{scope}/{'weights' if out else 'depthwise_weights'}")
            padding = "SAME"
            if "xception" in scope and stride > 1 and kernel > 1:
                values, padding = self.tf.pad(values, [[0, 0], [1, 1], [1, 1], [0, 0]]), "VALID"

            def plain(values: Any, _: Any, padding: str, dilations: Any = None) -> Any:
                steps = {"strides": [1, stride, stride, 1], "padding": padding, "dilations": dilations}
                if out:
                    return v1.nn.conv2d(values, weights, **{**steps, "dilations": dilations or [1, 1, 1, 1]})
                return v1.nn.depthwise_conv2d_native(values, weights, **{**steps, "dilations": dilations or [1, 1, 1, 1]})

            if rate > 1 and self.old:
                filter_shape = [kernel, kernel]
                values = self.tf.compat.v1.nn.with_space_to_batch(
                    values, [rate, rate], padding, plain, filter_shape=filter_shape
                )
            elif out:
                values = plain(values, None, padding, [1, rate, rate, 1])
            else:
                values = v1.nn.depthwise_conv2d(values, weights, [1, stride, stride, 1], padding, rate=[rate, rate])
            if bias:
                return Map(self.tf.nn.bias_add(values, self.variable(f"{scope}/biases")), "")
            with v1.variable_scope("BatchNorm"):
                names = ("gamma", "beta", "moving_mean", "moving_variance")
                gamma, beta, mean, variance = (self.variable(f"{scope}/BatchNorm/{name}") for name in names)
                values, _, _ = v1.nn.fused_batch_norm(values, gamma, beta, mean, variance, epsilon=self.eps, is_training=False)
            return self.act(Map(values, ""), act, act) if act else Map(values, "")

    def variable(self, name: str) -> Any:
        shape = self.weights[name].shape
        return self.tf.compat.v1.get_variable(name.rpartition("/")[2], shape, use_resource=False)

    def act(self, x: Map, kind: str, name: str) -> Map:
        kinds = {"Relu": self.tf.nn.relu, "Relu6": self.tf.nn.relu6}
        return Map(kinds[kind](x.values, name=name.rpartition("/")[2]), "")

    def enlarge(self, x: Map, size: tuple[int, ...], name: str) -> Map:
        return Map(self.tf.compat.v1.image.resize_bilinear(x.values, size, align_corners=True, name=name), "")

    def join(self, maps: list[Map], name: str) -> Map:
        return Map(self.tf.concat([one.values for one in maps], 3, name=name), "")


@pytest.mark.parametrize("size", [(97, 129), (96, 64)], ids=str)
@pytest.mark.parametrize("old", [True, False], ids=["space-to-batch", "attribute"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="mobilenetv2"),
        pytest.param({"width": 0.5, "output_stride": 16}, id="mobilenetv2-half"),
        pytest.param({"decoder": True, "output_stride": 16, "num_classes": 151}, id="mobilenetv2-decoder"),
        pytest.param({"encoder": "xception65", "decoder": True, "rates": (12, 24, 36)}, id="xception65"),
    ],
)
def test_logits_are_tensorflows(
    options: dict[str, Any], old: bool, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At an odd size and an even one: TensorFlow fixes the size of a graph's head.

    In Xception-65 with random norms, float32 rounding moves TensorFlow's logits by 2.0e-4 of their spread from what float64
    gives, and ours by 1.5e-4, so two float32 programs cannot agree better there.
    """
    monkeypatch.setattr(parity, "LARGEST_ERROR", 5e-4 if "encoder" in options else parity.LARGEST_ERROR)
    described = Network(**options, old=old)
    described(random_images(4, 96).clamp(-1, 1))
    theirs = InTensorFlow(**options, old=old, weights=described.weights)
    graph = theirs.freeze(*size)
    (tmp_path / "frozen_inference_graph.pb").write_bytes(graph)
    assert frozen_graph.can_convert(tmp_path / "frozen_inference_graph.pb")
    ours = deeplabzoo.load(tmp_path / "frozen_inference_graph.pb")
    assert ours.preprocessing.size[0] % 8 == 1
    pixels = (random_images(1, size).clamp(-1, 1) * 127 + 127).to(torch.uint8)
    image = pixels.float() / 255 / 0.5 - 1
    with torch.inference_mode():
        found = ours(image)
    expected = theirs.run(graph, pixels.permute(0, 2, 3, 1).numpy())
    require_same_logits(found, expected[:, 1:] if described.num_classes == 151 else expected)
