"""Tensors by name out of a file that nobody vouches for: safetensors, or a pickle from which no code is ever run."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.errors import WeightsError
from deeplabzoo.models.checkpoint import read_safetensors
from deeplabzoo.zoo.array_pickle import is_array_pickle, read_array_pickle
from deeplabzoo.zoo.torch_pickle import require_modest

_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network")
"""Keys under which training scripts keep the state dict beside optimizer and epoch."""
_SHARED = 4
"""Times that a file's bytes may stand for values on average: tensors that are tied are written once."""
_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


class _Unread:
    """Stands for what a training script kept beside its tensors (a best score, a history of losses); no code of it is called.

    Where a file would call one of the functions below, it makes one of these instead.
    """

    def __init__(self, *arguments: object) -> None:
        """Whatever it was made of is left out."""

    def __setstate__(self, state: object) -> None:
        """So is its state."""


_UNREAD: list[Any] = [
    (_Unread, name)
    for name in (
        *(f"numpy.{core}.multiarray.{function}" for core in ("core", "_core") for function in ("scalar", "_reconstruct")),
        "numpy.dtype",
        "numpy.ndarray",
        "mmengine.logging.history_buffer.HistoryBuffer",
        "builtins.getattr",  # of a history's methods
    )
]
"""The names under which pickles call for numpy's numbers and arrays, before and since numpy 2, and for mmengine's log."""


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a `.safetensors`, PyTorch or pickled numpy file, told by its content, in float32 on the CPU.

    Raises WeightsError, in one sentence, for a file that is empty, damaged, of another kind, or holds more than tensors.
    """
    head = _first_bytes(path)
    if is_array_pickle(head):
        tensors = _tensors_of(read_array_pickle(path), path)
    elif head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        tensors = _tensors_of(_unpickle(path), path)
    elif head[8:9] == b"{" or path.suffix == ".safetensors":
        _, tensors = read_safetensors(path)
    else:
        raise WeightsError(
            f"'{path}' is no weights file that deeplabzoo knows: neither safetensors nor PyTorch, and no known foreign format."
        )
    _require_honest(tensors, path)
    return {_bare(name): _plain(tensor) for name, tensor in tensors.items()}


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise WeightsError(f"'{path}' is a folder; name the weights file in it.")
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except FileNotFoundError:
        raise WeightsError(f"There is no weights file '{path}'.") from None
    except OSError as error:
        raise WeightsError(f"'{path}' cannot be read: {error.strerror}.") from None
    if not head:
        raise WeightsError(f"'{path}' is empty; download or save it again.")
    return head


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_UNREAD):
            warnings.simplefilter("ignore")  # remarks on old formats, meant for whoever wrote the file
            require_modest(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"'{path}' holds Python objects or code beside tensors, which are never run, or is damaged; "
            "ask for its state dict alone, best as safetensors."
        ) from None
    except Exception as error:  # a damaged archive or pickle can fail in any way its bytes lead to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"'{path}' is not a whole PyTorch file ({reason}); download or save it again.") from None


def _tensors_of(value: Any, path: Path) -> Mapping[str, torch.Tensor]:
    for wrapper in (None, *_WRAPPERS):
        found = value if wrapper is None else value.get(wrapper) if isinstance(value, Mapping) else None
        if isinstance(found, Mapping) and found and all(isinstance(one, torch.Tensor) for one in found.values()):
            return found
    raise WeightsError(f"'{path}' holds no state dict: expected tensors by name, at its top or under {', '.join(_WRAPPERS)}.")


def _require_honest(tensors: Mapping[Any, torch.Tensor], path: Path) -> None:
    """Raise WeightsError unless all tensors have names, are plain values in memory, and are no larger than the file.

    A few bytes can stand for any number of values: repeated along a dimension of stride 0, or shared by many tensors.
    """
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not isinstance(name, str) or not plain or tensor.is_complex():
            raise WeightsError(f"'{path}' holds '{name}', which is no plain tensor with a name; ask for a state dict.")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > _SHARED * path.stat().st_size:
        raise WeightsError(f"'{path}' claims {claimed} bytes of tensors and has not nearly as many; it is not read.")


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor.detach()
