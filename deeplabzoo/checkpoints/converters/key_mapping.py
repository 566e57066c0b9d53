"""Tensor names of one layout turned into those of another, by rules that must cover every name."""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.data.classes import Palette, class_list, default_palette
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.encoder_table import encoder_info, list_encoders
from deeplabzoo.models.heads import resolve_atrous_rates
from deeplabzoo.strict_json import parse_json

Rules = Sequence[tuple[str, str | None]]
"""(pattern of a whole name, what it becomes with \\1 for its groups, or None to leave the tensor out); the first fit counts."""


def rename(tensors: Mapping[str, Tensor], rules: Rules, format_name: str) -> dict[str, Tensor]:
    """Return the tensors under their new names; raises WeightsError for a name that no rule covers or two that become one.

    Counters of batches, which files from before PyTorch 0.4.1 lack and evaluation never reads, are added as 0.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        matches = ((re.fullmatch(pattern, name), template) for pattern, template in rules)
        found, template = next((match for match in matches if match[0]), (None, None))
        if found is None:
            raise WeightsError(f"The {format_name} checkpoint has a tensor '{name}' that its layout does not know.")
        if template is None:
            continue
        new = found.expand(template)
        if new in renamed:
            raise WeightsError(f"The {format_name} checkpoint has more than one tensor for '{new}', the last of them '{name}'.")
        renamed[new] = tensor
    batchnorms = [name.removesuffix("running_var") for name in renamed if name.endswith(".running_var")]
    return {f"{batchnorm}num_batches_tracked": torch.tensor(0) for batchnorm in batchnorms} | renamed


def invert_rules(rules: Rules) -> Rules:
    r"""Return the rules that turn the new names back into the old ones: one table, read from right to left.

    Rules that leave a tensor out have no way back. A pattern must be made of literal names, escaped dots and groups without
    further groups in them, each of which its template uses once; ValueError names one that is not.

    >>> rename({"encoder.bn1.weight": torch.ones(1)}, invert_rules([(r"backbone\.(.+)", r"encoder.\1")]), "some").keys()
    dict_keys(['backbone.bn1.weight'])
    """
    return tuple(_invert_rule(pattern, template) for pattern, template in rules if template is not None)


_PATTERN_PART = re.compile(r"\\(?P<escaped>\.)|\((?:\?P<(?P<name>\w+)>)?(?P<group>(?!\?)[^()]+)\)|(?P<literal>\w)")
_TEMPLATE_PART = re.compile(r"\\g<(?P<name>\w+)>|\\(?P<number>\d)|(?P<literal>[^\\])")


def _invert_rule(pattern: str, template: str) -> tuple[str, str]:
    groups: dict[str, str] = {}
    library_config, at = "", 0
    while at < len(pattern):
        part = _PATTERN_PART.match(pattern, at)
        if part is None:
            raise ValueError(f"The pattern {pattern!r} has no way back.")
        if part["group"]:
            name = part["name"] or f"_{len(groups) + 1}"
            groups[name] = part["group"]
            library_config += rf"\g<{name}>"
        else:
            library_config += part["literal"] or "."
        at = part.end()
    config, used = "", []
    for part in _TEMPLATE_PART.finditer(template):
        if part["literal"]:
            config += re.escape(part["literal"])
        else:
            used.append(part["name"] or f"_{part['number']}")
            config += f"(?P<{used[-1]}>{groups[used[-1]]})"
    if sorted(used) != sorted(groups):
        raise ValueError(f"The template {template!r} does not use each group of {pattern!r} once.")
    return config, library_config


# The record that every converter returns.


_BINARY = ("background", "foreground")


def converted_checkpoint(
    format_name: str,
    config: DeepLabConfig,
    state_dict: Mapping[str, Tensor],
    preprocessing: Preprocessing,
    *,
    datasets: Sequence[str] | None = ("voc",),
    classes: tuple[tuple[str, ...], Palette] | None = None,
    dropped: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    """Return a converted segmentation model, with what holds for every layout.

    A head of one channel is a yes or no through a sigmoid. It becomes two classes, the first one's logit always 0: softmax and
    arg-max of the two are the sigmoid and its threshold of one half. An auxiliary head of another number of classes than the
    classifier belongs to a classifier that was replaced, and is dropped.

    Args:
        format_name: Name of the layout, as in the manifest.
        config: What the tensors compute; `num_classes` is corrected for a head of one channel.
        state_dict: float32 tensors under our names.
        preprocessing: What the library's own code does to an image.
        datasets: Class lists to assume where the file names no classes, the likelier first; None for no names at all.
        classes: Names and colours, where the file names them.
        dropped: What the file holds and we do not use, as short phrases for the loading line.
        notes: What was assumed because the file does not say, as short phrases.
    """
    state = dict(state_dict)
    outputs = state["head.classifier.weight"].shape[0]
    auxiliary = state.get("aux_head.classifier.weight")
    if auxiliary is not None and auxiliary.shape[0] != outputs:
        state = drop_auxiliary(state)
        dropped = (*dropped, f"auxiliary head ({auxiliary.shape[0]} channels, the classifier has {outputs})")
        config = replace(config, aux_head=False)
    if outputs == 1:
        config = replace(config, num_classes=2)
        notes = (*notes, "one sigmoid channel made background and foreground")
        for name in (
            "head.classifier.weight",
            "head.classifier.bias",
            "aux_head.classifier.weight",
            "aux_head.classifier.bias",
        ):
            if name in state:
                state[name] = torch.cat([torch.zeros_like(state[name]), state[name]])
        classes = classes if classes and len(classes[0]) == 2 else (_BINARY, default_palette(2))
    names, palette = classes or (None, None)
    if classes is None and datasets is not None:
        names, palette, assumed = assume_classes(config.num_classes, datasets)
        notes = (*notes, *assumed)
    return Checkpoint(
        format_name=format_name,
        config=config,
        encoder=config.encoder,
        state_dict=state,
        classes=names,
        palette=palette,
        preprocessing=preprocessing,
        dropped=dropped,
        notes=notes,
    )


def with_classes(converted: Checkpoint, names: tuple[str, ...], palette: Palette | None) -> Checkpoint:
    """Return a checkpoint with the class names that its file holds, where they are as many as its outputs."""
    if converted.config is None:
        return converted
    count = converted.config.num_classes
    if converted.classes == _BINARY and len(names) == 1:
        names, palette = ("background", *names), None
    if len(names) != count:
        return replace(converted, notes=(*converted.notes, f"the file names {len(names)} classes for {count}: ignored"))
    notes = tuple(note for note in converted.notes if not note.startswith(_NO_CLASSES))
    return replace(converted, classes=names, palette=palette or default_palette(count), notes=notes)


_NO_CLASSES = "the file names no classes"


# Names and colours of classes for a file that holds neither, and a phrase that says that they were assumed.


def assume_classes(num_classes: int, candidates: Sequence[str] = ("voc",)) -> tuple[tuple[str, ...], Palette, tuple[str, ...]]:
    """Return names, colours and notes for so many outputs: those of the first `candidates` class list of that length.

    >>> assume_classes(2)[0]
    ('class_0', 'class_1')
    """
    for data in candidates:
        known = class_list(data)
        if known.num_classes == num_classes:
            note = f"{_NO_CLASSES}: {data.upper()}'s assumed, as there are {num_classes}"
            return known.classes, known.palette, (note,)
    names = tuple(f"class_{index}" for index in range(num_classes))
    return names, default_palette(num_classes), (f"{_NO_CLASSES}: class_0 to class_{num_classes - 1} given",)


# The `config.json` that transformers and SMP keep beside their tensors, which may be hostile.


_MAX_BYTES = 1 << 20


def read_config_json(path: Path) -> dict[str, Any]:
    """Return what the `config.json` in a weights file's folder says; nothing where there is none, or none that can be read."""
    beside = path.with_name("config.json")
    try:
        if not beside.is_file():  # a link to a device has no end, and a pipe no beginning
            return {}
        with beside.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        found = parse_json(data) if len(data) <= _MAX_BYTES else None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# Encoders recognised by the channels that their stages end with, for files that hold no encoder's name.


