"""Tensors by name out of a file that nobody vouches for: safetensors, or a pickle from which no code is ever run."""

import io
import math
import pickle
import pickletools
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from deeplabzoo.checkpoints.native import read_safetensors
from deeplabzoo.errors import WeightsError

# What every pickle is held to before and while anything reads it: plain instructions, and no more copies than bytes.
#
# A pickle is a program. Some of its instructions reach outside the file, and a few bytes can make its reader take any amount of
# memory: a place in a list of notes that is far away, or one long value copied again and again.


FORBIDDEN_OPCODES = frozenset({"PERSID", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEXT_BUFFER", "READONLY_BUFFER"})
"""Instructions that reach outside the file or make objects in ways that neither arrays nor tensors are written in."""
_MEMO = {"PUT", "BINPUT", "LONG_BINPUT"}


def check_opcodes(data: bytes, forbidden: Collection[str] = FORBIDDEN_OPCODES) -> None:
    """Raise UnpicklingError for a pickle with a foreign instruction, or one that notes a value at a place far away.

    Lengths that exceed the data fail here too, before memory is taken for them.
    """
    for count, (instruction, argument, _) in enumerate(pickletools.genops(data), start=1):
        is_far = instruction.name in _MEMO and isinstance(argument, int) and argument > count
        if instruction.name in forbidden or is_far:
            raise pickle.UnpicklingError(f"{instruction.name} does not occur in a pickle of arrays.")


class CopyBudget:
    """How many elements may still be copied while one pickle is read: about as many as it has bytes, as each takes one."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def consume(self, copied: object) -> None:
        """Count a value that is about to be copied; raises UnpicklingError where it is one too many."""
        self._left -= 1 + (len(copied) if isinstance(copied, Sized) else 0)
        if self._left < 0:
            raise pickle.UnpicklingError("It copies more than it holds.")

    def wrap(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return `make`, which copies a list, a text or a dictionary, counting what it copies; a bare number is refused."""

        def wrapped(*arguments: Any) -> Any:
            for one in arguments:
                if not isinstance(one, Sequence | dict | set):
                    raise pickle.UnpicklingError("It makes something out of nothing.")
                self.consume(one)
            return make(*arguments)

        return wrapped


# Numpy arrays by name out of a plain pickle (detectron2's `.pkl`, Paddle's `.pdparams`), of which nothing is ever run.
#
# A pickle is a program that may call anything. Two fences stand around it here, and no code of numpy sees what it holds. Before
# it starts, its instructions are read: one that no pickle of arrays has, or one that asks for more memory than the file is long,
# ends the reading. While it runs, the handful of names that arrays are written with mean stand-ins of this module, made anew for
# each file, which only keep what they are given, and copy no more than the file is long; any other name ends the reading. Arrays
# are built afterwards, from bytes whose number fits shape and type.


_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The number that a PyTorch file from before 1.6 begins with, as its pickle writes it."""
_SHARED_OPCODES = 4
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
        check_opcodes(data, FORBIDDEN_OPCODES | {"BINPERSID"})
        value = _tensors(_ArrayUnpickler(data).load(), CopyBudget(_SHARED_OPCODES * len(data)))
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


def _array_stubs(budget: CopyBudget) -> Mapping[tuple[str, str], Callable[..., Any]]:
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
        budget.consume(text)
        return text.encode("latin1")

    def no_bytes() -> bytes:
        return b""

    def reconstruct(*_: object) -> Array:
        return Array()

    stubs: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "dtype"): Type,
        ("numpy", "ndarray"): Array,
        ("collections", "OrderedDict"): budget.wrap(dict),
        ("_codecs", "encode"): encode,
    }
    for builtins in ("builtins", "__builtin__"):
        stubs[builtins, "bytes"] = no_bytes  # an empty array's, before protocol 3
        stubs |= {(builtins, one.__name__): budget.wrap(one) for one in (dict, list, tuple)}
    for core in ("numpy.core", "numpy._core"):
        stubs |= {
            (f"{core}.multiarray", "_reconstruct"): reconstruct,
            (f"{core}.multiarray", "scalar"): Number,
            (f"{core}.numeric", "_frombuffer"): from_buffer,
        }
    return stubs


class _ArrayUnpickler(pickle.Unpickler):
    """Python's unpickler with a dozen names in its world."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._stubs = _array_stubs(CopyBudget(len(data)))

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name; raises UnpicklingError for all but those of arrays."""
        try:
            return self._stubs[module, name]
        except (KeyError, TypeError):
            raise pickle.UnpicklingError("A name that arrays are not written with.") from None


def _tensors(value: Any, budget: CopyBudget) -> Any:
    if type(value) is dict:
        return {key: _tensors(one, budget) for key, one in value.items() if key != _NAMES_OF_PARAMETERS}
    if type(value) is tuple and len(value) == 2 and isinstance(value[0], str) and hasattr(value[1], "content"):
        value = value[1]  # a tensor of Paddle's: its name and its array
    return _tensor(budget, *value.content) if hasattr(value, "content") else value


def _tensor(budget: CopyBudget, shape: Any, kind: Any, is_fortran: Any, data: Any) -> torch.Tensor:
    if kind.name not in _TYPES or kind.order not in ("<", ">", "|", "="):
        raise pickle.UnpicklingError("An array of something else than numbers.")
    budget.consume(data)
    layout = np.dtype(kind.name).newbyteorder(kind.order)
    sides = tuple(int(side) for side in shape)
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    if min(sides, default=0) < 0 or math.prod(sides) * layout.itemsize != len(raw):
        raise pickle.UnpicklingError("An array of another size than it says.")
    array = np.frombuffer(raw, layout).reshape(sides, order="F" if is_fortran else "C")
    return torch.from_numpy(np.ascontiguousarray(array, layout.newbyteorder("=")).reshape(sides).copy())


# A file of PyTorch looked at before PyTorch reads it, since a small one can ask for any amount of memory.
#
# PyTorch itself runs nothing that it does not know (`weights_only`), but it unpacks what is compressed, makes storages and byte
# arrays as long as it is told, and copies a dictionary as often as it is told. Here the records of the zip file are added up, and
# the pickle is run once with nothing but stand-ins in its world.


_PICKLES_OF_OLD_FILES = 5
"""Magic number, protocol, the machine, the content and the names of the storages, one after another."""

_MAX_RANK = 64


class _Stub:
    """Stands for whatever a name means; keeps nothing."""

    def __init__(self, *_: object) -> None:
        """Whatever it was made of is left out."""

    def __setstate__(self, state: object) -> None:
        """So is its state."""


class _Dictionary(dict[Any, Any]):
    """A dictionary with attributes, as a state dict is."""


def check_memory_demand(path: Path) -> None:
    """Raise UnpicklingError, or whatever damaged bytes lead to, unless the file can be read in memory of about its own size."""
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            _check_zip_memory(file, path.stat().st_size)
        else:
            file.seek(0)
            _check_pickle_memory(file)


def _check_zip_memory(file: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED for one in records) or sum(one.file_size for one in records) > size:
            raise pickle.UnpicklingError("Records are compressed, or share their bytes.")
        for record in records:
            if record.filename.endswith(".pkl"):
                _dry_run(archive.read(record))


def _check_pickle_memory(file: IO[bytes]) -> None:
    if _is_tar(file):
        raise pickle.UnpicklingError("PyTorch would unpack it into a folder, as it did in 2017.")
    for _ in range(_PICKLES_OF_OLD_FILES):
        start = file.tell()
        for _instruction in pickletools.genops(file):
            pass
        end = file.tell()
        file.seek(start)
        _dry_run(file.read(end - start))


def _is_tar(file: IO[bytes]) -> bool:
    """Whether PyTorch would take a file that begins as a pickle for a tar archive: the first name in it may be any bytes."""
    try:
        tarfile.open(fileobj=file, mode="r:").close()
    except tarfile.TarError:
        return False
    finally:
        file.seek(0)
    return True


def _dry_run(data: bytes) -> None:
    try:
        check_opcodes(data)
        _DryRunUnpickler(data).load()
    except Exception as error:  # a damaged or hostile pickle can fail in any way its bytes lead to
        raise pickle.UnpicklingError(str(error)) from None


def _rebuild_stub(storage: object, offset: object, size: tuple[int, ...], *_: object) -> _Stub:
    """Stand for a tensor; raises UnpicklingError for one of thousands of dimensions, which take time of their square."""
    if len(size) > _MAX_RANK:
        raise pickle.UnpicklingError("A tensor of too many dimensions.")
    return _Stub()


class _DryRunUnpickler(pickle.Unpickler):
    """Python's unpickler in a world of stand-ins: it imports nothing, and counts what it copies."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        budget = CopyBudget(len(data))
        self._stubs: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): budget.wrap(_Dictionary),
            ("collections", "Counter"): budget.wrap(_Stub),
            ("builtins", "set"): budget.wrap(_Stub),
            ("builtins", "bytearray"): budget.wrap(_Stub),
            ("_codecs", "encode"): budget.wrap(_Stub),
        }
        for rebuild in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            self._stubs["torch._utils", rebuild] = _rebuild_stub
        self._stubs |= {("__builtin__", name): one for (module, name), one in self._stubs.items() if module == "builtins"}

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for any name."""
        return self._stubs.get((module, name), _Stub)

    def persistent_load(self, pid: Any) -> Any:
        """Return a stand-in for a storage, whose length PyTorch compares with its record's."""
        return _Stub()


