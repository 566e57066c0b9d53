"""Numpy arrays by name out of a plain pickle (detectron2's `.pkl`, Paddle's `.pdparams`), of which nothing is ever run.

A pickle is a program that may call anything. Two fences stand around it here, and no code of numpy sees what it holds. Before
it starts, its instructions are read: one that no pickle of arrays has, or one that asks for more memory than the file is long,
ends the reading. While it runs, the handful of names that arrays are written with mean stand-ins of this module, made anew for
each file, which only keep what they are given, and copy no more than the file is long; any other name ends the reading. Arrays
are built afterwards, from bytes whose number fits shape and type.
"""

import io
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deeplabzoo.errors import WeightsError
from deeplabzoo.zoo.pickle_fence import FOREIGN, Copies, require_plain

_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The number that a PyTorch file from before 1.6 begins with, as its pickle writes it."""
_SHARED = 4
"""Times that a file's bytes may become values: arrays that are tied are written once."""
_TYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_NAMES_OF_PARAMETERS = "StructuredToParameterName@@"
"""Paddle keeps the names of its own objects under this one."""


def is_array_pickle(head: bytes) -> bool:
    """Whether a file that begins with these 32 bytes is a pickle, but not one that PyTorch wrote."""
    return head[:1] == b"\x80" and _MAGIC not in head


def read_array_pickle(path: Path) -> dict[str, Any]:
    """Return what a pickled dictionary holds, with every array made a tensor; words and numbers stay as they are.

    Raises WeightsError, in one sentence, for a pickle of anything else, a hostile one and a damaged one.
    """
    try:
        data = path.read_bytes()
        require_plain(data, FOREIGN | {"BINPERSID"})
        value = _tensors(_Reader(data).load(), Copies(_SHARED * len(data)))
    except OSError as error:
        raise WeightsError(f"'{path}' cannot be read: {error.strerror}.") from None
    except Exception:  # a damaged or hostile pickle can fail in any way its bytes lead to
        raise WeightsError(
            f"'{path}' holds Python objects or code beside tensors, which are never run, or is damaged; "
            "ask for its state dict alone, best as safetensors."
        ) from None
    if not isinstance(value, dict):
        raise WeightsError(f"'{path}' holds no state dict: expected a pickle of arrays by name.")
    return value


def _stand_ins(copies: Copies) -> Mapping[tuple[str, str], Callable[..., Any]]:
    """Return what the names mean that arrays are written with: made for one file, so that no file can change another's."""

    class Type:
        def __init__(self, name: str, *_: object) -> None:
            self.name, self.order = name, "<"

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.order = state[1]

    class Array:
        content: tuple[tuple[int, ...], Type, bool, bytes]

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            _, shape, kind, is_fortran, data = state
            self.content = (shape, kind, is_fortran, data)

    class Number:
        def __init__(self, *_: object) -> None: ...

    def from_buffer(data: bytes, kind: Type, shape: tuple[int, ...], order: str) -> Array:
        array = Array()
        array.content = (shape, kind, order == "F", data)
        return array

    def encode(text: str, encoding: str = "latin1") -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError("Bytes are written as Latin-1 only.")
        copies.spend(text)
        return text.encode("latin1")

    def no_bytes() -> bytes:
        return b""

    def reconstruct(*_: object) -> Array:
        return Array()

    meanings: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "dtype"): Type,
        ("numpy", "ndarray"): Array,
        ("collections", "OrderedDict"): copies.counted(dict),
        ("_codecs", "encode"): encode,
    }
    for builtins in ("builtins", "__builtin__"):
        meanings[builtins, "bytes"] = no_bytes  # an empty array's, before protocol 3
        meanings |= {(builtins, one.__name__): copies.counted(one) for one in (dict, list, tuple)}
    for core in ("numpy.core", "numpy._core"):
        meanings |= {
            (f"{core}.multiarray", "_reconstruct"): reconstruct,
            (f"{core}.multiarray", "scalar"): Number,
            (f"{core}.numeric", "_frombuffer"): from_buffer,
        }
    return meanings


class _Reader(pickle.Unpickler):
    """Python's unpickler with a dozen names in its world."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._meanings = _stand_ins(Copies(len(data)))

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name; raises UnpicklingError for all but those of arrays."""
        try:
            return self._meanings[module, name]
        except (KeyError, TypeError):
            raise pickle.UnpicklingError("A name that arrays are not written with.") from None


def _tensors(value: Any, copies: Copies) -> Any:
    if type(value) is dict:
        return {key: _tensors(one, copies) for key, one in value.items() if key != _NAMES_OF_PARAMETERS}
    if type(value) is tuple and len(value) == 2 and isinstance(value[0], str) and hasattr(value[1], "content"):
        value = value[1]  # a tensor of Paddle's: its name and its array
    return _tensor(copies, *value.content) if hasattr(value, "content") else value


def _tensor(copies: Copies, shape: Any, kind: Any, is_fortran: Any, data: Any) -> torch.Tensor:
    if kind.name not in _TYPES or kind.order not in ("<", ">", "|", "="):
        raise pickle.UnpicklingError("An array of something else than numbers.")
    copies.spend(data)
    layout = np.dtype(kind.name).newbyteorder(kind.order)
    sides = tuple(int(side) for side in shape)
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    if min(sides, default=0) < 0 or math.prod(sides) * layout.itemsize != len(raw):
        raise pickle.UnpicklingError("An array of another size than it says.")
    array = np.frombuffer(raw, layout).reshape(sides, order="F" if is_fortran else "C")
    return torch.from_numpy(np.ascontiguousarray(array, layout.newbyteorder("=")).reshape(sides).copy())
