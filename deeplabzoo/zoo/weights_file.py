"""A weights file, whatever wrote it, in one form: what it says about itself, its tensors, and which released file it is."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.data.classes import class_list
from deeplabzoo.data.palettes import Palette
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.checkpoint import is_own, read_checkpoint
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.zoo.hub import NoSuchFileError, fetch, fetch_from_hub, sha256_at_hand
from deeplabzoo.zoo.manifest import WeightRow, released
from deeplabzoo.zoo.origins import Converted, read

HUB_PREFIX = "hf-hub:"
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""What a folder or a repository of transformers or SMP holds its tensors in, the safer one first."""
SETTINGS_FILE = "config.json"
OWN, BARE = "deeplabzoo", "state dict"


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """What was read from one file; fields that the file does not tell are None."""

    origin: str
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
    remarks: tuple[str, ...] = ()
    """What was dropped or assumed, for the loading line."""
    source: Mapping[str, Any]
    """Identity for reports: `name` and `tag` of a released file, `sha256`, `source`."""

    @property
    def is_foreign(self) -> bool:
        """Whether an origin converted it."""
        return self.origin not in (OWN, BARE)

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
    if is_own(path):
        file = _own(path)
    else:
        found = read(path)
        file = _converted(found) if isinstance(found, Converted) else _bare(found)
    _require_numbers(file.state_dict, path)
    sha256 = sha256_at_hand(path)
    row = next((row for row in released() if row.sha256 == sha256), None)
    identity = {"name": row.name if row else None, "tag": row.tag if row else None, "sha256": sha256}
    return replace(file, source={**file.source, **identity, "source": source or path.name})


def read_released(row: WeightRow) -> WeightsFile:
    """Fetch and read the file of a manifest row.

    What the row says about a foreign file (configuration, preprocessing, classes) counts, since such files cannot say it all.
    Raises DownloadError and WeightsError.
    """
    file = read_weights(fetch(row), str(row.source))
    if file.origin != row.origin:
        raise WeightsError(f"The manifest says that {row.full_name} is of origin {row.origin}, but its file is {file.origin}.")
    if file.origin != OWN:
        classes = class_list(row.data)
        file = replace(
            file,
            config=row.config,
            encoder=row.config.encoder,
            preprocessing=row.preprocessing,
            classes=classes.classes,
            palette=classes.palette,
            remarks=(),  # what a row says is not assumed
        )
    return replace(file, source={**file.source, "name": row.name, "tag": row.tag})


def read_from_hub(address: str) -> WeightsFile:
    """Read `hf-hub:owner/name[@revision]`: its `model.safetensors`, else its `pytorch_model.bin`, of ours or a known origin.

    A file that is not ours says too little about itself (output stride, rates, class names), so the `config.json` of the same
    commit is fetched beside it, where there is one. Raises DownloadError and WeightsError.
    """
    repo, _, revision = address.removeprefix(HUB_PREFIX).partition("@")
    path = _weights_from_hub(repo, revision or None)
    if not is_own(path):
        with contextlib.suppress(NoSuchFileError):
            fetch_from_hub(repo, SETTINGS_FILE, _commit_of(path) or revision or None)
    return read_weights(path, address)


def _weights_from_hub(repo: str, revision: str | None) -> Path:
    first, *others = FOLDER_FILES
    try:
        return fetch_from_hub(repo, first, revision)
    except NoSuchFileError as missing:
        for file in others:
            with contextlib.suppress(NoSuchFileError):
                return fetch_from_hub(repo, file, revision)
        raise missing


def _commit_of(path: Path) -> str:
    """Return the commit that a file of the Hub's cache is of, so that a branch that moves meanwhile mixes no two."""
    name = path.parent.name
    return name if re.fullmatch(r"[0-9a-f]{40}", name) else ""


def _require_numbers(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise WeightsError for a value that is no number: a network of them labels every pixel 0, without a word."""
    for name, tensor in tensors.items():
        # a sum is quick and needs no memory; it may overflow where all values are finite
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise WeightsError(f"'{path}' holds the tensor '{name}' with values that are not finite; it cannot be used.")


def _own(path: Path) -> WeightsFile:
    checkpoint = read_checkpoint(path)
    return WeightsFile(
        origin=OWN,
        config=checkpoint.config,
        encoder=checkpoint.config.encoder,
        state_dict=checkpoint.state_dict,
        classes=checkpoint.classes,
        palette=checkpoint.palette,
        preprocessing=checkpoint.preprocessing,
        source={"trained": dict(checkpoint.source)} if checkpoint.source else {},
    )


def _converted(found: Converted) -> WeightsFile:
    return WeightsFile(
        origin=found.origin,
        config=found.config,
        encoder=found.encoder,
        state_dict=found.state_dict,
        classes=found.classes,
        palette=found.palette,
        preprocessing=found.preprocessing,
        remarks=(*(f"{what} dropped" for what in found.dropped), *found.notes),
        source={},
    )


def _bare(tensors: Mapping[str, torch.Tensor]) -> WeightsFile:
    return WeightsFile(origin=BARE, config=None, encoder=None, state_dict=tensors, source={})
