"""A convolution of a frozen TensorFlow graph: its weights by name, and by the graph's edges everything else about it.

`tf_slim` writes one convolution as a handful of nodes: padding or SPACE_TO_BATCH before it, which is how TensorFlow 1 dilates,
the convolution, BATCH_TO_SPACE, a bias or a fused batch norm, an activation. Names tell which convolution it is; stride,
rate, padding, epsilon and statistics are read off the nodes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from deeplabzoo.errors import WeightsError
from deeplabzoo.zoo.origins.graphdef import FloatArray, GraphDef, Node

NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
ACTIVATIONS = ("Relu", "Relu6")
_BIASES = ("BiasAdd", "Add", "AddV2")
_MAX_STEP = 1 << 16
_MAX_HOPS = 64

Padding = Literal["same", "symmetric"]


@dataclass(frozen=True)
class Norm:
    """A batch norm's four vectors and its epsilon."""

    gamma: FloatArray
    beta: FloatArray
    mean: FloatArray
    variance: FloatArray
    eps: float


@dataclass(frozen=True, eq=False)
class Convolution:
    """One convolution with what belongs to it."""

    scope: str
    """The name that its weights have without their last part."""
    weight: FloatArray
    """out x in x height x width; depthwise ones have 1 channel in."""
    stride: int
    rate: int
    padding: Padding
    """TensorFlow's 'SAME', or as many rows before as after; at stride 1 the two are the same."""
    norm: Norm | None
    bias: FloatArray | None
    source: Node
    """What it reads, past padding."""
    end: Node
    """Its norm or bias, or the convolution itself."""
    activation: str
    """The activation that alone reads the norm, or an empty string."""

    @property
    def output(self) -> int:
        """Number of channels."""
        return int(self.weight.shape[0])


def has_convolution(graph: GraphDef, scope: str) -> bool:
    """Whether the graph holds weights of this name."""
    return f"{scope}/weights" in graph.nodes or f"{scope}/depthwise_weights" in graph.nodes


def read_convolution(graph: GraphDef, scope: str) -> Convolution:
    """Read the convolution whose weights have this name; raises WeightsError where it is none that DeepLab has."""
    depthwise = f"{scope}/depthwise_weights" in graph.nodes
    name = f"{scope}/{'depthwise_weights' if depthwise else 'weights'}"
    if name not in graph.nodes:
        raise WeightsError(
            f"The TensorFlow graph has no weights '{name}'; this is no network of its DeepLab zoo that is known."
        )
    weight = graph.real(graph.nodes[name])
    expected = "DepthwiseConv2dNative" if depthwise else "Conv2D"
    readers = graph.readers_of(graph.nodes[name])
    if len(readers) != 1 or readers[0].op != expected:
        raise WeightsError(
            f"The weights '{name}' are read by {len(readers)} nodes ({', '.join(one.op for one in readers[:3])}); expected one "
            f"{expected}, as in graphs of a single scale without quantisation."
        )
    node = readers[0]
    if weight.ndim != 4 or node.text("data_format", "NHWC") != "NHWC" or (depthwise and weight.shape[3] != 1):
        raise WeightsError(f"Convolution '{scope}' has weights of shape {weight.shape}; expected height x width x in x out.")
    weight = weight.transpose(2, 3, 0, 1) if depthwise else weight.transpose(3, 2, 0, 1)
    stride, rate = (_square(node.integers(kind), scope) for kind in ("strides", "dilations"))
    source = graph.input_of(node, 0)
    says = node.text("padding")
    amounts = None
    if source.op == "SpaceToBatchND":
        rate *= _block(graph, source, scope)
        says, source = "SAME" if says == "VALID" else "", graph.input_of(source, 0)
    elif source.op == "Pad":
        amounts, source = graph.values(graph.input_of(source, 1)), graph.input_of(source, 0)
    bias, norm, end = _after(graph, node, weight.shape[0], scope)
    activations = graph.readers_of(end)
    lone = activations[0].op if len(activations) == 1 and activations[0].op in ACTIVATIONS else ""
    return Convolution(scope, weight, stride, rate, _padding(says, amounts, weight, rate, scope), norm, bias, source, end, lone)


