"""The names that TensorFlow's DeepLab zoo gives to convolutions, beside ours: Xception, MobileNetV2, ASPP and decoder."""

from collections.abc import Sequence

from deeplabzoo.errors import WeightsError
from deeplabzoo.zoo.origins.graphdef import GraphDef
from deeplabzoo.zoo.origins.tf_convolutions import has_convolution

Names = Sequence[tuple[str, str, str]]
"""(its scope, our convolution, our norm) in the order in which they run; an empty norm: it has a bias."""

LOGITS = "logits/semantic"
_XCEPTIONS = ("xception_41", "xception_65", "xception_71")
_REFUSED = {
    "MobilenetV3": "MobileNetV3's head is LR-ASPP-like (squeeze and excitation, no projection, output stride 32)",
    "MobilenetEdgeTPU": "timm has no encoder with the fused blocks of MobileNet EdgeTPU",
    "resnet_v1": "graphs on its ResNets were never published, so their layout is not known",
}
_MAX_UNITS = 32


def encoder_kind(graph: GraphDef) -> str:
    """Return `MobilenetV2` or the scope of an Xception; raises WeightsError with the reason for other networks."""
    scopes = {name.split("/")[0] for name in graph.nodes if name.endswith(("/weights", "/depthwise_weights"))}
    for scope, reason in _REFUSED.items():
        if any(one.startswith(scope) for one in scopes):
            raise WeightsError(f"This graph of TensorFlow's DeepLab zoo is on {scope}, which is not read: {reason}.")
    found = [one for one in ("MobilenetV2", *_XCEPTIONS) if one in scopes]
    if len(found) != 1 or not has_convolution(graph, LOGITS):
        raise WeightsError(
            "This TensorFlow graph is no segmentation network of its DeepLab zoo: expected weights 'logits/semantic' on "
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
    names = [(theirs, f"head.{ours}.conv", f"head.{ours}.norm") for theirs, ours in _PLAIN]
    for index in range(1, _MAX_UNITS):
        names += _conv3x3(graph, f"aspp{index}", f"aspp{index}", f"head.aspp.branches.{index}")
    return names


def decoder_names(graph: GraphDef) -> Names:
    """Return the convolutions of the decoder; empty for a network without one."""
    if not has_convolution(graph, "decoder/feature_projection0"):
        return ()
    if has_convolution(graph, "decoder/feature_projection1"):
        raise WeightsError("The decoder of this TensorFlow graph has more than one step; ours has one, at stride 4.")
    names = [("decoder/feature_projection0", "head.low_level.conv", "head.low_level.norm")]
    for index in range(_MAX_UNITS):
        repeated = f"decoder/decoder_conv0/decoder_conv0_{index + 1}"
        names += _conv3x3(graph, f"decoder/decoder_conv{index}", repeated, f"head.decoder.{index}")
    return names


_PLAIN = (("aspp0", "aspp.branches.0"), ("image_pooling", "aspp.pool"), ("concat_projection", "aspp.project"))


def _conv3x3(graph: GraphDef, separable: str, plain: str, ours: str) -> list[tuple[str, str, str]]:
    if has_convolution(graph, f"{separable}_depthwise"):
        halves = ("depthwise", "pointwise")
        return [(f"{separable}_{half}", f"{ours}.{half}.conv", f"{ours}.{half}.norm") for half in halves]
    return [(plain, f"{ours}.conv", f"{ours}.norm")] if has_convolution(graph, plain) else []
