"""TensorFlow's own DeepLab zoo: frozen graphs, as `.pb` or in the `.tar.gz` archives that they are published in.

Names tell which convolution is which; strides, rates, padding, epsilons, statistics, the order of branches, the decoder's
low-level map, how maps are upsampled and how the input is scaled are read off the graph. Every convolution's stride and rate is
then compared with the model that was understood, so that a graph that is another model is refused.

MobileNetV2 at half width rounds its channels to 1 there and to 8 in timm: what is missing is filled with zero channels, which
stay zero through ReLU6 and residuals. ADE20K's graphs have an output for "no class", which was never trained and is left out.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from deeplabzoo.checkpoints.converters.key_mapping import assume_classes
from deeplabzoo.checkpoints.converters.tensorflow.frozen_graph_layers import (
    LOGITS,
    Convolution,
    Names,
    Padding,
    aspp_names,
    decoder_names,
    detect_encoder,
    mobilenetv2_scopes,
    read_convolution,
    source_convolution,
    xception_names,
)
from deeplabzoo.checkpoints.converters.tensorflow.graphdef import GraphDef, Node, is_archive, is_graph, read_graph
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import encoder_info, list_encoders
from deeplabzoo.models.layers import aspp_rates

# What stands around the model in a frozen graph of TensorFlow's zoo: its input's scale and size, pooling, upsampling.


_HALF = (0.5, 0.5, 0.5)
_CROP = (513, 513)
"""Input of the zoo's VOC models."""
_MAX_SIDE = 1 << 14
_MAX_HOPS = 64

Size = tuple[int, int]


