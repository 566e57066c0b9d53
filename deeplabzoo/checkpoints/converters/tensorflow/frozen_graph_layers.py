"""A convolution of a frozen TensorFlow graph: its weights by name, and by the graph's edges everything else about it.

`tf_slim` writes one convolution as a handful of nodes: padding or SPACE_TO_BATCH before it, which is how TensorFlow 1 dilates,
the convolution, BATCH_TO_SPACE, a bias or a fused batch norm, an activation. Names tell which convolution it is; stride,
rate, padding, epsilon and statistics are read off the nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deeplabzoo.checkpoints.converters.tensorflow.graphdef import FloatArray, GraphDef, Node
from deeplabzoo.errors import WeightsError

BATCH_NORM_OPS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
ACTIVATION_OPS = ("Relu", "Relu6")
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
    dilation: int
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
        raise WeightsError(f"The TensorFlow graph has no weights '{name}'; this is no model of its DeepLab zoo that is known.")
    weight = graph.float_values(graph.nodes[name])
    expected = "DepthwiseConv2dNative" if depthwise else "Conv2D"
    consumers = graph.consumers_of(graph.nodes[name])
    if len(consumers) != 1 or consumers[0].op != expected:
        raise WeightsError(
            f"The weights '{name}' are read by {len(consumers)} nodes ({', '.join(one.op for one in consumers[:3])}); expected "
            f"one {expected}, as in graphs of a single scale without quantisation."
        )
    node = consumers[0]
    if weight.ndim != 4 or node.text("data_format", "NHWC") != "NHWC" or (depthwise and weight.shape[3] != 1):
        raise WeightsError(f"Convolution '{scope}' has weights of shape {weight.shape}; expected height x width x in x out.")
    weight = weight.transpose(2, 3, 0, 1) if depthwise else weight.transpose(3, 2, 0, 1)
    stride, dilation = (_square(node.integers(kind), scope) for kind in ("strides", "dilations"))
    source = graph.input_of(node, 0)
    padding_name = node.text("padding")
    amounts = None
    if source.op == "SpaceToBatchND":
        dilation *= _block(graph, source, scope)
        padding_name, source = "SAME" if padding_name == "VALID" else "", graph.input_of(source, 0)
    elif source.op == "Pad":
        amounts, source = graph.values(graph.input_of(source, 1)), graph.input_of(source, 0)
    bias, norm, end = _following_ops(graph, node, weight.shape[0], scope)
    activations = graph.consumers_of(end)
    only_consumer = activations[0].op if len(activations) == 1 and activations[0].op in ACTIVATION_OPS else ""
    return Convolution(
        scope,
        weight,
        stride,
        dilation,
        _padding(padding_name, amounts, weight, dilation, scope),
        norm,
        bias,
        source,
        end,
        only_consumer,
    )


def source_convolution(graph: GraphDef, node: Node) -> Convolution:
    """Return the convolution that made a map, past batch norms, activations and upsampling."""
    for _ in range(_MAX_HOPS):
        if node.op in ("Conv2D", "DepthwiseConv2dNative"):
            scope, _, kind = graph.input_of(node, 1).name.rpartition("/")
            if kind in ("weights", "depthwise_weights"):
                return read_convolution(graph, scope)
            break
        if node.op not in (*BATCH_NORM_OPS, *ACTIVATION_OPS, "ResizeBilinear", "BatchToSpaceND", "BiasAdd"):
            break
        node = graph.input_of(node, 0)
    raise WeightsError(f"Node '{node.name}' ({node.op}) of the graph stands where the output of a convolution was expected.")


def _following_ops(graph: GraphDef, node: Node, channels: int, scope: str) -> tuple[FloatArray | None, Norm | None, Node]:
    """Return bias, norm and last node of what a convolution is followed by."""
    consumers = graph.consumers_of(node)
    if len(consumers) == 1 and consumers[0].op == "BatchToSpaceND":
        node = consumers[0]
        consumers = graph.consumers_of(node)
    if len(consumers) == 1 and consumers[0].op in _BIASES and graph.input_of(consumers[0], 1).op == "Const":
        bias = graph.float_values(graph.input_of(consumers[0], 1))
        if bias.shape != (channels,):
            raise WeightsError(f"Convolution '{scope}' of {channels} channels has a bias of shape {bias.shape}.")
        return bias, None, consumers[0]
    if len(consumers) == 1 and consumers[0].op in BATCH_NORM_OPS:
        found = consumers[0]
        vectors = [graph.float_values(graph.input_of(found, index)) for index in range(1, 5)]
        if any(vector.shape != (channels,) for vector in vectors) or (vectors[3] < 0).any():
            raise WeightsError(f"Convolution '{scope}' of {channels} channels has a batch norm of other vectors.")
        eps = found.number("epsilon", 1e-4)  # what the operation's definition says for graphs that leave it out
        if not 0 < eps < 1:
            raise WeightsError(f"The batch norm of '{scope}' has epsilon {eps}; the file is damaged.")
        return None, Norm(vectors[0], vectors[1], vectors[2], vectors[3], eps), found
    raise WeightsError(
        f"Convolution '{scope}' is followed by {', '.join(one.op for one in consumers[:3]) or 'nothing'}; expected a bias or "
        "one fused batch norm, as in the frozen graphs of TensorFlow's DeepLab zoo."
    )


def _padding(padding_name: str, amounts: "np.ndarray | None", weight: FloatArray, dilation: int, scope: str) -> Padding:
    reach = [dilation * (size // 2) for size in weight.shape[2:]]
    if padding_name == "SAME" and amounts is None:
        return "same"
    if padding_name == "VALID" and amounts is None and reach == [0, 0]:
        return "symmetric"
    around = [[0, 0], [reach[0]] * 2, [reach[1]] * 2, [0, 0]]
    if padding_name == "VALID" and amounts is not None and amounts.tolist() == around:
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


# The names that TensorFlow's DeepLab zoo gives to convolutions, beside ours: Xception, MobileNetV2, ASPP and decoder.


Names = Sequence[tuple[str, str, str]]
"""(its scope, our convolution, our norm) in the order in which they run; an empty norm: it has a bias."""

LOGITS = "logits/semantic"
_XCEPTIONS = ("xception_41", "xception_65", "xception_71")
_UNSUPPORTED = {
    "MobilenetV3": "MobileNetV3's head is LR-ASPP-like (squeeze and excitation, no projection, output stride 32)",
    "MobilenetEdgeTPU": "timm has no encoder with the fused blocks of MobileNet EdgeTPU",
    "resnet_v1": "graphs on its ResNets were never published, so their layout is not known",
}
_MAX_UNITS = 32


def detect_encoder(graph: GraphDef) -> str:
    """Return `MobilenetV2` or the scope of an Xception; raises WeightsError with the reason for other models."""
    scopes = {name.split("/")[0] for name in graph.nodes if name.endswith(("/weights", "/depthwise_weights"))}
    for scope, reason in _UNSUPPORTED.items():
        if any(one.startswith(scope) for one in scopes):
            raise WeightsError(f"This graph of TensorFlow's DeepLab zoo is on {scope}, which is not read: {reason}.")
    found = [one for one in ("MobilenetV2", *_XCEPTIONS) if one in scopes]
    if len(found) != 1 or not has_convolution(graph, LOGITS):
        raise WeightsError(
            "This TensorFlow graph is no segmentation model of its DeepLab zoo: expected weights 'logits/semantic' on "
            "MobilenetV2 or xception_65."
        )
    lacking = [one for one in ("aspp0", "image_pooling", "concat_projection") if not has_convolution(graph, one)]
    if lacking:
        raise WeightsError(
            f"The head of this TensorFlow graph has no '{lacking[0]}': it is no ASPP (a dense prediction cell, or a head "
            "without image pooling), and none of ours fits."
        )
    return found[0]


def xception_units(graph: GraphDef, scope: str) -> list[str]:
    """Return the scopes of an Xception's modules in the order in which they run."""
    units = []
    for flow in ("entry_flow", "middle_flow", "exit_flow"):
        for block in range(1, _MAX_UNITS):
            for unit in range(1, _MAX_UNITS):
                module = f"{scope}/{flow}/block{block}/unit_{unit}/xception_module"
                if has_convolution(graph, f"{module}/separable_conv1_depthwise"):
                    units.append(module)
    return units


