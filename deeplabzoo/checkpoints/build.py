"""Weights and wishes brought together: the network that a file holds, changed where something else was asked for, in words.

Nothing is changed silently: each adaptation is a phrase for the loading line. What cannot be adapted without turning the
weights into noise (another architecture, encoder, norm, set of rates) is refused.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from deeplabzoo.checkpoints.load import WeightsFile, read_weights
from deeplabzoo.data.classes import CLASS_LISTS, class_list
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import encoder_info, short_name
from deeplabzoo.models.names import ModelName

# What a caller of `create` may ask of a network, and the configuration that follows from a name and these wishes.


@dataclass(frozen=True, kw_only=True)
class ModelOverrides:
    """None leaves a value to the weights, or to the papers where there are none."""

    num_classes: int | None = None
    in_chans: int | None = None
    output_stride: int | None = None
    atrous_rates: Sequence[int] | None = None
    multi_grid: Sequence[int] | None = None
    norm: Literal["batch", "group"] | None = None
    dropout: float | None = None
    aux_head: bool | None = None

    def new_model_config(self, name: ModelName) -> DeepLabConfig:
        """Return the configuration of an untrained network: the papers' one, the classes of its data, as wished.

        Without a wish the output stride is 16, as in most of the papers' tables, or the nearest one that the encoder has.
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
        """Return `config` with every wish granted."""
        requested = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changes = {name: value for name, value in requested.items() if value is not None}
        return DeepLabConfig.from_dict({**config.to_dict(), **changes})

    def check_compatible(self, config: DeepLabConfig) -> None:
        """Raise UsageError if another arithmetic is wished than the one these weights were trained with."""
        for name in ("atrous_rates", "multi_grid", "norm"):
            requested, own = getattr(self, name), getattr(config, name)
            if requested is not None and (requested if name == "norm" else tuple(requested)) != own:
                raise UsageError(
                    f"These weights were trained with {name}={own!r} and mean nothing with {requested!r}; leave {name} out "
                    "(output_stride scales the rates by itself), or create the network without weights."
                )


StateDict = dict[str, torch.Tensor]
_DISPLAY_NAMES = {"deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3+"}


def build_from_checkpoint(
    file: WeightsFile, name: ModelName | None, overrides: ModelOverrides
) -> tuple[DeepLab, tuple[str, ...]]:
    """Return the network of a file, as wished, and what was changed for it, as phrases.

    Raises WeightsError where the file is for another network than `name`, or lacks or has left over even one tensor.
    """
    state = dict(file.state_dict)
    config = file.config or _infer_config(file, state, name, overrides)
    if name is not None:
        _check_same_model(file, config, name, overrides)
    if file.config is not None:
        overrides.check_compatible(config)
    changes: list[str] = []
    config, state = _set_auxiliary_head(config, state, overrides.aux_head, changes)
    if overrides.dropout is not None:
        config = replace(config, dropout=overrides.dropout)
    if overrides.in_chans is not None and overrides.in_chans != config.in_chans:
        changes.append(f"stem adapted from {config.in_chans} to {overrides.in_chans} channels, so no published figure holds")
        config, state = _set_input_channels(config, state, overrides.in_chans)
    try:
        net = DeepLab.from_weights(config, state, classes=file.classes, palette=file.palette, preprocessing=file.preprocessing)
    except WeightsError as error:
        raise WeightsError(f"'{file.label}': {error}") from None
    if overrides.output_stride is not None and overrides.output_stride != config.output_stride:
        net.set_output_stride(overrides.output_stride)
        changes.append(f"output stride {config.output_stride} -> {net.output_stride}")
    if overrides.num_classes is not None and overrides.num_classes != config.num_classes:
        _reset_classifier(net, name, overrides.num_classes)
        changes.append(f"classifier re-initialised: {config.num_classes} -> {net.num_classes} classes")
    return net, tuple(changes)


