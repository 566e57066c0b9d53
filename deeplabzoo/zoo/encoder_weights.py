"""An encoder's own weights from a file: a classifier of a known format, a checkpoint of ours, or tensors with timm's names."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from deeplabzoo.errors import WeightsError
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.zoo.fitting import adapt_tensors
from deeplabzoo.zoo.weights_file import WeightsFile, read_weights


def load_encoder(net: DeepLab, path: Path) -> tuple[WeightsFile, tuple[str, ...]]:
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
    changes = list(file.remarks)
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