_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network")
"""Keys under which training scripts keep the state dict beside optimizer and epoch."""
_MAX_REUSE = 4
"""Times that a file's bytes may stand for values on average: tensors that are tied are written once."""
_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


class _OpaqueStub:
    """Stands for what a training script kept beside its tensors (a best score, a history of losses); no code of it is called.

    Where a file would call one of the functions below, it makes one of these instead.
    """

    def __init__(self, *arguments: object) -> None:
        """Whatever it was made of is left out."""

    def __setstate__(self, state: object) -> None:
        """So is its state."""


_OPAQUE_STUBS: list[Any] = [
    (_OpaqueStub, name)
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
        tensors = _find_tensors(read_array_pickle(path), path)
    elif head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        tensors = _find_tensors(_unpickle(path), path)
    elif head[8:9] == b"{" or path.suffix == ".safetensors":
        _, tensors = read_safetensors(path)
    else:
        raise WeightsError(
            f"'{path}' is no weights file that deeplabzoo knows: neither safetensors nor PyTorch, and no known foreign format."
        )
    _check_tensors(tensors, path)
    return {_strip_prefix(name): _to_float32(tensor) for name, tensor in tensors.items()}


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
        with warnings.catch_warnings(), torch.serialization.safe_globals(_OPAQUE_STUBS):
            warnings.simplefilter("ignore")  # remarks on old formats, meant for whoever wrote the file
            check_memory_demand(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"'{path}' holds Python objects or code beside tensors, which are never run, or is damaged; "
            "ask for its state dict alone, best as safetensors."
        ) from None
    except Exception as error:  # a damaged archive or pickle can fail in any way its bytes lead to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"'{path}' is not a whole PyTorch file ({reason}); download or save it again.") from None


def _find_tensors(value: Any, path: Path) -> Mapping[str, torch.Tensor]:
    for key in (None, *_WRAPPERS):
        found = value if key is None else value.get(key) if isinstance(value, Mapping) else None
        if isinstance(found, Mapping) and found and all(isinstance(one, torch.Tensor) for one in found.values()):
            return found
    raise WeightsError(f"'{path}' holds no state dict: expected tensors by name, at its top or under {', '.join(_WRAPPERS)}.")


def _check_tensors(tensors: Mapping[Any, torch.Tensor], path: Path) -> None:
    """Raise WeightsError unless all tensors have names, are plain values in memory, and are no larger than the file.

    A few bytes can stand for any number of values: repeated along a dimension of stride 0, or shared by many tensors.
    """
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not isinstance(name, str) or not plain or tensor.is_complex():
            raise WeightsError(f"'{path}' holds '{name}', which is no plain tensor with a name; ask for a state dict.")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > _MAX_REUSE * path.stat().st_size:
        raise WeightsError(f"'{path}' claims {claimed} bytes of tensors and has not nearly as many; it is not read.")


def _strip_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor.detach()