def xception_names(graph: GraphDef, scope: str) -> Names:
    """Return the convolutions of an Xception, the shortcut of a module after its three separable ones."""
    names = [
        (f"{scope}/entry_flow/conv1_{index + 1}", f"encoder.stem_{index}.conv", f"encoder.stem_{index}.bn") for index in (0, 1)
    ]
    for index, unit in enumerate(xception_units(graph, scope)):
        ours = f"encoder.blocks_{index}"
        for number in (1, 2, 3):
            for half, short in (("depthwise", "dw"), ("pointwise", "pw")):
                place = f"{ours}.stack.conv{number}"
                names.append((f"{unit}/separable_conv{number}_{half}", f"{place}.conv_{short}", f"{place}.bn_{short}"))
        if has_convolution(graph, f"{unit}/shortcut"):
            names.append((f"{unit}/shortcut", f"{ours}.shortcut.conv", f"{ours}.shortcut.bn"))
    return names


def mobilenetv2_scopes(graph: GraphDef) -> list[str]:
    """Return the scopes of MobileNetV2's convolutions up to its last block, in the order in which they run."""
    scopes = ["MobilenetV2/Conv"]
    blocks = ["MobilenetV2/expanded_conv", *(f"MobilenetV2/expanded_conv_{index}" for index in range(1, _MAX_UNITS))]
    for block in blocks:
        parts = [f"{block}/{part}" for part in ("expand", "depthwise", "project")]
        scopes += [part for part in parts if has_convolution(graph, part)]
    return scopes