def pooling(graph: GraphDef, pool: Convolution, output_stride: int) -> tuple[Size | None, Size, tuple[str, ...]]:
    """Return the pooling window in pixels (None for the whole map), the input's size, and what had to be assumed.

    The window is as large as the map of the size that the graph was exported for, unless the map that it is upsampled to is
    larger.
    """
    source = pool.source
    if source.op == "Mean":
        return None, _CROP, (f"the graph pools over any size: {_CROP[0]} x {_CROP[1]} assumed as the input's",)
    ksize = source.integers("ksize")
    if source.op != "AvgPool" or len(ksize) != 4 or not all(1 <= side <= _MAX_SIDE // output_stride for side in ksize[1:3]):
        raise WeightsError(f"The image pooling of the graph reads a {source.op}; expected an average over a window of the map.")
    window = (ksize[1], ksize[2])
    cells = window
    resize = next((one for one in _downstream_ops(graph, pool.end) if one.op == "ResizeBilinear"), None)
    if resize is not None and graph.input_of(resize, 1).op == "Const":
        target = [int(side) for side in graph.values(graph.input_of(resize, 1)).reshape(-1)]
        if len(target) == 2 and all(1 <= side <= _MAX_SIDE // output_stride for side in target):
            cells = (target[0], target[1])
    size = ((cells[0] - 1) * output_stride + 1, (cells[1] - 1) * output_stride + 1)
    if cells == window:
        return None, size, ()
    return (window[0] * output_stride, window[1] * output_stride), size, ()


def read_align_corners(graph: GraphDef, classifier: Convolution) -> tuple[bool, tuple[str, ...]]:
    """Return how logits are upsampled, and what had to be assumed about it."""
    modes = {
        (one.flag("align_corners"), one.flag("half_pixel_centers"))
        for one in _downstream_ops(graph, classifier.end)
        if one.op == "ResizeBilinear"
    }
    if not modes:
        return True, ("the graph's logits are not upsampled: aligned corners assumed, as TensorFlow's DeepLab does",)
    if len(modes) > 1 or modes == {(False, False)}:
        raise WeightsError("The graph upsamples its logits from pixel corners, or in two ways, which no model here does.")
    return modes.pop()[0], ()


def preprocessing(graph: GraphDef, stem: Convolution, size: Size) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return how images are fed, and what had to be assumed: pixels times a factor minus an offset, if the graph says so."""
    fitted = Preprocessing(size=size, resize="longest", only_shrink=True, pad=True, mean=_HALF, std=_HALF)
    shift = stem.source
    if shift.op == "Sub":
        scale = graph.input_of(shift, 0)
        offset = _scalar(graph, graph.input_of(shift, 1))
        factors = [_scalar(graph, graph.input_of(scale, index)) for index in (0, 1)] if scale.op == "Mul" else []
        factor = next((value for value in factors if value is not None), None)
        if offset is not None and factor is not None and 1e-6 < factor < 1e3 and abs(offset) < 1e6:
            # a pixel p becomes factor * p - offset; ours becomes (p / 255 - mean) / std
            mean, std = round(offset / (factor * 255), 6), round(1 / (factor * 255), 6)
            return Preprocessing(size=size, resize="longest", only_shrink=True, pad=True, mean=(mean,) * 3, std=(std,) * 3), ()
    return fitted, ("the graph does not say how pixels are scaled: -1 to 1 assumed, as in TensorFlow's zoo",)


def _scalar(graph: GraphDef, node: Node) -> float | None:
    if node.op != "Const":
        return None
    values = graph.values(node)
    return float(values.reshape(-1)[0]) if values.size == 1 and np.isfinite(values.astype(np.float64)).all() else None


def _downstream_ops(graph: GraphDef, node: Node) -> list[Node]:
    """Return nodes that a node's value goes on to, through activations and other upsampling, up to the next convolution."""
    found: list[Node] = []
    seen = {node.name}
    waiting = [node]
    while waiting and len(found) < _MAX_HOPS:
        for reader in graph.consumers_of(waiting.pop()):
            if reader.name not in seen:
                seen.add(reader.name)
                found.append(reader)
                if reader.op in ("Relu", "AddN", "ResizeBilinear"):
                    waiting.append(reader)
    return found


# In which order a frozen graph's head joins its maps, and which map of the encoder its decoder reads.


Layers = dict[str, tuple[Convolution, str]]
"""Our name of a convolution -> the graph's, and our name of its norm (empty: it has a bias)."""
_MOBILE_TAP = "MobilenetV2/expanded_conv_2/depthwise"
_XCEPTION_TAP = "/entry_flow/block2/unit_1/xception_module/separable_conv2_pointwise"


def _concat_inputs(graph: GraphDef, layer: Convolution) -> list[str]:
    """Return the scopes of the convolutions whose maps a convolution reads joined, in their order."""
    if layer.source.op != "ConcatV2" or not 2 < len(layer.source.inputs) <= 16:
        raise WeightsError(f"Convolution '{layer.scope}' reads a {layer.source.op}; expected joined maps.")
    return [
        source_convolution(graph, graph.input_of(layer.source, index)).scope for index in range(len(layer.source.inputs) - 1)
    ]


def pooling_first(graph: GraphDef, head: Layers) -> bool:
    """Return whether the pooled branch is joined before the others; raises WeightsError for another order of those."""
    inputs = _concat_inputs(graph, head["head.aspp.project.conv"][0])
    own = [layer.scope for ours, (layer, _) in head.items() if ours.startswith("head.aspp.branches.")]
    branches = [scope for scope in own if not scope.endswith("_depthwise")]
    if inputs not in (["image_pooling", *branches], [*branches, "image_pooling"]):
        raise WeightsError(
            f"The branches of ASPP are joined as {', '.join(inputs)}; the pooled one first or last was expected."
        )
    return inputs[0] == "image_pooling"


def low_level_first(graph: GraphDef, head: Layers) -> bool:
    """Return whether the decoder joins the low-level map before ASPP's; raises WeightsError where it joins others."""
    first = next((layer for ours, (layer, _) in head.items() if ours.startswith("head.decoder.0.")), None)
    projections = ["concat_projection", "decoder/feature_projection0"]
    inputs = [] if first is None else _concat_inputs(graph, first)
    if inputs not in (projections, projections[::-1]):
        raise WeightsError(f"The decoder joins {', '.join(inputs) or 'nothing'}; expected {' and '.join(projections)}.")
    return inputs != projections


def low_level_map(graph: GraphDef, projection: Convolution) -> str:
    """Return which stride-4 map the decoder reads: `linear` or `activated` of Xception, `expanded` of MobileNetV2."""
    source = source_convolution(graph, projection.source)
    if source.scope == _MOBILE_TAP and projection.source.op == "Relu6":
        return "expanded"
    if source.scope.endswith(_XCEPTION_TAP):
        return "activated" if projection.source.op == "Relu" else "linear"
    raise WeightsError(f"The decoder reads what '{source.scope}' makes; expected the stride-4 map of the zoo's models.")


FORMAT_NAME = "tf_zoo"
_XCEPTION_MODULES = {13: "xception41", 21: "xception65"}
"""By the number of modules (1802.02611, figure 4)."""
_ADE20K_OUTPUTS = 151


def can_convert(path: Path) -> bool:
    """Whether a file is a GraphDef or a gzipped archive; False for files that cannot be read."""
    return is_graph(path) or is_archive(path)


def convert(path: Path) -> Checkpoint:
    """Return the model under our names; raises WeightsError in one sentence for other graphs, and why, and damaged ones."""
    graph = GraphDef(read_graph(path))
    kind = detect_encoder(graph)
    head = [*aspp_names(graph), *decoder_names(graph)]
    layers = _read(graph, [*head, (LOGITS, "head.classifier", "")])
    try:
        if kind == "MobilenetV2":
            config, net, encoder = _on_mobilenetv2(graph, layers)
        else:
            encoder = _read(graph, xception_names(graph, kind))
            config = _config(graph, layers, encoder, _xception(encoder, path))
            net = _build_on_meta_device(config)
        _check_same_strides(net, {**encoder, **layers})
        state = _to_state_dict(net, {**encoder, **layers})
    except UsageError as error:
        raise WeightsError(f"The model in '{path}' cannot be built here: {error}") from error
    stem = next(iter(encoder.values()))[0]
    _, size, pooling_notes = pooling(graph, layers["head.aspp.pool.conv"][0], config.output_stride)
    prepared, notes = preprocessing(graph, stem, size)
    _, corner_notes = read_align_corners(graph, layers["head.classifier"][0])
    classes, palette, class_notes = assume_classes(config.num_classes, ("voc", "cityscapes", "ade20k"))
    drops_void_output = layers["head.classifier"][0].output > config.num_classes
    return Checkpoint(
        format_name=FORMAT_NAME,
        config=config,
        encoder=config.encoder,
        state_dict=state,
        classes=classes,
        palette=palette,
        preprocessing=prepared,
        dropped=("the output for unlabelled pixels, which training ignored,",) if drops_void_output else (),
        notes=(*pooling_notes, *notes, *corner_notes, *class_notes),
    )


def _read(graph: GraphDef, names: Names) -> Layers:
    found: Layers = {}
    for scope, ours, norm in names:
        layer = read_convolution(graph, scope)
        if (layer.norm is None) != (norm == ""):
            raise WeightsError(f"Convolution '{scope}' has a bias where a batch norm was expected, or the other way round.")
        found[ours] = (layer, norm)
    return found


def _xception(encoder: Layers, path: Path) -> str:
    modules = sum(name.endswith("stack.conv1.conv_dw") for name in encoder)
    if modules not in _XCEPTION_MODULES:
        raise WeightsError(f"'{path}' is on an Xception of {modules} modules; those with 13 (41) and 21 (65) can be read.")
    return _XCEPTION_MODULES[modules]


def _on_mobilenetv2(graph: GraphDef, head: Layers) -> tuple[DeepLabConfig, DeepLab, Layers]:
    """Return configuration, model and layers for timm's smallest MobileNetV2 that holds the graph's channels."""
    convolutions = [read_convolution(graph, scope) for scope in mobilenetv2_scopes(graph)]
    for name in sorted(list_encoders("mobilenetv2_*"), key=lambda name: encoder_info(name).params):
        if encoder_info(name).channels[-1] < convolutions[-1].output:
            continue
        unnamed = {str(index): (layer, "") for index, layer in enumerate(convolutions)}
        config = _config(graph, head, unnamed, name)
        net = _build_on_meta_device(config)
        modules = [(f"encoder.{name}", one) for name, one in net.encoder.named_modules() if isinstance(one, nn.Conv2d)]
        batchnorms = [f"encoder.{name}" for name, one in net.encoder.named_modules() if isinstance(one, nn.BatchNorm2d)]
        if len(modules) != len(convolutions):
            continue
        if all(_fits_in(module.weight, layer) for (_, module), layer in zip(modules, convolutions, strict=True)):
            triples = zip(modules, convolutions, batchnorms, strict=True)
            return config, net, {name: (layer, norm) for (name, _), layer, norm in triples}
    widths = ", ".join(str(layer.output) for layer in convolutions[:4])
    raise WeightsError(f"timm has no MobileNetV2 whose convolutions have {widths}, ... channels, or more.")


def _fits_in(weight: torch.Tensor, layer: Convolution) -> bool:
    same_kernel = tuple(weight.shape[2:]) == layer.weight.shape[2:]
    return same_kernel and all(own <= other for own, other in zip(layer.weight.shape, weight.shape, strict=True))


def _build_on_meta_device(config: DeepLabConfig) -> DeepLab:
    with torch.device("meta"):
        return DeepLab(config)


def _config(graph: GraphDef, head: Layers, encoder: Layers, name: str) -> DeepLabConfig:
    """Return what the graph says about a model on the encoder `name`."""
    stride = 1
    for ours, (layer, _) in encoder.items():
        stride *= 1 if "shortcut" in ours else layer.stride
    if stride not in (8, 16, 32):
        raise WeightsError(f"The strides of the graph's encoder multiply to {stride}; expected 8, 16 or 32.")
    atrous = [head[ours][0] for ours in head if ours.startswith("head.aspp.branches.") and head[ours][0].weight.shape[2] > 1]
    rates = tuple(layer.dilation for layer in atrous)
    has_decoder = "head.low_level.conv" in head
    outputs = head["head.classifier"][0].output
    window, _, _ = pooling(graph, head["head.aspp.pool.conv"][0], stride)
    tap = low_level_map(graph, head["head.low_level.conv"][0]) if has_decoder else ""
    return DeepLabConfig(
        architecture="deeplabv3plus" if has_decoder else "deeplabv3",
        encoder=name,
        num_classes=outputs - 1 if outputs == _ADE20K_OUTPUTS else outputs,
        in_chans=next(iter(encoder.values()))[0].weight.shape[1],
        output_stride=stride,
        atrous_rates=None if rates == aspp_rates(stride) else rates,
        norm_eps=_eps(head),
        head_channels=head["head.aspp.project.conv"][0].output,
        aspp_separable=None if not atrous or has_decoder == (atrous[0].weight.shape[1] == 1) else not has_decoder,
        pooling_first=pooling_first(graph, head),
        pooling_window=window,
        refine_conv=has_decoder,
        decoder_low_level_channels=head["head.low_level.conv"][0].output if has_decoder else 48,
        decoder_convs=sum(ours.startswith("head.decoder.") and layer.weight.shape[2] > 1 for ours, (layer, _) in head.items())
        if has_decoder
        else 2,
        decoder_separable="head.decoder.0.conv" not in head,
        decoder_low_level_first=has_decoder and low_level_first(graph, head),
        decoder_low_level_activated=tap != "linear",
        decoder_low_level_expanded=tap == "expanded",
        align_corners=read_align_corners(graph, head["head.classifier"][0])[0],
        encoder_padding=_encoder_padding(encoder),
        encoder_norm_eps=_eps(encoder),
    )


def _eps(layers: Layers) -> float:
    found = {layer.norm.eps for layer, _ in layers.values() if layer.norm is not None}
    if len(found) != 1:
        raise WeightsError(
            f"The batch norms of the graph have epsilons {sorted(found)}; one for the encoder, one for the head."
        )
    return found.pop()


def _encoder_padding(encoder: Layers) -> Padding:
    found = {layer.padding for layer, _ in encoder.values() if layer.stride > 1 and layer.weight.shape[2] > 1}
    if len(found) > 1:
        raise WeightsError("Some strided convolutions of the graph pad as TensorFlow's 'SAME', others symmetrically.")
    return found.pop() if found else "symmetric"


def _check_same_strides(net: DeepLab, layers: Layers) -> None:
    """Raise WeightsError for a convolution that runs with another stride, rate or activation here than in the graph."""
    for name, (layer, _) in layers.items():
        ours = net.get_submodule(name)
        if not isinstance(ours, nn.Conv2d):
            raise WeightsError(f"The graph has a convolution '{layer.scope}' that {net.config.encoder} has not.")
        dilation = layer.dilation if ours.kernel_size[0] > 1 else 1
        if (ours.stride, ours.dilation) != ((layer.stride,) * 2, (dilation,) * 2):
            raise WeightsError(
                f"Convolution '{layer.scope}' runs at stride {layer.stride}, dilation {layer.dilation} in the graph, and at "
                f"{ours.stride[0]}, {ours.dilation[0]} here; the graph is not the model that its names suggest."
            )


def _to_state_dict(net: DeepLab, layers: Layers) -> dict[str, torch.Tensor]:
    """Return the weights under our names, filled with zero channels up to the model's shapes."""
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    state = {name: torch.tensor(0) for name in shapes if name.endswith("num_batches_tracked")}

    def put(name: str, values: object, fill: float = 0.0) -> None:
        own = torch.as_tensor(values).clone()
        if own.ndim != len(shapes[name]) or any(a > b for a, b in zip(own.shape, shapes[name], strict=True)):
            raise WeightsError(f"'{name}' has shape {tuple(own.shape)} in the graph; the model has {tuple(shapes[name])}.")
        whole = torch.full(shapes[name], fill)
        whole[tuple(slice(size) for size in own.shape)] = own
        state[name] = whole

    for name, (layer, norm) in layers.items():
        is_logits = layer.bias is not None
        skipped = int(is_logits and layer.output > net.config.num_classes)
        put(f"{name}.weight", layer.weight[skipped:])
        if layer.bias is not None:
            put(f"{name}.bias", layer.bias[skipped:])
        if layer.norm is not None:
            put(f"{norm}.weight", layer.norm.gamma, 1.0)
            put(f"{norm}.bias", layer.norm.beta)
            put(f"{norm}.running_mean", layer.norm.mean)
            put(f"{norm}.running_var", layer.norm.variance, 1.0)
    return state