def encoder_from_widths(pattern: str, ends: Sequence[Tensor]) -> str:
    """Return the encoder named like `pattern` whose stages end with as many channels as these convolutions' weights give.

    Raises WeightsError where there is none.
    """
    widths = tuple(weight.shape[0] for weight in ends)
    for name in list_encoders(pattern):
        if encoder_info(name).channels[: len(widths)] == widths:
            return name
    raise WeightsError(f"No encoder named {pattern} has stages of {', '.join(map(str, widths))} channels.")


# The way back: a model of ours in another library's layout, or the error that says why it cannot be.


_TRAINING_ONLY = {"dropout", "aux_head"}
"""Fields that no logit in evaluation depends on."""


@dataclass(frozen=True, kw_only=True)
class ExportedCheckpoint:
    """A model under the names of another library, whose own class loads it with nothing missing or left over."""

    state_dict: Mapping[str, Tensor]
    build: str = ""
    """The Python expression that makes the model which takes the state dict; empty where folders alone are usual."""
    folder: str = ""
    """The Python expression that reads `{folder}` with these tensors and settings; empty where the library has no such form."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """JSON files of that folder by name."""
    notes: tuple[str, ...] = ()
    """What was left out, filled in, or is not kept, as short phrases."""


def check_same_arithmetic(
    config: DeepLabConfig, library_config: DeepLabConfig, library: str, ignore: Collection[str] = ()
) -> None:
    """Raise WeightsError, in one sentence with every difference, unless a model means the same in another library.

    `library_config` is what the library computes with these tensors; `ignore` names fields that do not matter there.
    """
    if config.architecture != library_config.architecture:
        raise WeightsError(f"{library} has no {config.architecture} on {config.encoder}.")
    left, right = _normalized_fields(config), _normalized_fields(library_config)
    names = [name for name in left if name not in (*ignore, *_TRAINING_ONLY) and left[name] != right[name]]
    if not names:
        return
    of_them = ", ".join(f"{name} {json.dumps(right[name])}" for name in names)
    of_us = ", ".join(f"{name} {json.dumps(left[name])}" for name in names)
    raise WeightsError(f"{library} would compute other logits: its model has {of_them}, and this one has {of_us}.")


def drop_auxiliary(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without those of the auxiliary head, which is for training alone."""
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith("aux_head.")}


def _normalized_fields(config: DeepLabConfig) -> dict[str, Any]:
    """Return the fields that this architecture has, with what None means written out."""
    plus = config.architecture == "deeplabv3plus"
    separable = plus if config.aspp_separable is None else config.aspp_separable
    plain = dataclasses.asdict(config) | {"atrous_rates": list(resolve_atrous_rates(config)), "aspp_separable": separable}
    unused = {"refine_conv"} if plus else {name for name in plain if name.startswith("decoder_")}
    if not resolve_atrous_rates(config):
        unused |= {"aspp_separable"}
        separable = False
    if not separable and not (plus and config.decoder_separable):
        unused |= {"depthwise_norm"}
    if config.output_stride == 32:
        unused |= {"encoder_dilate_strided", "encoder_dilate_local_conv"}
    return {name: value for name, value in plain.items() if name not in unused}
