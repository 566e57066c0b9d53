"""Any known weights file or folder read into one `Checkpoint`."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from deeplabzoo.checkpoints.converters import convert_contents, read_foreign
from deeplabzoo.checkpoints.native import is_native_checkpoint, read_checkpoint
from deeplabzoo.checkpoints.state_dict import read_state_dict
from deeplabzoo.checkpoints.tensor_file import Contents
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.strict_json import parse_json

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""The file of tensors in a folder or repository of transformers or SMP, the safer one first."""
SHARD_INDEXES = tuple(f"{name}.index.json" for name in FOLDER_FILES)
"""The file that names the shards where a folder's tensors lie in several files."""
SETTINGS_FILE = "config.json"
_MAX_INDEX_BYTES = 16 << 20
_MAX_ABS_VALUE = 1e30
"""Above it, one multiplication by the next layer may overflow float32, and a model of infinities labels every pixel 0."""


def read_weights(path: Path, source: str | None = None) -> Checkpoint:
    """Read a file of ours, of any known format, or of tensors alone; or the weights of a folder, sharded ones included.

    Args:
        path: The file or folder.
        source: Where it comes from, for messages and reports; None is the path's last part.

    Raises:
        WeightsError: The file is missing, damaged, unsafe or of an unknown format, or holds values that no model can use.
    """
    path = find_weights_file(path)
    if path.name.endswith(".index.json"):
        checkpoint = convert_contents(Contents(path, dict(_read_shards(path))))
    elif is_native_checkpoint(path):
        checkpoint = read_checkpoint(path)
        checkpoint = replace(checkpoint, source={"trained": dict(checkpoint.source)} if checkpoint.source else {})
    else:
        checkpoint = read_foreign(path)
    _check_values(checkpoint.state_dict, path)
    return replace(checkpoint, source={**checkpoint.source, "source": source or path.name})


def find_weights_file(path: Path) -> Path:
    """Return the weights file that a path means: itself, or the file or shard index in a folder; raises WeightsError."""
    if path.is_dir():
        candidates = (path / name for name in (*FOLDER_FILES, *SHARD_INDEXES))
        inside = next((file for file in candidates if file.is_file()), None)
        if inside is None:
            raise WeightsError(f"'{path}' is a folder without {' or '.join((*FOLDER_FILES, *SHARD_INDEXES))}; name a file.")
        return inside
    if not path.exists():
        raise WeightsError(f"There is no weights file '{path}'.")
    if not path.is_file():
        raise WeightsError(f"'{path}' is a device or a pipe, which has no end; name a file.")
    return path


def shard_names(index: Path) -> tuple[str, ...]:
    """Return the file names that a shard index lists, sorted; raises WeightsError where it is not such an index."""
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"more than {_MAX_INDEX_BYTES} bytes")
        names = parse_json(index.read_bytes())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"'{index}' is not an index of shards ({error!r:.100}); expected a weight_map of file names."
        ) from None
    shards = set()
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or "\\" in name or not name.endswith((".safetensors", ".bin")):
            raise WeightsError(
                f"'{index}' names the shard {name!r:.100}; expected a .safetensors or .bin file of the same folder."
            )
        shards.add(name)
    return tuple(sorted(shards))


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name in shard_names(index):
        shard = index.with_name(name)
        if not shard.is_file():
            raise WeightsError(f"The shard '{name}' that '{index}' names is missing; download the whole folder.")
        tensors |= read_state_dict(shard)
    listed = json.loads(index.read_bytes())["weight_map"].keys()
    if absent := sorted(listed - tensors.keys()):
        raise WeightsError(f"The shards of '{index}' lack {len(absent)} of its tensors, such as '{absent[0]}'.")
    return tensors


def _check_values(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise WeightsError for values with which a model labels every pixel 0, without any other sign."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (float(one) for one in torch.aminmax(tensor))
        problem = ""
        if not (low > -_MAX_ABS_VALUE and high < _MAX_ABS_VALUE):
            problem = f"above {_MAX_ABS_VALUE:g}" if bool(torch.isfinite(tensor).all()) else "that are not finite"
        elif low < 0 and name.endswith("running_var"):
            problem = f"down to {low:g}, and a variance is never negative"
        if problem:
            raise WeightsError(f"'{path}' holds the tensor '{name}' with values {problem}; it cannot be used.")
