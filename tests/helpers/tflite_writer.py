"""Writes small TensorFlow Lite files of our own networks in the dialects that converters use, for the TFLite runtime to run.

The writer folds batch norm itself and builds the graph operator by operator, so that the runtime's answer is independent of
the reader under test. 8-bit files take two passes: the float file is run to see every tensor's range.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from torch import nn

from deeplabzoo.models.deeplab import DeepLab

NONE, RELU, RELU6 = 0, 1, 3
SAME, VALID = 0, 1
STORED = {np.float32: 0, np.float16: 1, np.int32: 2, np.uint8: 3, np.int64: 4, np.int8: 9}
Range = tuple[float, float]


@dataclass(frozen=True)
class Dialect:
    """How a file is written; the defaults are a float file as TensorFlow 2 converts it."""

    weights: str = "float32"
    """float32, float16, uint8 (per tensor, activations too) int8 (weights per channel, activations too) or hybrid (int8
    weights, float activations: what TensorFlow's default optimisation writes)."""
    argmax: bool = True
    upsample: bool = True
    half_pixel_centers: bool = False
    batches_around_dilation: bool = False
    """SPACE_TO_BATCH_ND and BATCH_TO_SPACE_ND instead of dilation factors."""
    explicit_padding: bool = False
    """PAD before strided convolutions instead of 'SAME'; symmetric or not as the network's own padding is."""
    pool_by_mean: bool = False
    separate_steps: bool = False
    """Convolution, ADD of the bias and activation as three operators."""
    scaling_in_graph: bool = False
    """The input is 0 to 255 and the graph makes [-1, 1] of it."""
    reverse_branches: bool = False
    """The 1x1 and atrous branches in reverse order."""
    narrow: Mapping[int, int] | None = None
    """Stage -> channels kept of its blocks, whose expansions follow, -1 for the stem: widths that timm has not."""
    labels: Sequence[str] = ()
    """Class names, attached as a zip."""


class _Writer:
    def __init__(self, dialect: Dialect, ranges: Mapping[str, Range] | None) -> None:
        self.dialect, self.ranges = dialect, ranges
        self.tensors: list[Any] = []
        self.buffers = [schema.BufferT(data=[])]
        self.label_map: list[tuple[int, int]] = []
        self.operators: list[Any] = []
        self.channel = {"uint8": 3, "int8": 9}.get(dialect.weights, 0)

    @property
    def is_quantised(self) -> bool:
        return self.channel != 0

    def shape(self, index: int) -> list[int]:
        return list(self.tensors[index].shape)

    def constant(self, name: str, values: np.ndarray, quantisation: Any = None) -> int:
        self.buffers.append(schema.BufferT(data=np.frombuffer(values.tobytes(), np.uint8)))
        kind = STORED[values.dtype.type]
        tensor = schema.TensorT(list(values.shape), kind, len(self.buffers) - 1, name, quantisation)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def value(self, name: str, shape: Sequence[int], like: int | None = None, kind: int | None = None) -> int:
        """Declare a computed tensor; in 8-bit files its scale covers its range, or is that of tensor `like`."""
        quantisation = None
        if self.is_quantised and kind is None:
            quantisation = self.tensors[like].quantization if like is not None else self._scale(name)
        tensor = schema.TensorT(list(shape), self.channel if kind is None else kind, 0, name, quantisation)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _scale(self, name: str) -> Any:
        low, high = (min(0.0, self.ranges[name][0]), max(1e-3, self.ranges[name][1])) if self.ranges else (-1.0, 1.0)
        scale, first = (high - low) / 255, -128 if self.channel == 9 else 0
        return schema.QuantizationParametersT(scale=[scale], zeroPoint=[first + round(-low / scale)])

    def run(self, code: str, inputs: Sequence[int], output: int, options: Any = None, version: int = 2) -> int:
        number = getattr(schema.BuiltinOperator, code)
        if (number, version) not in self.label_map:
            self.label_map.append((number, version))
        kind = 0 if options is None else getattr(schema.BuiltinOptions, type(options).__name__[:-1])
        index = self.label_map.index((number, version))
        self.operators.append(schema.OperatorT(index, list(inputs), [output], kind, options))
        return output

    def weights(self, name: str, values: np.ndarray, axis: int) -> int:
        """Write weights in the dialect's type; `axis` is that of the output channels."""
        kind = self.dialect.weights
        if kind == "float32":
            return self.constant(name, values)
        if kind == "float16":
            half = self.constant(f"{name}_half", values.astype(np.float16))
            return self.run("DEQUANTIZE", [half], self.value(name, values.shape))
        if kind in ("int8", "hybrid"):
            others = tuple(one for one in range(values.ndim) if one != axis)
            scales = np.maximum(np.abs(values).max(others, keepdims=True), 1e-6) / 127
            stored = np.clip(np.round(values / scales), -127, 127).astype(np.int8)
            flat = [float(scale) for scale in scales.reshape(-1)]
            return self.constant(
                name,
                stored,
                schema.QuantizationParametersT(scale=flat, zeroPoint=[0] * len(flat), quantizedDimension=axis),
            )
        low, high = min(0.0, float(values.min())), max(1e-6, float(values.max()))
        scale = (high - low) / 255
        zero = round(-low / scale)
        stored = np.clip(np.round(values / scale) + zero, 0, 255).astype(np.uint8)
        return self.constant(name, stored, schema.QuantizationParametersT(scale=[scale], zeroPoint=[zero]))

    def bias(self, name: str, values: np.ndarray, source: int, weight: int) -> int:
        if not self.is_quantised:
            return self.constant(name, values)
        scales = np.asarray(self.tensors[weight].quantization.scale) * self.tensors[source].quantization.scale[0]
        stored = np.round(values / scales).astype(np.int32)
        quantisation = schema.QuantizationParametersT(scale=[float(one) for one in scales], zeroPoint=[0] * len(scales))
        return self.constant(name, stored, quantisation)

    def convolution(
        self, source: int, conv: nn.Conv2d, norm: nn.Module | None, activation: int, name: str, keep: int | None = None
    ) -> int:
        """Write a convolution with its batch norm folded in; `keep` output channels of it, input channels as they come."""
        weight, bias = folded(conv, norm)
        batch, height, width, channels = self.shape(source)
        depthwise = conv.groups > 1
        weight = weight[: channels if depthwise else keep, :channels]
        bias = bias[: len(weight)]
        rate, stride, padding = conv.dilation[0], conv.stride[0], SAME
        side = [-(-size // stride) for size in (height, width)]
        # torch: out x in x height x width; TFLite: out x height x width x in, depthwise 1 x height x width x out
        stored = np.ascontiguousarray(weight.transpose(1, 2, 3, 0) if depthwise else weight.transpose(0, 2, 3, 1))
        if self.dialect.explicit_padding and stride > 1:
            source, padding = self._padded(source, conv, f"{name}/pad"), VALID
        block = rate if self.dialect.batches_around_dilation else 1
        if block > 1:
            fill = [-(size + 2 * rate) % rate for size in side]
            source = self._into_batches(source, rate, fill, f"{name}/batches")
            padding, rate = VALID, 1
        index = self.weights(f"{name}/weight", stored, axis=3 if depthwise else 0)
        shape = [batch, *side, len(weight)]
        if block > 1:
            shape = [block**2, *(size - 2 for size in self.shape(source)[1:3]), len(weight)]
        fused = NONE if self.dialect.separate_steps else activation
        options: Any = (
            schema.DepthwiseConv2DOptionsT(padding, stride, stride, 1, fused, rate, rate)
            if depthwise
            else schema.Conv2DOptionsT(padding, stride, stride, fused, rate, rate)
        )
        bias_now = np.zeros_like(bias) if self.dialect.separate_steps else bias
        inputs = [source, index, self.bias(f"{name}/bias", bias_now, source, index)]
        code = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        output = self.run(code, inputs, self.value(name, shape), options, version=3)
        if block > 1:
            sizes = [self.constant(f"{name}/block", np.full(2, block, np.int32))]
            sizes.append(self.constant(f"{name}/crops", np.array([[0, fill[0]], [0, fill[1]]], np.int32)))
            whole = self.value(f"{name}/whole", [batch, *side, len(weight)], like=output)
            output = self.run("BATCH_TO_SPACE_ND", [output, *sizes], whole, schema.BatchToSpaceNDOptionsT())
        if self.dialect.separate_steps:
            added = self.constant(f"{name}/offset", bias)
            output = self.run(
                "ADD", [added, output], self.value(f"{name}/sum", self.shape(output)), schema.AddOptionsT(NONE, False)
            )
            if activation != NONE:
                code = "RELU6" if activation == RELU6 else "RELU"
                output = self.run(code, [output], self.value(f"{name}/{code}", self.shape(output)))
        return output

    def _padded(self, source: int, conv: nn.Conv2d, name: str) -> int:
        batch, height, width, channels = self.shape(source)
        reach = conv.kernel_size[0] // 2
        symmetric = not type(conv).__name__.endswith("Same")
        rows = [(reach, reach) if symmetric or size % 2 else (reach - 1, reach) for size in (height, width)]
        amounts = self.constant(f"{name}/amounts", np.array([(0, 0), *rows, (0, 0)], np.int32))
        shape = [batch, height + sum(rows[0]), width + sum(rows[1]), channels]
        return self.run("PAD", [source, amounts], self.value(name, shape, like=source), schema.PadOptionsT())

    def _into_batches(self, source: int, rate: int, fill: list[int], name: str) -> int:
        _, height, width, channels = self.shape(source)
        paddings = np.array([[rate, rate + fill[0]], [rate, rate + fill[1]]], np.int32)
        sizes = [self.constant(f"{name}/block", np.full(2, rate, np.int32)), self.constant(f"{name}/paddings", paddings)]
        shape = [rate**2, (height + int(paddings[0].sum())) // rate, (width + int(paddings[1].sum())) // rate, channels]
        output = self.value(name, shape, like=source)
        return self.run("SPACE_TO_BATCH_ND", [source, *sizes], output, schema.SpaceToBatchNDOptionsT())

    def resize(self, source: int, height: int, width: int, name: str, *, align_corners: bool) -> int:
        size = self.constant(f"{name}/size", np.array([height, width], np.int32))
        output = self.value(name, [1, height, width, self.shape(source)[3]], like=source)
        half = self.dialect.half_pixel_centers
        return self.run(
            "RESIZE_BILINEAR", [source, size], output, schema.ResizeBilinearOptionsT(align_corners, half), version=3
        )

    def pooled(self, source: int) -> int:
        _, height, width, channels = self.shape(source)
        if self.dialect.pool_by_mean:
            axes = self.constant("pool/axes", np.array([1, 2], np.int32))
            return self.run("MEAN", [source, axes], self.value("pool", [1, 1, 1, channels]), schema.ReducerOptionsT(True))
        options = schema.Pool2DOptionsT(VALID, 1, 1, width, height, NONE)
        return self.run("AVERAGE_POOL_2D", [source], self.value("pool", [1, 1, 1, channels], like=source), options)

    def mobilenetv2(self, image: int, encoder: nn.Module) -> int:
        narrow = self.dialect.narrow or {}
        modules = dict(encoder.named_modules())
        x = self.convolution(image, modules["conv_stem"], modules["bn1"], RELU6, "stem", narrow.get(-1))
        for name, block in modules.items():
            if not hasattr(block, "has_skip"):
                continue
            skip, keep = x, narrow.get(int(name.split(".")[1]))
            if hasattr(block, "conv_pwl"):
                width = 6 * self.shape(x)[3] if narrow else None
                x = self.convolution(x, block.conv_pw, block.bn1, RELU6, f"{name}/expand", width)
                x = self.convolution(x, block.conv_dw, block.bn2, RELU6, f"{name}/depthwise")
                x = self.convolution(x, block.conv_pwl, block.bn3, NONE, f"{name}/project", keep)
            else:
                x = self.convolution(x, block.conv_dw, block.bn1, RELU6, f"{name}/depthwise")
                x = self.convolution(x, block.conv_pw, block.bn2, NONE, f"{name}/project", keep)
            if block.has_skip:
                x = self.run("ADD", [x, skip], self.value(f"{name}/sum", self.shape(x)), schema.AddOptionsT(NONE, False))
        return x

    def deeplab(self, image: int, net: DeepLab) -> int:
        feature = self.mobilenetv2(image, net.encoder)
        _, height, width, _ = self.shape(feature)
        align = net.config.align_corners
        aspp = net.head.aspp
        branches = []
        for index, branch in enumerate(aspp.branches):
            x = feature
            for part in [branch] if hasattr(branch, "conv") else [branch.depthwise, branch.pointwise]:
                x = self.convolution(x, part.conv, part.norm, RELU, f"branch{index}/{part.conv.kernel_size[0]}")
            branches.append(x)
        if self.dialect.reverse_branches:
            branches.reverse()
        x = self.convolution(self.pooled(feature), aspp.pool.conv, aspp.pool.norm, RELU, "pool/conv")
        pooled = self.resize(x, height, width, "pool/resize", align_corners=align)
        branches.insert(0 if aspp.pooling_first else len(branches), pooled)
        joined = self.value("concat", [1, height, width, len(branches) * self.shape(x)[3]])
        if self.is_quantised:
            same = [self.value(f"concat/{index}", self.shape(one), like=joined) for index, one in enumerate(branches)]
            branches = [self.run("QUANTIZE", [one], to) for one, to in zip(branches, same, strict=True)]
        x = self.run("CONCATENATION", branches, joined, schema.ConcatenationOptionsT(3, NONE))
        x = self.convolution(x, aspp.project.conv, aspp.project.norm, RELU, "project")
        if net.config.refine_conv:
            x = self.convolution(x, net.head.refine.conv, net.head.refine.norm, RELU, "refine")
        return self.convolution(x, net.head.classifier, None, NONE, "logits")

    def finish(self, image: int, output: int) -> bytes:
        label_map = [schema.OperatorCodeT(min(code, 127), None, version, code) for code, version in self.label_map]
        graph = schema.SubGraphT(self.tensors, [image], [output], self.operators, "main")
        model = schema.ModelT(3, label_map, [graph], "written by a test", self.buffers)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output()) + self._labels()

    def _labels(self) -> bytes:
        if not self.dialect.labels:
            return b""
        attached = io.BytesIO()
        with zipfile.ZipFile(attached, "w") as archive:
            archive.writestr("labelmap.txt", "\n".join(self.dialect.labels))
        return attached.getvalue()


def folded(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of a convolution with its batch norm (in eval mode) folded in."""
    weight = conv.weight.detach().double()
    bias = torch.zeros(len(weight)).double() if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        factor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * factor[:, None, None, None]
        bias = norm.bias.detach().double() + (bias - norm.running_mean.double()) * factor
    return weight.float().numpy(), bias.float().numpy()


def _image(writer: _Writer, height: int, width: int) -> tuple[int, int]:
    """Write the input (and its scaling); returns (graph input, what the first convolution reads)."""
    if not writer.dialect.scaling_in_graph:
        image = writer.value("image", [1, height, width, 3])
        return image, image
    image = writer.value("image", [1, height, width, 3])
    factor = writer.constant("factor", np.array([1 / 127.5], np.float32))
    one = writer.constant("one", np.array([1], np.float32))
    x = writer.run("MUL", [image, factor], writer.value("scaled", [1, height, width, 3]), schema.MulOptionsT())
    return image, writer.run("SUB", [x, one], writer.value("centred", [1, height, width, 3]), schema.SubOptionsT())


def _deeplab_once(net: DeepLab, height: int, width: int, dialect: Dialect, ranges: Mapping[str, Range] | None) -> bytes:
    writer = _Writer(dialect, ranges)
    image, x = _image(writer, height, width)
    x = writer.deeplab(x, net)
    if dialect.upsample:
        x = writer.resize(x, height, width, "upsampled", align_corners=net.config.align_corners)
    if dialect.argmax:
        axis = writer.constant("axis", np.array(3, np.int32))
        output = writer.value("labels", writer.shape(x)[:3], kind=4)
        x = writer.run("ARG_MAX", [x, axis], output, schema.ArgMaxOptionsT(4))
    return writer.finish(image, x)


def write_deeplab(net: DeepLab, height: int, width: int, dialect: Dialect | None = None) -> bytes:
    """Return a TensorFlow Lite file of `net` for images of height x width."""
    dialect = dialect or Dialect()
    ranges = None
    if dialect.weights in ("uint8", "int8"):
        plain = Dialect(argmax=False, pool_by_mean=dialect.pool_by_mean)
        ranges = _observed_ranges(_deeplab_once(net, height, width, plain, None), height, width)
    return _deeplab_once(net, height, width, dialect, ranges)


def write_classifier(encoder: nn.Module, side: int, num_classes: int, *, fully_connected: bool) -> bytes:
    """Return a classifier: encoder, a 1x1 convolution to 1280 channels, mean, class scores, SOFTMAX; random last layers."""
    writer = _Writer(Dialect(), None)
    image = writer.value("image", [1, side, side, 3])
    x = writer.mobilenetv2(image, encoder)
    x = writer.convolution(x, nn.Conv2d(writer.shape(x)[3], 1280, 1), None, RELU6, "conv_head")
    x = writer.pooled(x)
    if fully_connected:
        weight = writer.constant("scores/weight", np.random.default_rng(0).normal(size=(num_classes, 1280)).astype(np.float32))
        flat = writer.constant("flat", np.array([1, 1280], np.int32))
        x = writer.run("RESHAPE", [x, flat], writer.value("flattened", [1, 1280]), version=1)
        scores = writer.value("scores", [1, num_classes])
        x = writer.run("FULLY_CONNECTED", [x, weight, -1], scores, schema.FullyConnectedOptionsT(), version=1)
    else:
        x = writer.convolution(x, nn.Conv2d(1280, num_classes, 1), None, NONE, "scores")
        flat = writer.constant("flat", np.array([1, num_classes], np.int32))
        x = writer.run("RESHAPE", [x, flat], writer.value("squeezed", [1, num_classes]), version=1)
    x = writer.run("SOFTMAX", [x], writer.value("shares", [1, num_classes]), schema.SoftmaxOptionsT(1.0), version=1)
    return writer.finish(image, x)


def run_tflite(data: bytes, image: np.ndarray) -> np.ndarray:
    """Return the runtime's answer for one image in the file's own input type, 1 x H x W x 3; 8-bit answers as real values."""
    interpreter = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    entry, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.set_tensor(entry["index"], image)
    interpreter.invoke()
    values = interpreter.get_tensor(answer["index"])
    scale, zero = answer["quantization"]
    return values if not scale else (values.astype(np.float32) - zero) * scale


def _observed_ranges(data: bytes, height: int, width: int) -> dict[str, Range]:
    interpreter = Interpreter(
        model_content=data,
        num_threads=1,
        experimental_preserve_all_tensors=True,
        # delegates fuse operators and leave the tensors between them empty
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    entry = interpreter.get_input_details()[0]["index"]
    interpreter.set_tensor(entry, np.random.default_rng(1).uniform(-1, 1, (1, height, width, 3)).astype(np.float32))
    interpreter.invoke()
    ranges: dict[str, Range] = {}
    for tensor in interpreter.get_tensor_details():
        if tensor["dtype"] is np.float32 and tensor["name"]:
            values = interpreter.get_tensor(tensor["index"])
            ranges[tensor["name"]] = (float(values.min()), float(values.max()))
    return ranges | {"image": (-1.0, 1.0)}
