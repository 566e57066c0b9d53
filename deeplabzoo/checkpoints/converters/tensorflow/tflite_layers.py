"""The operators of a TensorFlow Lite graph, rewritten as the few kinds of layer that a converter has to understand.

Converters write one model in many ways. Here they become one: quantisation steps and reshapes vanish, padding joins its
convolution, SPACE_TO_BATCH_ND around a convolution becomes its dilation, separate biases, scales and activations are
folded in. What is not understood stays as a layer of the operator's own name; only a model that needs it fails.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deeplabzoo.checkpoints.converters.tensorflow.tflite_graph import FloatArray, Graph, Operator, damaged_flatbuffer
from deeplabzoo.errors import WeightsError

CONVOLUTION, DEPTHWISE = "convolution", "depthwise convolution"
_IN_BATCHES = " inside SPACE_TO_BATCH_ND"
_SAME_VALUE = {"QUANTIZE", "DEQUANTIZE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS", "CAST"}
# schema's enum ActivationFunctionType
_ACTIVATIONS = {0: "", 1: "RELU", 2: "RELU_N1_TO_1", 3: "RELU6", 4: "TANH", 5: "SIGN_BIT"}
_SAME = 0  # schema's enum Padding
_MAX_STEP = 1 << 16  # no stride, dilation or padding is larger

Amounts = tuple[int, int, int, int]
"""Padding in pixels: top, bottom, left, right."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer and what feeds it; layers are compared by identity, so a graph's joins can be recognised."""

    kind: str
    """`input`, `convolution`, `depthwise convolution`, or a TensorFlow Lite operator's name."""
    name: str
    """The name of the tensor that it makes, for messages."""
    sources: tuple["Layer", ...] = ()
    shape: tuple[int, ...] = ()
    """Output shape in NHWC order."""
    weight: FloatArray | None = None
    """Convolutions: out x in x height x width; input: factor per channel."""
    bias: FloatArray | None = None
    """Per output channel; input: offset per channel, applied after the factor."""
    stride: int = 1
    dilation: int = 1
    padding: Amounts = (0, 0, 0, 0)
    is_same_padding: bool = False
    """The file says 'SAME' instead of giving the amounts."""
    activation: str = ""
    """Empty or the operator's name."""
    align_corners: bool = False
    half_pixel_centers: bool = False
    value_range: tuple[float, float] | None = None
    """Input: the real values that its 8-bit form spans."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what feeds the layer, NHWC."""
        return self.sources[0].shape

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of a convolution's kernel; (0, 0) for other layers."""
        return (0, 0) if self.weight is None or self.kind == "input" else (self.weight.shape[2], self.weight.shape[3])

    def __str__(self) -> str:
        return f"{self.kind} '{self.name}'"


def read_layers(graph: Graph) -> tuple[Layer, Layer]:
    """Return the graph's (input, output) layers; raises WeightsError if it has not exactly one of each.

    Operators stand in the order in which they run, so the result is acyclic by construction.
    """
    if len(graph.inputs) != 1 or not graph.outputs:
        raise WeightsError(f"The TensorFlow Lite file has {len(graph.inputs)} inputs; expected one, the image.")
    if len(graph.outputs) != 1:
        raise WeightsError(f"The TensorFlow Lite file has {len(graph.outputs)} outputs; expected one, logits or labels.")
    return _LayerReader(graph).read(graph.inputs[0], graph.outputs[0])