def adapt_stem(weight: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Return a first convolution's weight for another number of input channels.

    One channel: the sum over the old channels, so that a grey image gives what its RGB copy gave. More: the old channels in
    turn, scaled by old / new, so that the response to an image of equal channels keeps its size.
    """
    old = weight.shape[1]
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [channel % old for channel in range(in_chans)]] * (old / in_chans)


def adapt_tensors(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> StateDict:
    """Return the state dict with every convolution adapted whose input channels alone differ from the expected ones."""
    return {
        name: adapt_stem(tensor, expected[name].shape[1]) if _differs_in_channels(tensor, expected.get(name)) else tensor
        for name, tensor in state.items()
    }


def _differs_in_channels(tensor: torch.Tensor, expected: torch.Tensor | None) -> bool:
    if expected is None or tensor.ndim != 4 or expected.ndim != 4 or tensor.shape == expected.shape:
        return False
    return tensor.shape[:1] + tensor.shape[2:] == expected.shape[:1] + expected.shape[2:]


def _infer_config(file: WeightsFile, state: StateDict, name: ModelName | None, overrides: ModelOverrides) -> DeepLabConfig:
    """Return the configuration for a file that holds tensors alone: of the name and the wishes, and of what shapes tell."""
    if file.encoder is not None:
        raise WeightsError(
            f"'{file.label}' holds an encoder ({short_name(file.encoder)}) without a DeepLab head; "
            f"use create('deeplabv3_{short_name(file.encoder)}', encoder_pretrained=…)."
        )
    classifier = state.get("head.classifier.weight")
    if classifier is None:
        examples = ", ".join(list(state)[:3])
        raise WeightsError(f"'{file.label}' has tensors of an unknown layout ({examples} …); expected deeplabzoo's own names.")
    if name is None:
        raise WeightsError(
            f"'{file.label}' holds tensors but not which network they are of; name it with "
            "create('architecture_encoder', pretrained=…)."
        )
    plus = any(key.startswith(("head.decoder.", "head.low_level.")) for key in state)
    config = overrides.new_model_config(name)
    return replace(
        config,
        architecture="deeplabv3plus" if plus else "deeplabv3",
        num_classes=classifier.shape[0],
        in_chans=3,
        aux_head=any(key.startswith("aux_head.") for key in state),
        norm="batch" if any(key.endswith("running_mean") for key in state) else "group",
    )


def _check_same_model(file: WeightsFile, config: DeepLabConfig, name: ModelName, overrides: ModelOverrides) -> None:
    if config.architecture != name.architecture:
        own = name.__class__(config.architecture, config.encoder)
        raise WeightsError(
            f"'{file.label}' holds a {_DISPLAY_NAMES[config.architecture]} network, {name} was asked for; "
            f"create('{own}', pretrained=…) takes it."
        )
    if config.encoder != name.encoder:
        raise WeightsError(f"'{file.label}' has the encoder {short_name(config.encoder)}, {name} was asked for.")
    classes = CLASS_LISTS[name.data].num_classes if name.data else config.num_classes
    if classes != config.num_classes and overrides.num_classes is None:
        raise UsageError(
            f"'{file.label}' has {config.num_classes} classes and {name} has {classes}; pass num_classes={classes} to start "
            "a new classifier, or leave the data out of the name."
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
    fresh = DeepLab(config).state_dict()
    changes.append("auxiliary head initialised anew")
    return config, state | {name: tensor for name, tensor in fresh.items() if name.startswith("aux_head.")}


def _set_input_channels(config: DeepLabConfig, state: StateDict, in_chans: int) -> tuple[DeepLabConfig, StateDict]:
    config = replace(config, in_chans=in_chans)
    with torch.device("meta"):
        expected = DeepLab(config).state_dict()
    return config, adapt_tensors(state, expected)


def _reset_classifier(net: DeepLab, name: ModelName | None, num_classes: int) -> None:
    """Start a new classifier; it has the names and colours of the data that the model's name tells, where they are as many."""
    known = CLASS_LISTS.get(name.data) if name and name.data else None
    if known and known.num_classes == num_classes:
        net.reset_classifier(num_classes, known.classes, known.palette)
    else:
        net.reset_classifier(num_classes)


# An encoder's own weights from a file: a classifier of a known format, a checkpoint of ours, or tensors with timm's names.


def load_encoder_weights(net: DeepLab, path: Path) -> tuple[WeightsFile, tuple[str, ...]]:
    """Put the encoder weights of a file into `net`; returns the file and what was left out or adapted, as phrases.

    Raises WeightsError where the file is for another encoder or lacks a tensor of this one.
    """
    file = read_weights(path)
    encoder = short_name(net.config.encoder)
    if file.encoder is not None and file.encoder != net.config.encoder:
        raise WeightsError(f"'{file.label}' holds the encoder {short_name(file.encoder)}, {encoder} was asked for.")
    expected = net.encoder.state_dict()
    state, unused = _matched(_encoder_part(file), expected)
    adapted = adapt_tensors(state, expected)
    missing = sorted(name for name in expected.keys() - state.keys() if not name.endswith("num_batches_tracked"))
    wrong = sorted(name for name, tensor in adapted.items() if tensor.shape != expected[name].shape)
    for names, what in ((missing, "lacks"), (wrong, "has other shapes for")):
        if names:
            raise WeightsError(
                f"'{file.label}' {what} {len(names)} of the {len(expected)} tensors of encoder {encoder} "
                f"({', '.join(names[:3])}{' …' if len(names) > 3 else ''})."
            )
    net.encoder.load_state_dict(adapted, strict=False)  # complete but for batch counters, which old files lack
    changes = list(file.notes)
    if any(adapted[name] is not state[name] for name in state):
        changes.append(f"stem adapted to {net.config.in_chans} channels")
    if unused:
        changes.append(f"{len(unused)} tensors unused ({', '.join(unused[:3])}{' …' if len(unused) > 3 else ''})")
    return file, tuple(changes)


def _encoder_part(file: WeightsFile) -> Mapping[str, torch.Tensor]:
    inside = {name.removeprefix("encoder."): tensor for name, tensor in file.state_dict.items() if name.startswith("encoder.")}
    return inside or file.state_dict


def _matched(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors that the encoder has, under its names, and the names of the others.

    timm's feature extractors write `stages_0` for what its classifiers call `stages.0`, and mean the same.
    """
    by_spelling = {re.sub(r"[._]", "_", name): name for name in expected}
    names = {name: by_spelling.get(re.sub(r"[._]", "_", name)) for name in state}
    return {ours: state[name] for name, ours in names.items() if ours}, [name for name, ours in names.items() if not ours]