def origin_of(graph: GraphDef, node: Node) -> Convolution:
    """Return the convolution that made a map, past norms, activations and enlarging."""
    for _ in range(_MAX_HOPS):
        if node.op in ("Conv2D", "DepthwiseConv2dNative"):
            scope, _, kind = graph.input_of(node, 1).name.rpartition("/")
            if kind in ("weights", "depthwise_weights"):
                return read_convolution(graph, scope)
            break
        if node.op not in (*NORMS, *ACTIVATIONS, "ResizeBilinear", "BatchToSpaceND", "BiasAdd"):
            break
        node = graph.input_of(node, 0)
    raise WeightsError(f"Node '{node.name}' ({node.op}) of the graph stands where the output of a convolution was expected.")


def _after(graph: GraphDef, node: Node, channels: int, scope: str) -> tuple[FloatArray | None, Norm | None, Node]:
    """Return bias, norm and last node of what a convolution is followed by."""
    readers = graph.readers_of(node)
    if len(readers) == 1 and readers[0].op == "BatchToSpaceND":
        node = readers[0]
        readers = graph.readers_of(node)
    if len(readers) == 1 and readers[0].op in _BIASES and graph.input_of(readers[0], 1).op == "Const":
        bias = graph.real(graph.input_of(readers[0], 1))
        if bias.shape != (channels,):
            raise WeightsError(f"Convolution '{scope}' of {channels} channels has a bias of shape {bias.shape}.")
        return bias, None, readers[0]
    if len(readers) == 1 and readers[0].op in NORMS:
        found = readers[0]
        vectors = [graph.real(graph.input_of(found, index)) for index in range(1, 5)]
        if any(vector.shape != (channels,) for vector in vectors) or (vectors[3] < 0).any():
            raise WeightsError(f"Convolution '{scope}' of {channels} channels has a batch norm of other vectors.")
        eps = found.number("epsilon", 1e-4)  # what the operation's definition says for graphs that leave it out
        if not 0 < eps < 1:
            raise WeightsError(f"The batch norm of '{scope}' has epsilon {eps}; the file is damaged.")
        return None, Norm(vectors[0], vectors[1], vectors[2], vectors[3], eps), found
    raise WeightsError(
        f"Convolution '{scope}' is followed by {', '.join(one.op for one in readers[:3]) or 'nothing'}; expected a bias or one "
        "fused batch norm, as in the frozen graphs of TensorFlow's DeepLab zoo."
    )


def _padding(says: str, amounts: "np.ndarray | None", weight: FloatArray, rate: int, scope: str) -> Padding:
    reach = [rate * (size // 2) for size in weight.shape[2:]]
    if says == "SAME" and amounts is None:
        return "same"
    if says == "VALID" and amounts is None and reach == [0, 0]:
        return "symmetric"
    around = [[0, 0], [reach[0]] * 2, [reach[1]] * 2, [0, 0]]
    if says == "VALID" and amounts is not None and amounts.tolist() == around:
        return "symmetric"
    raise WeightsError(f"Convolution '{scope}' is padded in a way that is neither TensorFlow's 'SAME' nor symmetric.")


def _block(graph: GraphDef, node: Node, scope: str) -> int:
    """Return the rate that SPACE_TO_BATCH makes; its paddings are 'SAME' at every size where the graph works them out."""
    block = [int(value) for value in graph.values(graph.input_of(node, 1)).reshape(-1)]
    paddings = graph.input_of(node, 2)
    if paddings.op == "Const" and len(block) == 2:
        before = [int(value) for value in graph.values(paddings).reshape(-1)[::2]]
        if before != block:
            raise WeightsError(f"Convolution '{scope}' of rate {block} is padded by {before}; expected as much.")
    return _square((1, *block, 1), scope)


def _square(values: tuple[int, ...], scope: str) -> int:
    if not values:
        return 1
    if len(values) != 4 or (values[0], values[3]) != (1, 1) or values[1] != values[2] or not 1 <= values[1] < _MAX_STEP:
        raise WeightsError(f"Convolution '{scope}' has strides or rates {values[:8]}; expected the same for height and width.")
    return values[1]
