"""A model built from a checkpoint, with the changes that a caller asked for.

Each change is a phrase for the log line. What cannot be changed without making the weights useless (another architecture,
encoder, norm or set of atrous rates) is refused.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from deeplabzoo.checkpoints.state_dict import find_encoder
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.data.classes import CLASS_LISTS, class_list
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab, config_at_stride
from deeplabzoo.models.encoder_table import encoder_info, short_name
from deeplabzoo.models.encoders import SkipInit
from deeplabzoo.models.heads import AuxiliaryHead, resolve_atrous_rates
from deeplabzoo.models.names import ModelName

StateDict = dict[str, torch.Tensor]
_TF_PREFIX, _TF_EPSILON = "tf_", 1e-3
"""timm's prefix for encoders that pad as TensorFlow does, and the epsilon of their batch norms."""
_DISPLAY_NAMES = {"deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3+"}


@dataclass(frozen=True, kw_only=True)
class ModelOverrides:
    """What a caller of `create` asks for; None leaves a value to the weights, or to the papers where there are none."""

    num_classes: int | None = None
    in_chans: int | None = None
    output_stride: int | None = None
    atrous_rates: Sequence[int] | None = None
    multi_grid: Sequence[int] | None = None
    norm: Literal["batch", "group"] | None = None
    dropout: float | None = None
    aux_head: bool | None = None

    def new_model_config(self, name: ModelName) -> DeepLabConfig:
        """Return the configuration of a model without weights: the papers', the classes of its dataset, and these overrides.

        The output stride is 16 by default, as in most tables of the papers, or the nearest one that the encoder has.
        """
        strides = encoder_info(name.encoder).strides
        default = 16 if 16 in strides or not strides else min(strides, key=lambda stride: abs(stride - 16))
        config = DeepLabConfig(
            architecture=name.architecture,
            encoder=name.encoder,
            num_classes=class_list(name.data).num_classes if name.data else 21,
            output_stride=default,
        )
        return self.apply(config)

    def apply(self, config: DeepLabConfig) -> DeepLabConfig:
        """Return `config` with the overrides in place."""
        requested = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changes = {name: value for name, value in requested.items() if value is not None}
        return DeepLabConfig.from_dict({**config.to_dict(), **changes})

    def check_compatible(self, config: DeepLabConfig) -> None:
        """Raise UsageError if the overrides change the arithmetic that these weights were trained with."""
        for name in ("atrous_rates", "multi_grid", "norm"):
            requested, own = getattr(self, name), getattr(config, name)
            if requested is not None and (requested if name == "norm" else tuple(requested)) != own:
                raise UsageError(
                    f"These weights were trained with {name}={own!r} and are useless with {requested!r}; leave {name} out "
                    "(output_stride scales the rates), or create the model without weights."
                )


def build_from_checkpoint(
    checkpoint: Checkpoint, name: ModelName | None, overrides: ModelOverrides
) -> tuple[DeepLab, tuple[str, ...]]:
    """Build the model of a checkpoint with the changes that were asked for.

    Args:
        checkpoint: What `read_weights` returned.
        name: The model that the checkpoint has to be of; None takes any.
        overrides: Changes to what the checkpoint holds.

    Returns:
        The model in eval mode, and what was changed or assumed, as phrases for the log line.

    Raises:
        WeightsError: The checkpoint is of another model than `name`, or a tensor is missing or left over.
        UsageError: Overrides that these weights cannot be used with.
    """
    state = dict(checkpoint.state_dict)
    changes: list[str] = []
    config = checkpoint.config
    if config is None:
        config, assumed = _infer_config(checkpoint, state, name, overrides)
        changes.append(f"assumed, as the file does not state it: {', '.join(assumed)}")
    elif name is not None:
        _check_same_model(checkpoint, config, name, overrides)
    overrides.check_compatible(config)
    config, state = _set_auxiliary_head(config, state, overrides.aux_head, changes)
    if overrides.dropout is not None:
        config = replace(config, dropout=overrides.dropout)
    if overrides.in_chans is not None and overrides.in_chans != config.in_chans:
        changes.append(
            f"stem adapted from {config.in_chans} to {overrides.in_chans} channels, so published metrics do not apply"
        )
        config, state = _set_input_channels(config, state, overrides.in_chans)
    if overrides.output_stride is not None and overrides.output_stride != config.output_stride:
        changes.append(f"output stride {config.output_stride} -> {overrides.output_stride}")
        config = config_at_stride(config, overrides.output_stride)
    known = CLASS_LISTS.get(name.data) if name and name.data else None
    named = known if known is not None and checkpoint.classes is None and len(known.classes) == config.num_classes else None
    try:
        net = DeepLab.from_weights(
            config,
            state,
            classes=named.classes if named else checkpoint.classes,
            palette=named.palette if named else checkpoint.palette,
            preprocessing=checkpoint.preprocessing,
        )
    except WeightsError as error:
        raise WeightsError(f"'{checkpoint.label}': {error}") from None
    if overrides.num_classes is not None and overrides.num_classes != config.num_classes:
        same = known if known is not None and len(known.classes) == overrides.num_classes else None
        net.reset_classifier(overrides.num_classes, same.classes if same else None, same.palette if same else None)
        changes.append(f"classifier re-initialized: {config.num_classes} -> {net.num_classes} classes")
    return net, tuple(changes)


