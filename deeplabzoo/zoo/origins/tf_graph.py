"""TensorFlow's own DeepLab zoo: frozen graphs, as `.pb` or in the `.tar.gz` archives that they are published in.

Names tell which convolution is which; strides, rates, padding, epsilons, statistics, the order of branches, the decoder's
low-level map, how maps are enlarged and how the input is scaled are read off the graph. Every convolution's stride and rate is
then compared with the network that was understood, so that a graph that is another network is refused.

MobileNetV2 at half width rounds its channels to 1 there and to 8 in timm: what is missing is filled with zero channels, which
stay zero through ReLU6 and residuals. ADE20K's graphs have an output for "no class", which was never trained and is left out.
"""

from pathlib import Path

import torch
from torch import nn

from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.atrous import aspp_rates
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import encoder_facts, list_encoders
from deeplabzoo.zoo.origins.class_names import inferred_classes
from deeplabzoo.zoo.origins.converted import Converted
from deeplabzoo.zoo.origins.graphdef import GraphDef
from deeplabzoo.zoo.origins.tf_archive import is_archive, is_graph, read_graph
from deeplabzoo.zoo.origins.tf_convolutions import Convolution, Padding, read_convolution
from deeplabzoo.zoo.origins.tf_joints import Layers, low_level_first, low_level_map, pooling_first
from deeplabzoo.zoo.origins.tf_networks import (
    LOGITS,
    Names,
    aspp_names,
    decoder_names,
    encoder_kind,
    mobilenetv2_scopes,
    xception_names,
)
from deeplabzoo.zoo.origins.tf_surroundings import aligned_corners, pooling, preprocessing

ORIGIN = "tf_zoo"
_XCEPTION_MODULES = {13: "xception41", 21: "xception65"}
"""By the number of modules (1802.02611, figure 4)."""
_ADE20K_OUTPUTS = 151


def recognise(path: Path) -> bool:
    """Whether a file is a GraphDef or a gzipped archive; False for files that cannot be read."""
    return is_graph(path) or is_archive(path)


def convert(path: Path) -> Converted:
    """Return the network under our names; raises WeightsError in one sentence for other graphs, and why, and damaged ones."""
    graph = GraphDef(read_graph(path))
    kind = encoder_kind(graph)
    head = [*aspp_names(graph), *decoder_names(graph)]
    layers = _read(graph, [*head, (LOGITS, "head.classifier", "")])
    try:
        if kind == "MobilenetV2":
            config, net, encoder = _on_mobilenetv2(graph, layers)
        else:
            encoder = _read(graph, xception_names(graph, kind))
            config = _config(graph, layers, encoder, _xception(encoder, path))
            net = _empty(config)
        _require_same_steps(net, {**encoder, **layers})
        state = _state(net, {**encoder, **layers})
    except UsageError as error:
        raise WeightsError(f"The network in '{path}' cannot be built here: {error}") from error
    stem = next(iter(encoder.values()))[0]
    _, size, pooling_notes = pooling(graph, layers["head.aspp.pool.conv"][0], config.output_stride)
    prepared, notes = preprocessing(graph, stem, size)
    _, corner_notes = aligned_corners(graph, layers["head.classifier"][0])
    classes, palette, class_notes = inferred_classes(config.num_classes, ("voc", "cityscapes", "ade20k"))
    left_out = layers["head.classifier"][0].output > config.num_classes
    return Converted(
        origin=ORIGIN,
        config=config,
        encoder=config.encoder,
        state_dict=state,
        classes=classes,
        palette=palette,
        preprocessing=prepared,
        dropped=("the output for unlabelled pixels, which training ignored,",) if left_out else (),
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
    """Return configuration, network and layers for timm's smallest MobileNetV2 that holds the graph's channels."""
    convolutions = [read_convolution(graph, scope) for scope in mobilenetv2_scopes(graph)]
    for name in sorted(list_encoders("mobilenetv2_*"), key=lambda name: encoder_facts(name).params):
        if encoder_facts(name).channels[-1] < convolutions[-1].output:
            continue
        unnamed = {str(index): (layer, "") for index, layer in enumerate(convolutions)}
        config = _config(graph, head, unnamed, name)
        net = _empty(config)
        modules = [(f"encoder.{name}", one) for name, one in net.encoder.named_modules() if isinstance(one, nn.Conv2d)]
        norms = [f"encoder.{name}" for name, one in net.encoder.named_modules() if isinstance(one, nn.BatchNorm2d)]
        if len(modules) != len(convolutions):
            continue
        if all(_holds(module.weight, layer) for (_, module), layer in zip(modules, convolutions, strict=True)):
            triples = zip(modules, convolutions, norms, strict=True)
            return config, net, {name: (layer, norm) for (name, _), layer, norm in triples}
    widths = ", ".join(str(layer.output) for layer in convolutions[:4])
    raise WeightsError(f"timm has no MobileNetV2 whose convolutions have {widths}, ... channels, or more.")


def _holds(weight: torch.Tensor, layer: Convolution) -> bool:
    same_kernel = tuple(weight.shape[2:]) == layer.weight.shape[2:]
    return same_kernel and all(own <= other for own, other in zip(layer.weight.shape, weight.shape, strict=True))


def _empty(config: DeepLabConfig) -> DeepLab:
    with torch.device("meta"):
        return DeepLab(config)


def _config(graph: GraphDef, head: Layers, encoder: Layers, name: str) -> DeepLabConfig:
    """Return what the graph says about a network on the encoder `name`."""
    stride = 1
    for ours, (layer, _) in encoder.items():
        stride *= 1 if "shortcut" in ours else layer.stride
    if stride not in (8, 16, 32):
        raise WeightsError(f"The strides of the graph's encoder multiply to {stride}; expected 8, 16 or 32.")
    atrous = [head[ours][0] for ours in head if ours.startswith("head.aspp.branches.") and head[ours][0].weight.shape[2] > 1]
    rates = tuple(layer.rate for layer in atrous)
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
        align_corners=aligned_corners(graph, head["head.classifier"][0])[0],
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


def _require_same_steps(net: DeepLab, layers: Layers) -> None:
    """Raise WeightsError for a convolution that runs with another stride, rate or activation here than in the graph."""
    for name, (layer, _) in layers.items():
        ours = net.get_submodule(name)
        if not isinstance(ours, nn.Conv2d):
            raise WeightsError(f"The graph has a convolution '{layer.scope}' that {net.config.encoder} has not.")
        rate = layer.rate if ours.kernel_size[0] > 1 else 1
        if (ours.stride, ours.dilation) != ((layer.stride,) * 2, (rate,) * 2):
            raise WeightsError(
                f"Convolution '{layer.scope}' runs at stride {layer.stride} and rate {layer.rate} in the graph, and at stride "
                f"{ours.stride[0]} and rate {ours.dilation[0]} here; the graph is another network than its names say."
            )


def _state(net: DeepLab, layers: Layers) -> dict[str, torch.Tensor]:
    """Return the weights under our names, filled with zero channels up to the network's shapes."""
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    state = {name: torch.tensor(0) for name in shapes if name.endswith("num_batches_tracked")}

    def put(name: str, values: object, fill: float = 0.0) -> None:
        own = torch.as_tensor(values).clone()
        if own.ndim != len(shapes[name]) or any(a > b for a, b in zip(own.shape, shapes[name], strict=True)):
            raise WeightsError(f"'{name}' has shape {tuple(own.shape)} in the graph; the network has {tuple(shapes[name])}.")
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
