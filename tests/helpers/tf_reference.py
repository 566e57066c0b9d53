"""TensorFlow's DeepLab networks written out from the description of its code, and the graph that TensorFlow makes of them.

One pass computes a network in PyTorch's plain operations and notes the nodes that `tf_slim` and `freeze_graph` would leave: the
same names of variables, Const and Identity for each, fused batch norms with their epsilon, padding as 'SAME' or as a Pad, and
atrous convolutions as TensorFlow 1 writes them, between SpaceToBatchND and BatchToSpaceND (or as an attribute, as now).
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from helpers import graphdef_writer as write

_XCEPTION = [
    ("entry_flow/block1", 1, (128, 128, 128), 2),
    ("entry_flow/block2", 1, (256, 256, 256), 2),
    ("entry_flow/block3", 1, (728, 728, 728), 2),
    ("middle_flow/block1", 16, (728, 728, 728), 1),
    ("exit_flow/block1", 1, (728, 1024, 1024), 2),
    ("exit_flow/block2", 1, (1536, 1536, 2048), 1),
]
_MOBILENET = [
    (24, 2),
    (24, 1),
    (32, 2),
    (32, 1),
    (32, 1),
    (64, 2),
    *3 * [(64, 1)],
    *3 * [(96, 1)],
    (160, 2),
    (160, 1),
    (160, 1),
    (320, 1),
]


@dataclass
class Map:
    """A map B x C x H x W and the node that makes it."""

    values: torch.Tensor
    node: str


@dataclass
class Network:
    """Weights by TensorFlow's names, made on first use; batch norms take disturbed statistics of the first pictures."""

    encoder: str = "mobilenetv2"
    width: float = 1.0
    num_classes: int = 21
    output_stride: int = 8
    rates: tuple[int, ...] = ()
    decoder: bool = False
    separable: bool = True
    old: bool = True
    """Atrous convolutions between SpaceToBatchND and BatchToSpaceND."""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    nodes: dict[str, bytes] = field(default_factory=dict)
    eps: float = 1e-3
    meta: bool = False
    """Shapes alone are computed, and a weight is one number repeated, so that the graph is small."""
    rename: tuple[str, str] = ("", "")
    """What the beginnings of names are replaced by in the graph."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def graph(self) -> bytes:
        return b"".join(self.nodes.values()) + write.message(4, write.number_field(1, 24))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits at the size of an image in -1...1."""
        self.nodes.clear()
        with torch.no_grad():
            return self._run(image)

    def _run(self, image: torch.Tensor) -> torch.Tensor:
        x = Map(image, self.add("ImageTensor", "Placeholder"))
        x.node = self.add("Cast", "Cast", x.node)
        x.node = self.add("mul", "Mul", self.const("mul/x", np.array(2 / 255, np.float32)), x.node)
        x.node = self.add("sub", "Sub", x.node, self.const("sub/y", np.array(1, np.float32)))
        return self.enlarge(self.logits(x), self.size(x), "ResizeBilinear_2").values

    def logits(self, x: Map) -> Map:
        self.eps = 1e-3
        low, x = self.mobilenet(x) if self.encoder == "mobilenetv2" else self.xception(x)
        self.eps = 1e-5
        x = self.head(x)
        if self.decoder:
            x = self.refine(low, x)
        x = self.conv(x, "logits/semantic", self.num_classes, 1, act="", bias=True)
        return self.enlarge(x, self.size(x), "ResizeBilinear_1")

    def channels(self, x: Map) -> int:
        return x.values.shape[1]

    def size(self, x: Map) -> tuple[int, ...]:
        return tuple(x.values.shape[2:])

    def plus(self, x: Map, other: Map, name: str) -> Map:
        return Map(x.values + other.values, self.add(name, "Add", x.node, other.node))

    def pool(self, x: Map) -> Map:
        size = self.size(x)
        steps = {"ksize": (1, *size, 1), "strides": (1, *size, 1), "padding": "VALID"}
        return Map(x.values.mean((2, 3), keepdim=True), self.add("AvgPool2D/AvgPool", "AvgPool", x.node, **steps))

    def mobilenet(self, x: Map) -> tuple[Map, Map]:
        def depth(channels: int) -> int:
            return channels if self.width == 1 else max(1, int(channels * self.width))

        x = self.conv(x, "MobilenetV2/Conv", depth(32), stride=2, act="Relu6")
        scope, stride, rate = "MobilenetV2/expanded_conv", 2, 1
        for index, (channels, step) in enumerate([(16, 1), *_MOBILENET]):
            scope = "MobilenetV2/expanded_conv" + (f"_{index}" if index else "")
            source, own = x, rate
            if index:
                x = self.conv(x, f"{scope}/expand", 6 * self.channels(x), 1, act="Relu6")
            if stride == self.output_stride:
                step, rate = 1, rate * step
            stride *= step
            x = self.conv(x, f"{scope}/depthwise", 0, stride=step, rate=own, act="Relu6")
            if index == 2:
                low = x
            x = self.conv(x, f"{scope}/project", depth(channels), 1, act="")
            if step == 1 and self.channels(source) == self.channels(x):
                x = self.plus(x, source, f"{scope}/add")
        return low, x

    def xception(self, x: Map) -> tuple[Map, Map]:
        x = self.conv(x, "xception_65/entry_flow/conv1_1", 32, stride=2)
        x = self.conv(x, "xception_65/entry_flow/conv1_2", 64)
        stride, rate = 2, 1
        for name, units, widths, step in _XCEPTION:
            for unit in range(units):
                scope, last = f"xception_65/{name}/unit_{unit + 1}/xception_module", name == "exit_flow/block2"
                source, own = x, rate
                now = 1 if stride == self.output_stride else step
                rate *= step // now
                stride *= now
                for part, width in enumerate(widths, start=1):
                    if not last:
                        x = self.act(x, "Relu", f"{scope}/Relu_{part}")
                    act, separable = "Relu" if last else "", f"{scope}/separable_conv{part}"
                    x = self.conv(x, f"{separable}_depthwise", 0, stride=now if part == 3 else 1, rate=own, act=act)
                    x = self.conv(x, f"{separable}_pointwise", width, 1, act=act)
                    if name == "entry_flow/block2" and part == 2:
                        low = x
                if step > 1:
                    source = self.conv(source, f"{scope}/shortcut", widths[2], 1, stride=now, act="")
                if not last:
                    x = self.plus(x, source, f"{scope}/add")
        return low, x

    def head(self, x: Map) -> Map:
        size = self.size(x)
        branches = [self.enlarge(self.conv(self.pool(x), "image_pooling", 256, 1), size, "ResizeBilinear")]
        branches.append(self.conv(x, "aspp0", 256, 1))
        for index, rate in enumerate(self.rates, start=1):
            branches.append(self.conv3x3(x, f"aspp{index}", f"aspp{index}", rate))
        return self.conv(self.join(branches, "concat"), "concat_projection", 256, 1)

    def refine(self, low: Map, x: Map) -> Map:
        low = self.conv(low, "decoder/feature_projection0", 48, 1)
        size = self.size(low)
        both = [self.enlarge(x, size, "decoder/ResizeBilinear"), self.enlarge(low, size, "decoder/ResizeBilinear_1")]
        x = self.join(both, "decoder/concat")
        for index in (0, 1):
            plain = f"decoder/decoder_conv0/decoder_conv0_{index + 1}"
            x = self.conv3x3(x, f"decoder/decoder_conv{index}", plain, 1)
        return x

    def conv3x3(self, x: Map, separable: str, plain: str, rate: int) -> Map:
        if not self.separable:
            return self.conv(x, plain, 256, rate=rate)
        return self.conv(self.conv(x, f"{separable}_depthwise", 0, rate=rate), f"{separable}_pointwise", 256, 1)

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
        """A convolution (depthwise where `out` is 0) with what follows it."""
        inputs = x.values.shape[1]
        shape = (kernel, kernel, inputs, out or 1)
        name = f"{scope}/{'weights' if out else 'depthwise_weights'}"
        weight = self.weight(name, self.random(*shape) * math.sqrt(2 / (kernel**2 * (inputs if out else 1))))
        reach = (kernel - 1) * rate
        fixed = "xception" in scope and stride > 1
        values, node = x.values, x.node
        if fixed:
            values = F.pad(values, (reach // 2, reach - reach // 2) * 2)
            around = np.array([[0, 0], [reach // 2, reach - reach // 2], [reach // 2, reach - reach // 2], [0, 0]], np.int32)
            if kernel > 1:
                node = self.add(f"{scope}/Pad", "Pad", node, self.const(f"{scope}/Pad/paddings", around))
        else:
            totals = [max((-(-size // stride) - 1) * stride + reach + 1 - size, 0) for size in values.shape[:1:-1]]
            values = F.pad(values, [part for total in totals for part in (total // 2, total - total // 2)])
        kernels = weight.permute(3, 2, 0, 1) if out else weight.permute(2, 3, 0, 1)
        values = F.conv2d(values, kernels, stride=stride, dilation=rate, groups=1 if out else inputs)
        steps = {
            "strides": (1, stride, stride, 1),
            "padding": "VALID" if fixed and kernel > 1 else "SAME",
            "data_format": "NHWC",
        }
        between = rate > 1 and self.old
        if between:
            block = self.const(f"{scope}/block_shape", np.array([rate, rate], np.int32))
            paddings = self.add(f"{scope}/paddings", "Pack", node)  # worked out while the graph runs
            node = self.add(f"{scope}/SpaceToBatchND", "SpaceToBatchND", node, block, paddings)
            steps["padding"] = "VALID"
        steps["dilations"] = (1, 1, 1, 1) if between else (1, rate, rate, 1)
        kind = "Conv2D" if out else "DepthwiseConv2dNative"
        node = self.add(f"{scope}/{kind}", kind, node, f"{name}/read", **steps)
        if between:
            node = self.add(f"{scope}/BatchToSpaceND", "BatchToSpaceND", node, block, paddings)
        if bias:
            added = self.weight(f"{scope}/biases", self.random(out))
            return Map(
                values + added[:, None, None],
                self.add(f"{scope}/BiasAdd", "BiasAdd", node, f"{scope}/biases/read"),
            )
        found = Map(self.norm(values, scope), node)
        vectors = [f"{scope}/BatchNorm/{one}/read" for one in ("gamma", "beta", "moving_mean", "moving_variance")]
        found.node = self.add(
            f"{scope}/BatchNorm/FusedBatchNorm", "FusedBatchNorm", node, *vectors, epsilon=self.eps, is_training=False
        )
        return self.act(found, act, f"{scope}/{act}") if act else found

    def norm(self, values: torch.Tensor, scope: str) -> torch.Tensor:
        def uniform(low: float, high: float) -> torch.Tensor:
            return torch.empty(values.shape[1]).uniform_(low, high, generator=self.generator).to(values.device)

        gamma = self.weight(f"{scope}/BatchNorm/gamma", uniform(0.7, 1.3))
        beta = self.weight(f"{scope}/BatchNorm/beta", uniform(-0.3, 0.3))
        spread = values.std((0, 2, 3), correction=0)
        mean = self.weight(f"{scope}/BatchNorm/moving_mean", values.mean((0, 2, 3)) + spread * uniform(-0.2, 0.2))
        variance = self.weight(f"{scope}/BatchNorm/moving_variance", spread**2 * uniform(0.7, 1.4))
        return F.batch_norm(values, mean, variance, gamma, beta, eps=self.eps)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta") if self.meta else torch.randn(shape, generator=self.generator)

    def act(self, x: Map, kind: str, name: str) -> Map:
        values = x.values.clamp(0, 6) if kind == "Relu6" else x.values.relu()
        return Map(values, self.add(name, kind, x.node))

    def enlarge(self, x: Map, size: tuple[int, ...], name: str) -> Map:
        target = self.const(f"{name}/size", np.array(size, np.int32))
        values = F.interpolate(x.values, size=size, mode="bilinear", align_corners=True)
        return Map(values, self.add(name, "ResizeBilinear", x.node, target, align_corners=True))

    def join(self, maps: list[Map], name: str) -> Map:
        axis = self.const(f"{name}/axis", np.array(3, np.int32))
        return Map(torch.cat([one.values for one in maps], 1), self.add(name, "ConcatV2", *(one.node for one in maps), axis))

    def weight(self, name: str, fresh: torch.Tensor) -> torch.Tensor:
        """Return a variable, made of `fresh` on first use; the graph holds it as a constant behind an Identity."""
        if self.meta:
            held = write.tensor(np.full(tuple(fresh.shape), 0.5, np.float32), single=True)
            self.add(f"{name}/read", "Identity", self.add(name, "Const", value=held))
            return fresh.to("meta")
        values = self.weights.setdefault(name, fresh.numpy().astype(np.float32))
        self.add(f"{name}/read", "Identity", self.const(name, values))
        return torch.from_numpy(values)

    def const(self, name: str, values: np.ndarray) -> str:
        return self.add(name, "Const", value=write.tensor(values))

    def add(self, name: str, op: str, *sources: str, **attributes: object) -> str:
        name, *inputs = (one.replace(*self.rename) if self.rename[0] else one for one in (name, *sources))
        assert name not in self.nodes, name
        self.nodes[name] = write.node(name, op, inputs, **attributes)
        return name