class _LayerReader:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.layers: dict[int, Layer] = {}
        self.constants: dict[int, int] = {}  # tensors that DEQUANTIZE makes of constants (float16 weights) -> those

    def read(self, start: int, end: int) -> tuple[Layer, Layer]:
        tensor = self.graph.tensors[start]
        image = Layer("input", tensor.name, shape=tensor.shape, value_range=tensor.real_range())
        self.layers[start] = image
        for operator in self.graph.operators:
            if not operator.outputs:
                continue
            values = [index for index in operator.inputs if index in self.layers]
            if operator.name == "DEQUANTIZE" and operator.inputs and self.graph.is_constant(operator.inputs[0]):
                self.constants[operator.outputs[0]] = operator.inputs[0]
            elif values:
                shape = self.graph.tensors[operator.outputs[0]].shape
                name = self.graph.tensors[operator.outputs[0]].name
                layer = self._layer(operator, [self.layers[index] for index in values], name, shape)
                self.layers[operator.outputs[0]] = layer
        if end not in self.layers:
            raise WeightsError("The TensorFlow Lite file's output does not depend on its input image.")
        return image, self.layers[end]

    def _layer(self, operator: Operator, sources: list[Layer], name: str, shape: tuple[int, ...]) -> Layer:
        first, kind = sources[0], operator.name
        if kind in _SAME_VALUE:
            if first.kind == "input" and kind == "QUANTIZE" and first.value_range is None:
                return replace(first, value_range=self.graph.tensors[operator.outputs[0]].real_range())
            return first
        if kind in ("RELU", "RELU6") and first.kind.startswith((CONVOLUTION, DEPTHWISE)) and not first.activation:
            return replace(first, activation=kind, name=name)
        if kind in ("ADD", "SUB", "MUL", "DIV") and len(sources) == 1:
            return self._with_constant(operator, first, name)
        if kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
            return self._convolution(operator, first, name, shape)
        plain = Layer(kind, name, tuple(sources), shape)
        if kind == "RESIZE_BILINEAR":
            align, half = operator.option(2, "<B") != 0, operator.option(3, "<B") != 0
            return replace(plain, align_corners=align, half_pixel_centers=half)
        if kind == "ADD":
            return replace(plain, activation=_activation(operator, 0))
        if kind == "CONCATENATION":
            axis = operator.option(0)
            return plain if axis in (-1, len(shape) - 1) else replace(plain, kind=f"CONCATENATION along dimension {axis}")
        if kind == "PAD":
            return replace(plain, padding=self._amounts(operator, 1, first_row=1))
        if kind in ("SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND"):
            return self._batches(operator, plain)
        return plain

    def _with_constant(self, operator: Operator, layer: Layer, name: str) -> Layer:
        """Fold `layer op constant` into the layer's own factor and offset, where that is possible."""
        position = 1 if operator.inputs[0] in self.layers else 0
        opaque = Layer(operator.name, name, (layer,), layer.shape)
        foldable = layer.kind == "input" or layer.kind.startswith((CONVOLUTION, DEPTHWISE))
        reversed_difference = position == 0 and operator.name in ("SUB", "DIV")
        if not foldable or layer.activation or reversed_difference or len(operator.inputs) != 2:
            return opaque
        constant = self._float_values(operator.inputs[position])
        channels = layer.shape[-1] if layer.shape else 0
        if constant.size != 1 and not (constant.shape and constant.size == constant.shape[-1] == channels):
            return opaque
        values = np.broadcast_to(constant.reshape(-1), (channels,))
        weight = np.ones((channels, 1, 1, 1), np.float32) if layer.weight is None else layer.weight
        bias = np.zeros(channels, np.float32) if layer.bias is None else layer.bias
        if operator.name in ("MUL", "DIV"):
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                factor = values if operator.name == "MUL" else np.reciprocal(values)
                weight, bias = weight * factor.reshape(-1, 1, 1, 1), bias * factor
        else:
            bias = bias + values if operator.name == "ADD" else bias - values
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise WeightsError(f"Layer '{name}' has a scale that is not a finite number; the file cannot be used.")
        return replace(layer, weight=weight, bias=bias, name=name, activation=_activation(operator, 0))

    def _convolution(self, operator: Operator, source: Layer, name: str, shape: tuple[int, ...]) -> Layer:
        depthwise = operator.name == "DEPTHWISE_CONV_2D"
        if len(operator.inputs) < 2 or operator.inputs[0] not in self.layers:
            raise damaged_flatbuffer(f"the convolution '{name}' has no weights")
        weight = self._float_values(operator.inputs[1])
        if operator.name == "FULLY_CONNECTED":
            if weight.ndim != 2:
                raise damaged_flatbuffer(f"the fully connected layer '{name}' has weights of shape {weight.shape}")
            bias = self._bias(operator, weight.shape[0])
            weight = weight.reshape(*weight.shape, 1, 1)
            return Layer(CONVOLUTION, name, (source,), shape, weight, bias, activation=_activation(operator, 0))
        if weight.ndim != 4 or len(source.shape) != 4 or min(weight.shape) < 1:
            raise damaged_flatbuffer(
                f"the convolution '{name}' has weights of shape {weight.shape} on a map of shape {source.shape}"
            )
        # depthwise weights are stored 1 x height x width x out, others out x height x width x in
        weight = weight.transpose(3, 0, 1, 2) if depthwise else weight.transpose(0, 3, 1, 2)
        read = 1 if depthwise else source.shape[3]
        if weight.shape[1] != read or (depthwise and source.shape[3] != len(weight)) or shape[3:] != (len(weight),):
            raise damaged_flatbuffer(
                f"the convolution '{name}' maps {source.shape} to {shape} with weights of shape {weight.shape}"
            )
        bias = self._bias(operator, weight.shape[0])
        strides, dilations = (1, 2), (5, 6) if depthwise else (4, 5)
        stride = _square([operator.option(slot) for slot in strides], name)
        dilation = _square([operator.option(slot, default=1) for slot in dilations], name)
        layer = Layer(
            DEPTHWISE if depthwise else CONVOLUTION,
            name,
            (source,),
            shape,
            weight,
            bias,
            stride=stride,
            dilation=dilation,
            activation=_activation(operator, 4 if depthwise else 3),
        )
        return _with_padding(layer, source, is_same_padding=operator.option(0, "<b") == _SAME)

    def _bias(self, operator: Operator, channels: int) -> FloatArray:
        """Return the bias; as integers it has the scale of the accumulator it is added to, input scale x weight scale."""
        if len(operator.inputs) < 3 or operator.inputs[2] < 0:
            return np.zeros(channels, np.float32)
        index = operator.inputs[2]
        source, weight, bias = (self.graph.tensors[one] for one in (*operator.inputs[:2], index))
        if self.graph.is_constant(index) and source.is_quantised and weight.is_quantised and len(source.scales) == 1:
            values: NDArray[np.floating] = self.graph.stored(index).astype(np.float64).reshape(-1)
            if len(weight.scales) in (1, len(values)) and bias.type in (2, 4):
                values = values * np.asarray(weight.scales) * source.scales[0]
        else:
            values = self._float_values(index).reshape(-1)
        if len(values) != channels or not np.isfinite(values).all():
            raise damaged_flatbuffer(
                f"a convolution of {channels} channels has {len(values)} biases, or biases that are not finite"
            )
        return values.astype(np.float32)

    def _float_values(self, index: int) -> FloatArray:
        index = self.constants.get(index, index)
        if index < 0 or not self.graph.is_constant(index):
            name = self.graph.tensors[index].name if index >= 0 else "left out"
            raise WeightsError(f"Tensor '{name}' is computed while the model runs, where weights in the file were expected.")
        return self.graph.float_values(index)

    def _amounts(self, operator: Operator, position: int, first_row: int) -> Amounts:
        """Read an operator's constant table of paddings (or crops), rows of (before, after), from the row of the height on."""
        if position >= len(operator.inputs) or not self.graph.is_constant(operator.inputs[position]):
            raise WeightsError(f"The {operator.name} operator computes its amounts while the model runs; not supported.")
        values = self.graph.stored(operator.inputs[position]).reshape(-1)[2 * first_row : 2 * first_row + 4]
        top, bottom, left, right = [int(value) for value in values] if len(values) == 4 else [-1] * 4
        if not all(0 <= value < _MAX_STEP for value in (top, bottom, left, right)):
            raise damaged_flatbuffer(f"its {operator.name} operator has amounts {values.tolist()}")
        return top, bottom, left, right

    def _batches(self, operator: Operator, plain: Layer) -> Layer:
        """Open or close the pair of operators that older converters write for a dilated convolution."""
        if len(operator.inputs) < 2 or not self.graph.is_constant(operator.inputs[1]):
            raise WeightsError(f"The {operator.name} operator computes its block while the model runs; not supported.")
        block = _square([int(value) for value in self.graph.stored(operator.inputs[1]).reshape(-1)], plain.name)
        amounts = self._amounts(operator, 2, first_row=0)
        source = plain.sources[0]
        if operator.name == "SPACE_TO_BATCH_ND":
            return replace(plain, dilation=block, padding=amounts)
        if not source.kind.endswith(_IN_BATCHES) or source.dilation != block:
            return plain
        # the crop takes away what was padded at the bottom and right to fill the last block
        top, bottom, left, right = source.padding
        padding = (top - amounts[0], bottom - amounts[1], left - amounts[2], right - amounts[3])
        return replace(source, kind=source.kind.removesuffix(_IN_BATCHES), padding=padding, shape=plain.shape)


