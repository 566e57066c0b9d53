"""In which order a frozen graph's head joins its maps, and which map of the encoder its decoder reads."""

from deeplabzoo.errors import WeightsError
from deeplabzoo.zoo.origins.graphdef import GraphDef
from deeplabzoo.zoo.origins.tf_convolutions import Convolution, origin_of

Layers = dict[str, tuple[Convolution, str]]
"""Our name of a convolution -> the graph's, and our name of its norm (empty: it has a bias)."""
_MOBILE_TAP = "MobilenetV2/expanded_conv_2/depthwise"
_XCEPTION_TAP = "/entry_flow/block2/unit_1/xception_module/separable_conv2_pointwise"


def _joined(graph: GraphDef, layer: Convolution) -> list[str]:
    """Return the scopes of the convolutions whose maps a convolution reads joined, in their order."""
    if layer.source.op != "ConcatV2" or not 2 < len(layer.source.inputs) <= 16:
        raise WeightsError(f"Convolution '{layer.scope}' reads a {layer.source.op}; expected joined maps.")
    return [origin_of(graph, graph.input_of(layer.source, index)).scope for index in range(len(layer.source.inputs) - 1)]


def pooling_first(graph: GraphDef, head: Layers) -> bool:
    """Return whether the pooled branch is joined before the others; raises WeightsError for another order of those."""
    joined = _joined(graph, head["head.aspp.project.conv"][0])
    own = [layer.scope for ours, (layer, _) in head.items() if ours.startswith("head.aspp.branches.")]
    branches = [scope for scope in own if not scope.endswith("_depthwise")]
    if joined not in (["image_pooling", *branches], [*branches, "image_pooling"]):
        raise WeightsError(
            f"The branches of ASPP are joined as {', '.join(joined)}; the pooled one first or last was expected."
        )
    return joined[0] == "image_pooling"


def low_level_first(graph: GraphDef, head: Layers) -> bool:
    """Return whether the decoder joins the low-level map before ASPP's; raises WeightsError where it joins others."""
    first = next((layer for ours, (layer, _) in head.items() if ours.startswith("head.decoder.0.")), None)
    projections = ["concat_projection", "decoder/feature_projection0"]
    joined = [] if first is None else _joined(graph, first)
    if joined not in (projections, projections[::-1]):
        raise WeightsError(f"The decoder joins {', '.join(joined) or 'nothing'}; expected {' and '.join(projections)}.")
    return joined != projections


def low_level_map(graph: GraphDef, projection: Convolution) -> str:
    """Return which stride-4 map the decoder reads: `linear` or `activated` of Xception, `expanded` of MobileNetV2."""
    made = origin_of(graph, projection.source)
    if made.scope == _MOBILE_TAP and projection.source.op == "Relu6":
        return "expanded"
    if made.scope.endswith(_XCEPTION_TAP):
        return "activated" if projection.source.op == "Relu" else "linear"
    raise WeightsError(f"The decoder reads what '{made.scope}' makes; expected the stride-4 map of the zoo's networks.")
