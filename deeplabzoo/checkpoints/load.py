"""A weights file, whatever wrote it, in one form: what it says about itself, its tensors, and which released file it is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.checkpoints.converters import ConvertedCheckpoint, read_foreign
from deeplabzoo.checkpoints.native import is_native_checkpoint, read_checkpoint
from deeplabzoo.data.classes import Palette
from deeplabzoo.errors import WeightsError
from deeplabzoo.hub.download import cached_sha256
from deeplabzoo.hub.manifest import released
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

HUB_PREFIX = "hf-hub:"
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""What a folder or a repository of transformers or SMP holds its tensors in, the safer one first."""
SETTINGS_FILE = "config.json"
NATIVE, TENSORS_ONLY = "deeplabzoo", "state dict"


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """What was read from one file; fields that the file does not tell are None."""

    format_name: str
    """"deeplabzoo", a foreign format's name, or "state dict" for tensors alone."""
    config: DeepLabConfig | None
    """None for tensors alone and for encoders."""
    encoder: str | None
    """Canonical name, where the file tells it."""
    state_dict: Mapping[str, torch.Tensor]
    """In our names; those of an encoder (`config` None, `encoder` set) are relative to `DeepLab.encoder`."""
    classes: tuple[str, ...] | None = None
    palette: Palette | None = None
    preprocessing: Preprocessing | None = None
    notes: tuple[str, ...] = ()
    """What was dropped or assumed, for the loading line."""
    source: Mapping[str, Any]
    """Identity for reports: `name` and `tag` of a released file, `sha256`, `source`."""

    @property
    def is_converted(self) -> bool:
        """Whether an origin converted it."""
        return self.format_name not in (NATIVE, TENSORS_ONLY)

    @property
    def label(self) -> str:
        """How messages call it: `name.tag` of a released file, else where it came from."""
        name, tag = self.source.get("name"), self.source.get("tag")
        return f"{name}.{tag}" if name else str(self.source["source"])


def read_weights(path: Path, source: str | None = None) -> WeightsFile:
    """Read a file of ours, of any known foreign format, or of tensors alone; of a folder, the weights file in it.

    A file whose hash is in the manifest is that released file, wherever it lies. Raises WeightsError in one sentence.
    """
    path = next((inside for file in FOLDER_FILES if (inside := path / file).is_file()), path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise WeightsError(f"'{path}' is a device or a pipe, which has no end; name a file.")
    if is_native_checkpoint(path):
        file = _from_native(path)
    else:
        found = read_foreign(path)
        file = _from_converted(found) if isinstance(found, ConvertedCheckpoint) else _from_tensors(found)
    _check_finite(file.state_dict, path)
    sha256 = cached_sha256(path)
    row = next((row for row in released() if row.sha256 == sha256), None)
    identity = {"name": row.name if row else None, "tag": row.tag if row else None, "sha256": sha256}
    return replace(file, source={**file.source, **identity, "source": source or path.name})


def _check_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise WeightsError for a value that is no number: a network of them labels every pixel 0, without a word."""
    for name, tensor in tensors.items():
        # a sum is quick and needs no memory; it may overflow where all values are finite
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise WeightsError(f"'{path}' holds the tensor '{name}' with values that are not finite; it cannot be used.")


def _from_native(path: Path) -> WeightsFile:
    checkpoint = read_checkpoint(path)
    return WeightsFile(
        format_name=NATIVE,
        config=checkpoint.config,
        encoder=checkpoint.config.encoder,
        state_dict=checkpoint.state_dict,
        classes=checkpoint.classes,
        palette=checkpoint.palette,
        preprocessing=checkpoint.preprocessing,
        source={"trained": dict(checkpoint.source)} if checkpoint.source else {},
    )


def _from_converted(found: ConvertedCheckpoint) -> WeightsFile:
    return WeightsFile(
        format_name=found.format_name,
        config=found.config,
        encoder=found.encoder,
        state_dict=found.state_dict,
        classes=found.classes,
        palette=found.palette,
        preprocessing=found.preprocessing,
        notes=(*(f"{what} dropped" for what in found.dropped), *found.notes),
        source={},
    )


def _from_tensors(tensors: Mapping[str, torch.Tensor]) -> WeightsFile:
    return WeightsFile(format_name=TENSORS_ONLY, config=None, encoder=None, state_dict=tensors, source={})