def aspp_names(graph: GraphDef) -> Names:
    """Return the convolutions of ASPP, the atrous ones separable or plain."""
    names = [(theirs, f"head.{ours}.conv", f"head.{ours}.norm") for theirs, ours in _DENSE_LAYERS]
    for index in range(1, _MAX_UNITS):
        names += _conv3x3(graph, f"aspp{index}", f"aspp{index}", f"head.aspp.branches.{index}")
    return names


def decoder_names(graph: GraphDef) -> Names:
    """Return the convolutions of the decoder; empty for a model without one."""
    if not has_convolution(graph, "decoder/feature_projection0"):
        return ()
    if has_convolution(graph, "decoder/feature_projection1"):
        raise WeightsError("The decoder of this TensorFlow graph has more than one step; ours has one, at stride 4.")
    names = [("decoder/feature_projection0", "head.low_level.conv", "head.low_level.norm")]
    for index in range(_MAX_UNITS):
        repeated = f"decoder/decoder_conv0/decoder_conv0_{index + 1}"
        names += _conv3x3(graph, f"decoder/decoder_conv{index}", repeated, f"head.decoder.{index}")
    return names


_DENSE_LAYERS = (("aspp0", "aspp.branches.0"), ("image_pooling", "aspp.pool"), ("concat_projection", "aspp.project"))


def _conv3x3(graph: GraphDef, separable: str, plain: str, ours: str) -> list[tuple[str, str, str]]:
    if has_convolution(graph, f"{separable}_depthwise"):
        halves = ("depthwise", "pointwise")
        return [(f"{separable}_{half}", f"{ours}.{half}.conv", f"{ours}.{half}.norm") for half in halves]
    return [(plain, f"{ours}.conv", f"{ours}.norm")] if has_convolution(graph, plain) else []