def adapt_stem(weight: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Return a first convolution's weight, out x in x h x w, for another number of input channels.

    One channel: the sum over the old channels, so that a grey image gives what its RGB copy gave. More: the old channels
    repeated in order, scaled by old / new, so that the response to an image of equal channels keeps its size.
    """
    old = weight.shape[1]
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [channel % old for channel in range(in_chans)]] * (old / in_chans)


def adapt_tensors(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> StateDict:
    """Return the state dict with every convolution adapted that differs from the expected one in input channels alone."""
    return {
        name: adapt_stem(tensor, expected[name].shape[1]) if _differs_in_channels(tensor, expected.get(name)) else tensor
        for name, tensor in state.items()
    }


def _differs_in_channels(tensor: torch.Tensor, expected: torch.Tensor | None) -> bool:
    if expected is None or tensor.ndim != 4 or expected.ndim != 4 or tensor.shape == expected.shape:
        return False
    return tensor.shape[:1] + tensor.shape[2:] == expected.shape[:1] + expected.shape[2:]


def _infer_config(
    checkpoint: Checkpoint, state: StateDict, name: ModelName | None, overrides: ModelOverrides
) -> tuple[DeepLabConfig, list[str]]:
    """Return the configuration of a bare state dict, of names and shapes, and what they do not show and was assumed."""
    if checkpoint.encoder is not None:
        raise WeightsError(
            f"'{checkpoint.label}' holds an encoder ({short_name(checkpoint.encoder)}) without a DeepLab head; "
            f"use create('deeplabv3_{short_name(checkpoint.encoder)}', encoder_pretrained=…)."
        )
    if "head.classifier.weight" not in state:
        examples = ", ".join(list(state)[:3])
        raise WeightsError(
            f"'{checkpoint.label}' has tensors of an unknown layout ({examples} …); expected deeplabzoo's own names."
        )
    if name is None:
        raise WeightsError(
            f"'{checkpoint.label}' holds tensors but not which model they are of; name it with "
            "create('architecture_encoder', pretrained=…)."
        )
    config = replace(overrides.new_model_config(name), **fields_of_shapes(state, name.encoder))
    _check_same_model(checkpoint, config, name, overrides)
    rates = resolve_atrous_rates(config)
    assumed = [
        f"output stride {config.output_stride}" if overrides.output_stride is None else "",
        f"atrous rates {', '.join(map(str, rates))}" if rates and overrides.atrous_rates is None else "",
        f"align_corners {config.align_corners}",
        f"{config.encoder_padding} padding",
        f"epsilon {config.norm_eps:g}",
        "the encoder's ImageNet mean and std" if checkpoint.preprocessing is None else "",
        f"class names {'of ' + name.data if name.data else 'class_0, class_1, …'}" if checkpoint.classes is None else "",
    ]
    return config, [one for one in assumed if one]


def fields_of_shapes(state: Mapping[str, torch.Tensor], encoder: str) -> dict[str, Any]:
    """Return the fields of a DeepLabConfig that the tensor names and shapes of a model of ours show.

    Args:
        state: The tensors under our names; where some are missing, `DeepLab.from_weights` names them later.
        encoder: Canonical name of their encoder.
    """

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in state)

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})

    def size(name: str, axis: int) -> int | None:
        return state[name].shape[axis] if name in state and state[name].ndim == 4 else None

    info, plus = encoder_info(encoder), has("head.low_level.")
    separable = has("head.aspp.branches.1.depthwise.")
    fields: dict[str, Any] = {
        "architecture": "deeplabv3plus" if plus else "deeplabv3",
        "num_classes": size("head.classifier.weight", 0),
        "norm": "batch" if any(name.endswith("running_mean") for name in state) else "group",
        "aux_head": has("aux_head."),
        "head_channels": size("head.aspp.branches.0.conv.weight", 0),
        "aspp_project_kernel": size("head.aspp.project.conv.weight", 3),
        "pooling_norm": has("head.aspp.pool.norm."),
        "depthwise_norm": not separable or has("head.aspp.branches.1.depthwise.norm."),
    }
    if plus:
        low, plan = size("head.low_level.conv.weight", 1), info.feature_plan(info.strides[-1])
        fields |= {
            "decoder_low_level_channels": size("head.low_level.conv.weight", 0),
            "decoder_low_level_expanded": low is not None and low != plan.channels[plan.low_level],
            "decoder_convs": count("head.decoder."),
            "decoder_refine_conv": has("head.refine."),
        }
        if has("head.decoder."):
            fields |= {
                "decoder_separable": has("head.decoder.0.depthwise."),
                "decoder_kernel": size("head.decoder.0.conv.weight", 3),
                "decoder_channels": size("head.classifier.weight", 1),
            }
    else:
        fields["refine_conv"] = has("head.refine.")
    # the names of stem and final convolution depend on the encoder, so a model without memory is built
    plain = DeepLabConfig(architecture="deeplabv3", encoder=encoder, output_stride=info.strides[0])
    expected = _meta_model(plain).encoder.state_dict()
    if has("encoder.conv_head."):
        fields["encoder_final_conv"] = True
    elif any(name.startswith("final_conv.") for name in expected) and not has("encoder.final_conv."):
        fields["encoder_final_conv"] = False
    stems = {
        state[f"encoder.{name}"].shape[1]
        for name, tensor in expected.items()
        if _differs_in_channels(state.get(f"encoder.{name}", tensor), tensor)
    }
    fields = {key: value for key, value in fields.items() if value is not None}
    if count("head.aspp.branches.") == 1:
        fields["atrous_rates"] = ()
    else:
        fields["aspp_separable"] = None if separable == plus else separable
    return {**fields, "in_chans": stems.pop() if len(stems) == 1 else 3}


def _check_same_model(checkpoint: Checkpoint, config: DeepLabConfig, name: ModelName, overrides: ModelOverrides) -> None:
    if config.architecture != name.architecture:
        own = ModelName(config.architecture, config.encoder)
        raise WeightsError(
            f"'{checkpoint.label}' holds a {_DISPLAY_NAMES[config.architecture]} model, {name} was asked for; "
            f"use create('{own}', pretrained=…)."
        )
    if config.encoder != name.encoder:
        raise WeightsError(f"'{checkpoint.label}' has the encoder {short_name(config.encoder)}, {name} was asked for.")
    classes = len(CLASS_LISTS[name.data].classes) if name.data else config.num_classes
    if classes != config.num_classes and overrides.num_classes is None:
        raise UsageError(
            f"'{checkpoint.label}' has {config.num_classes} classes and {name} has {classes}; pass num_classes={classes} for "
            "a new classifier, or leave the dataset out of the name."
        )


def _set_auxiliary_head(
    config: DeepLabConfig, state: StateDict, aux_head: bool | None, changes: list[str]
) -> tuple[DeepLabConfig, StateDict]:
    if aux_head in (None, config.aux_head):
        return config, state
    config = replace(config, aux_head=bool(aux_head))
    if not aux_head:
        changes.append("auxiliary head dropped")
        return config, {name: tensor for name, tensor in state.items() if not name.startswith("aux_head.")}
    plan = _meta_model(config).feature_plan
    head = AuxiliaryHead(config, plan.channels[plan.auxiliary])
    changes.append("auxiliary head re-initialized")
    return config, state | {f"aux_head.{name}": tensor for name, tensor in head.state_dict().items()}


def _set_input_channels(config: DeepLabConfig, state: StateDict, in_chans: int) -> tuple[DeepLabConfig, StateDict]:
    config = replace(config, in_chans=in_chans)
    return config, adapt_tensors(state, _meta_model(config).state_dict())


def _meta_model(config: DeepLabConfig) -> DeepLab:
    """Return a model without memory, for its shapes."""
    with torch.device("meta"), SkipInit():
        return DeepLab(config)


def load_encoder_weights(net: DeepLab, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Put the encoder weights of a checkpoint, and mean, std and channel order of its input, into a model.

    A checkpoint of timm's `tf_` variant of the encoder loads as well. The tensors are the same; with symmetric padding they
    compute the same at sides of the form 32 n + 1, and at others sample cells that lie up to half a stride away.

    Args:
        net: The model; nothing but its encoder and preprocessing is changed.
        checkpoint: A classifier of a known format, a checkpoint of ours, or tensors with timm's names.

    Returns:
        What was left out or adapted, as phrases for the log line.

    Raises:
        WeightsError: The checkpoint is of another encoder or lacks a tensor of this one.
    """
    encoder = short_name(net.config.encoder)
    other_padding = checkpoint.encoder == f"{_TF_PREFIX}{net.config.encoder}"
    if checkpoint.encoder is not None and checkpoint.encoder != net.config.encoder and not other_padding:
        raise WeightsError(f"'{checkpoint.label}' holds the encoder {short_name(checkpoint.encoder)}, {encoder} was asked for.")
    expected = net.encoder.state_dict()
    state, unused, copies = find_encoder(checkpoint.state_dict, expected)
    if other_padding:
        own_epsilon = checkpoint.config.encoder_norm_eps if checkpoint.config else None
        state |= _variances_for_epsilon(state, net, own_epsilon or _TF_EPSILON)
    adapted = adapt_tensors(state, expected)
    missing = sorted(name for name in expected.keys() - state.keys() if not name.endswith("num_batches_tracked"))
    wrong = sorted(name for name, tensor in adapted.items() if tensor.shape != expected[name].shape)
    for names, what in ((missing, "lacks"), (wrong, "has other shapes for")):
        if names:
            raise WeightsError(
                f"'{checkpoint.label}' {what} {len(names)} of the {len(expected)} tensors of encoder {encoder} "
                f"({_some(names)})."
            )
    net.encoder.load_state_dict(adapted, strict=False)  # complete but for batch counters, which old files lack
    if (
        own := checkpoint.preprocessing
    ) is not None:  # the scale of the input belongs to the encoder's weights, its size does not
        net.preprocessing = replace(net.preprocessing, mean=own.mean, std=own.std, channel_order=own.channel_order)
    changes = [*checkpoint.remarks, *copies]
    if any(adapted[name] is not state[name] for name in state):
        changes.append(f"stem adapted to {net.config.in_chans} channels")
    if other_padding:
        theirs = short_name(f"{_TF_PREFIX}{net.config.encoder}")
        changes.append(f"TensorFlow's padding of {theirs} replaced by symmetric padding, equal at sides of 32 n + 1")
    if unused:
        changes.append(f"{len(unused)} tensors unused ({_some(unused)})")
    return tuple(changes)


def _variances_for_epsilon(state: Mapping[str, torch.Tensor], net: DeepLab, epsilon: float) -> StateDict:
    """Return running variances with which the model's epsilons give in eval mode what `epsilon` gave in the file's model."""
    epsilons = {name: norm.eps for name, norm in net.encoder.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    return {
        f"{name}.running_var": state[f"{name}.running_var"] + (epsilon - eps)
        for name, eps in epsilons.items()
        if f"{name}.running_var" in state
    }


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