def _with_padding(layer: Layer, source: Layer, *, is_same_padding: bool) -> Layer:
    if source.kind == "SPACE_TO_BATCH_ND":
        if (is_same_padding and layer.kernel != (1, 1)) or layer.stride != 1 or layer.dilation != 1:
            return replace(layer, kind=f"padded {layer.kind}{_IN_BATCHES}", sources=source.sources)
        kind = layer.kind + _IN_BATCHES
        return replace(layer, kind=kind, sources=source.sources, dilation=source.dilation, padding=source.padding)
    if is_same_padding:
        return replace(layer, padding=same_padding(layer, source.shape), is_same_padding=True)
    if source.kind == "PAD":
        return replace(layer, sources=source.sources, padding=source.padding)
    return layer


def same_padding(layer: Layer, shape: tuple[int, ...]) -> Amounts:
    """Return TensorFlow's 'SAME' padding of a convolution over an input of `shape` (NHWC): the odd pixel goes to the end."""
    amounts: list[int] = []
    for size, kernel in zip(shape[1:3], layer.kernel, strict=True):
        outputs = -(-size // layer.stride)
        total = max((outputs - 1) * layer.stride + (kernel - 1) * layer.dilation + 1 - size, 0)
        amounts += [total // 2, total - total // 2]
    return amounts[0], amounts[1], amounts[2], amounts[3]


def _activation(operator: Operator, slot: int) -> str:
    code = operator.option(slot, "<b")
    return _ACTIVATIONS.get(code, f"activation {code}")


def _square(values: list[int], name: str) -> int:
    if not values or min(values) != max(values) or not 1 <= values[0] < _MAX_STEP:
        raise WeightsError(
            f"Layer '{name}' has strides or dilations {values[:4]}; one whole number for height and width expected."
        )
    return values[0]
