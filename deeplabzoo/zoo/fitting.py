"""Weights and wishes brought together: the network that a file holds, changed where something else was asked for, in words.

Nothing is changed silently: each adaptation is a phrase for the loading line. What cannot be adapted without turning the
weights into noise (another architecture, encoder, norm, set of rates) is refused.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.zoo.registry import ModelName
from deeplabzoo.zoo.weights_file import WeightsFile
from deeplabzoo.zoo.wishes import Wishes

StateDict = dict[str, torch.Tensor]
_SPELLED = {"deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3+"}


def fit(file: WeightsFile, name: ModelName | None, wishes: Wishes) -> tuple[DeepLab, tuple[str, ...]]:
    """Return the network of a file, as wished, and what was changed for it, as phrases.

    Raises WeightsError where the file is for another network than `name`, or lacks or has left over even one tensor.
    """
    state = dict(file.state_dict)
    config = file.config or _config_of_tensors(file, state, name, wishes)
    if name is not None:
        _require_same_network(file, config, name, wishes)
    if file.config is not None:
        wishes.refuse_what_weights_fix(config)
    changes: list[str] = []
    config, state = _with_auxiliary_head(config, state, wishes.aux_head, changes)
    if wishes.dropout is not None:
        config = replace(config, dropout=wishes.dropout)
    if wishes.in_chans is not None and wishes.in_chans != config.in_chans:
        changes.append(f"stem adapted from {config.in_chans} to {wishes.in_chans} channels, so no published figure holds")
        config, state = _with_input_channels(config, state, wishes.in_chans)
    try:
        net = DeepLab.from_weights(config, state, classes=file.classes, palette=file.palette, preprocessing=file.preprocessing)
    except WeightsError as error:
        raise WeightsError(f"'{file.label}': {error}") from None
    if wishes.output_stride is not None and wishes.output_stride != config.output_stride:
        net.set_output_stride(wishes.output_stride)
        changes.append(f"output stride {config.output_stride} -> {net.output_stride}")
    if wishes.num_classes is not None and wishes.num_classes != config.num_classes:
        _reset_classifier(net, name, wishes.num_classes)
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


def _config_of_tensors(file: WeightsFile, state: StateDict, name: ModelName | None, wishes: Wishes) -> DeepLabConfig:
    """Return the configuration for a file that holds tensors alone: of the name and the wishes, and of what shapes tell."""
    if file.encoder is not None:
        raise WeightsError(
            f"'{file.label}' holds an encoder ({short_name(file.encoder)}) without a DeepLab head; "
            f"use create('deeplabv3_{short_name(file.encoder)}', encoder_pretrained=…)."
        )
    classifier = state.get("head.classifier.weight")
    if classifier is None:
        some = ", ".join(list(state)[:3])
        raise WeightsError(f"'{file.label}' has tensors of an unknown layout ({some} …); expected deeplabzoo's own names.")
    if name is None:
        raise WeightsError(
            f"'{file.label}' holds tensors but not which network they are of; name it with "
            "create('architecture_encoder', pretrained=…)."
        )
    plus = any(key.startswith(("head.decoder.", "head.low_level.")) for key in state)
    config = wishes.of_a_new_network(name)
    return replace(
        config,
        architecture="deeplabv3plus" if plus else "deeplabv3",
        num_classes=classifier.shape[0],
        in_chans=3,
        aux_head=any(key.startswith("aux_head.") for key in state),
        norm="batch" if any(key.endswith("running_mean") for key in state) else "group",
    )


def _require_same_network(file: WeightsFile, config: DeepLabConfig, name: ModelName, wishes: Wishes) -> None:
    if config.architecture != name.architecture:
        own = name.__class__(config.architecture, config.encoder)
        raise WeightsError(
            f"'{file.label}' holds a {_SPELLED[config.architecture]} network, {name} was asked for; "
            f"create('{own}', pretrained=…) takes it."
        )
    if config.encoder != name.encoder:
        raise WeightsError(f"'{file.label}' has the encoder {short_name(config.encoder)}, {name} was asked for.")
    classes = CLASS_LISTS[name.data].num_classes if name.data else config.num_classes
    if classes != config.num_classes and wishes.num_classes is None:
        raise UsageError(
            f"'{file.label}' has {config.num_classes} classes and {name} has {classes}; pass num_classes={classes} to start "
            "a new classifier, or leave the data out of the name."
        )


def _with_auxiliary_head(
    config: DeepLabConfig, state: StateDict, wished: bool | None, changes: list[str]
) -> tuple[DeepLabConfig, StateDict]:
    if wished in (None, config.aux_head):
        return config, state
    config = replace(config, aux_head=bool(wished))
    if not wished:
        changes.append("auxiliary head dropped")
        return config, {name: tensor for name, tensor in state.items() if not name.startswith("aux_head.")}
    fresh = DeepLab(config).state_dict()
    changes.append("auxiliary head initialised anew")
    return config, state | {name: tensor for name, tensor in fresh.items() if name.startswith("aux_head.")}


def _with_input_channels(config: DeepLabConfig, state: StateDict, in_chans: int) -> tuple[DeepLabConfig, StateDict]:
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
