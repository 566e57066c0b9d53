"""An interpreter for pickles of tensors and arrays that runs nothing: calls become placeholders, tensors become records.

A pickle is a program that may call any function. Nothing here hands one to `pickle` or `torch.load`: the interpreter reads the
instructions, imports nothing, calls nothing, and copies no value. The few names that tensors and arrays are written with become
records of where their bytes are (`Stored`); every other object becomes a placeholder, so that what a training script keeps
beside its tensors (arguments, a logger, a loss) costs nothing.
"""

import math
import pickle
import pickletools
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from deeplabzoo.errors import WeightsError

_MAX_INSTRUCTIONS = 4_000_000
"""Of one pickle; the state dict of a thousand tensors has some 50 000."""
_MAX_RANK = 64
"""Dimensions of a tensor; what PyTorch does with thousands takes time of their square."""

# The interpreter.

_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Instructions that put their argument on the stack."""
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,  # a set would hash its elements, which can take time that doubles with each level of nesting
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_DATA_MODULES = {
    *("_codecs", "argparse", "array", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions"),
    *("functools", "logging", "numbers", "pathlib", "random", "re", "string", "threading", "time", "types", "typing", "uuid"),
    *("weakref", "zoneinfo"),
}
"""Modules of the standard library whose objects training scripts keep; any other one has no place in a checkpoint."""
_DATA_BUILTINS = {
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int", "list", "object", "range"),
    *("set", "slice", "str", "tuple", "type"),
}
"""`getattr` because mmengine writes methods of its log with it; here it is a placeholder like the others."""
_CODE = {"os", "posix", "nt", "sys", "subprocess", "builtins", "importlib", "ctypes", "pickle", "marshal"}
_CALLS = {
    "call",
    "check_call",
    "check_output",
    "eval",
    "exec",
    "fly",
    "import_module",
    "load",
    "loads",
    "popen",
    "run",
    "system",
}
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_OLD_BUILTINS = {"long": "int", "unicode": "str", "xrange": "range"}
"""Names of Python 2, which `torch.save` still writes: it uses protocol 2."""


class Global:
    """A name that a pickle refers to; never imported."""

    def __init__(self, module: str, name: str) -> None:
        self.label = f"{module}.{name}"


class Placeholder:
    """An object that is not made; `label` is the name of its class or function."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.state: Any = None
        self.items: dict[Any, Any] = {}


class _OtherKey:
    """A dictionary's key that is not text. It is compared by identity, so that nothing of the file is ever hashed."""


class _Dtype:
    """A numpy dtype, as far as it is read: kind and size, and byte order."""

    def __init__(self, name: object) -> None:
        self.name, self.order = name, "<"


class Pickle:
    """One pickle, interpreted: `run` returns its value, made of plain Python values, records of tensors and placeholders."""

    def __init__(self, source: Any, storage: Callable[[Any], Any] | None) -> None:
        self._source, self._storage = source, storage
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._count = 0
        self._copied = 0

    def run(self) -> Any:
        """Return the pickle's value; raises UnpicklingError for a damaged one and one that calls code."""
        try:
            for instruction, argument, _ in pickletools.genops(self._source):
                self._count += 1
                if self._count > _MAX_INSTRUCTIONS:
                    raise pickle.UnpicklingError("it has too many instructions")
                self._step(instruction.name, argument)
            return self._stack.pop()
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # a damaged pickle can fail in any way its bytes lead to
            raise pickle.UnpicklingError(str(error)) from None

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("SETITEM", "SETITEMS"):
            values = self._to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _set_items(stack[-1], values)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [stack.pop()] if name == "APPEND" else self._to_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(values)
        elif name in ("LIST", "FROZENSET"):
            stack.append(self._to_mark())
        elif name == "DICT":
            values = self._to_mark()
            stack.append({})
            _set_items(stack[-1], values)
        elif name == "GLOBAL":
            module, called = argument.split(" ", 1)
            stack.append(_global(module, called))
        elif name == "STACK_GLOBAL":
            called = stack.pop()
            stack.append(_global(stack.pop(), called))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            if name == "NEWOBJ_EX":
                stack.pop()  # the arguments by name
            arguments = stack.pop()
            stack.append(self.call(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            _set_state(stack[-1], state)
        elif name == "BINPERSID" and self._storage is not None:
            stack.append(self._storage(stack.pop()))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise pickle.UnpicklingError(f"it has the instruction {name}, which no pickle of tensors has")

    def _to_mark(self) -> list[Any]:
        at = self._marks.pop()
        values = self._stack[at:]
        del self._stack[at:]
        return values

    def call(self, function: Any, arguments: Any) -> Any:
        """Return what a call stands for: a tensor, an array, a dictionary, or a placeholder."""
        if not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls something with what are no arguments")
        if not isinstance(function, Global):
            raise pickle.UnpicklingError("it calls something that it made, such as a method")
        label = function.label
        if label in _BUILDERS:
            return _BUILDERS[label](self, *arguments)
        if re.fullmatch(r"torch\._utils\._rebuild_\w+|torch\.(cuda\.)?(sparse\.)?\w*Tensor", label):
            return Unreadable(label)
        return Placeholder(label)

    def count_copies(self, length: int) -> None:
        """Count elements that are copied; raises UnpicklingError where they are more than the file's bytes."""
        self._copied += length
        if self._copied > len(self._source):
            raise pickle.UnpicklingError("it copies more than it holds")


def _set_items(target: Any, values: list[Any]) -> None:
    items = target.items if isinstance(target, Placeholder) else target
    if isinstance(items, dict):
        for key, value in zip(values[::2], values[1::2], strict=True):
            items[key if type(key) is str else _OtherKey()] = value


def _set_state(target: Any, state: Any) -> None:
    """BUILD. A state dict's own attributes (`_metadata`) are dropped; they hold no tensor."""
    if isinstance(target, StoredArray):
        _, target.shape, target.dtype, target.is_fortran, target.data = state
    elif isinstance(target, _Dtype):
        target.order = state[1]
    elif isinstance(target, Placeholder):
        target.state = state


def _global(module: Any, name: Any) -> Global:
    if type(module) is not str or type(name) is not str:
        raise pickle.UnpicklingError("it refers to a name that is no text")
    if module == "__builtin__":
        name = _OLD_BUILTINS.get(name, name)
    module = _OLD_MODULES.get(module, module)
    root, *parts = f"{module}.{name}".split(".")
    if root in sys.stdlib_module_names and root != "builtins":
        runs_code = root not in _DATA_MODULES
    else:
        runs_code = root == "builtins" and name not in _DATA_BUILTINS
    if runs_code or parts[-1] in _CALLS or not _CODE.isdisjoint(parts) or any(part.startswith("__") for part in parts):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")
    return Global(module, name)


# Tensors and arrays, as records of where their bytes are.

_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64, "BoolStorage": torch.bool,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "UntypedStorage": torch.uint8,
}  # fmt: skip
_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}
"""Those whose tensors lie in untyped storages."""
_NUMPY_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class Stored(Protocol):
    """A tensor that is still in its file."""

    @property
    def nbytes(self) -> int:
        """Bytes that it will take; known without reading it."""

    def load(self) -> torch.Tensor:
        """Read it; raises UnpicklingError where the file does not hold it as it claims."""


@dataclass
class Unreadable:
    """A tensor of a kind that no DeepLab has (sparse, quantized, nested, without values …)."""

    kind: str
    nbytes: int = 0

    def load(self) -> torch.Tensor:
        """Raise WeightsError."""
        raise WeightsError(self.kind)


@dataclass
class Storage:
    """Bytes that one or several tensors are views of, read once."""

    nbytes: int
    dtype: torch.dtype
    read: Callable[[int], torch.Tensor]
    start: int = 0
    """Where an old file's view of a storage begins, in elements."""
    content: torch.Tensor | None = None

    def load(self) -> torch.Tensor:
        """Read the bytes, once."""
        if self.content is None:
            self.content = self.read(self.nbytes)
        return self.content


@dataclass
class StoredTensor:
    """A view of a storage, as PyTorch writes a tensor."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take, those that share memory included."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """Return the tensor; raises UnpicklingError where it reaches beyond its storage."""
        last = self.offset + sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))
        if 0 not in self.shape and (last + 1) * self.dtype.itemsize > self.storage.nbytes:
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.as_strided(self.storage.load().view(self.dtype), self.shape, self.stride, self.offset)


@dataclass
class StoredArray:
    """A numpy array, as numpy pickles one."""

    shape: Any = ()
    dtype: Any = None
    is_fortran: Any = False
    data: Any = b""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return len(self.data) if isinstance(self.data, bytes | bytearray | str) else 0

    def load(self) -> torch.Tensor:
        """Return the array as a tensor; raises UnpicklingError for other arrays than of numbers, and for a wrong size."""
        if not isinstance(self.dtype, _Dtype) or self.dtype.name not in _NUMPY_DTYPES or self.dtype.order not in "<>|=":
            raise pickle.UnpicklingError("an array holds something else than numbers")
        layout = np.dtype(str(self.dtype.name)).newbyteorder(self.dtype.order)  # type: ignore[arg-type]
        shape = _sizes(self.shape)
        raw = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        if not isinstance(raw, bytes | bytearray) or math.prod(shape) * layout.itemsize != len(raw):
            raise pickle.UnpicklingError("an array has another size than it claims")
        array = np.frombuffer(raw, layout).reshape(shape, order="F" if self.is_fortran else "C")
        return torch.from_numpy(np.ascontiguousarray(array, layout.newbyteorder("=")).reshape(shape).copy())


def _sizes(values: Any) -> tuple[int, ...]:
    if (
        not isinstance(values, tuple)
        or len(values) > _MAX_RANK
        or not all(type(one) is int and 0 <= one < 1 << 48 for one in values)
    ):
        raise pickle.UnpicklingError("a tensor has sizes that cannot be")
    return values


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Stored:
    if isinstance(storage, Unreadable):
        return storage
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor has no storage")
    size, stride, (offset,) = _sizes(size), _sizes(stride), _sizes((offset,))
    if len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor has sizes that cannot be")
    return StoredTensor(storage, dtype or storage.dtype, storage.start + offset, size, stride)


def _typed_tensor(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, marks: Any = None) -> Stored:
    """Return a tensor as written since PyTorch 0.4; `marks` are its conj and neg bits, which change what its bytes mean."""
    return Unreadable("lazily negated") if isinstance(marks, dict) and marks else _tensor(storage, offset, size, stride)


def _untyped_tensor(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> Stored:
    label = getattr(dtype, "label", "no dtype")
    return _tensor(storage, offset, size, stride, _DTYPES[label]) if label in _DTYPES else Unreadable(label)


def _dictionary(run: Pickle, content: Any = (), *_: Any) -> dict[Any, Any]:
    if isinstance(content, dict):
        return content  # shared rather than copied: nothing here changes a value
    made: dict[Any, Any] = {}
    if isinstance(content, list | tuple):
        run.count_copies(len(content))
        _set_items(made, [one for pair in content for one in (pair[0], pair[1])])
    return made


def _encode(run: Pickle, text: Any, encoding: Any = "latin1") -> Any:
    """Bytes as protocol 2 writes them; other encodings take any amount of time, and no array is written with them."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        return Placeholder("_codecs.encode")
    run.count_copies(len(text))
    return text.encode("latin1")


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": lambda _, *arguments: _tensor(*arguments),
    "torch._utils._rebuild_tensor_v2": lambda _, *arguments: _typed_tensor(*arguments),
    "torch._utils._rebuild_tensor_v3": lambda _, *arguments: _untyped_tensor(*arguments),
    "torch._utils._rebuild_parameter": lambda _, data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda _, data, *rest: data,
    "torch.nn.parameter.Parameter": lambda _, data=None, *rest: data,
    "torch._tensor._rebuild_from_type_v2": lambda run, function, kind, arguments, state: run.call(function, arguments),
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": _dictionary,
    "builtins.list": lambda _, content=None: [] if content is None else content,
    "builtins.set": lambda _, content=None: [] if content is None else content,
    "builtins.tuple": lambda _, content=(): content,
    "builtins.bytes": lambda _, *content: Placeholder("builtins.bytes") if content else b"",
    "_codecs.encode": _encode,
    "numpy.dtype": lambda _, name, *rest: _Dtype(name),
    "numpy.ndarray": lambda *_: StoredArray(),
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _BUILDERS[f"{_core}.multiarray._reconstruct"] = lambda *_: StoredArray()
    _BUILDERS[f"{_core}.multiarray.scalar"] = lambda *_: Placeholder("numpy.scalar")
    _BUILDERS[f"{_core}.numeric._frombuffer"] = lambda _, data, dtype, shape, order: StoredArray(
        shape, dtype, order == "F", data
    )


def storage_of(pid: Any, made: dict[str, Any], read: Callable[[str], Callable[[int], torch.Tensor]]) -> Any:
    """Return the storage that a persistent id means; the same one for the same key."""
    if pid[0] == "module":  # an old file's class of a layer, with its source code
        return pid[1]
    tag, kind, key, _location, count, *rest = pid
    if tag != "storage" or type(key) is not str or not isinstance(kind, Global):
        raise pickle.UnpicklingError("it refers to what is no storage")
    (count,) = _sizes((count,))
    if key not in made:
        dtype = _STORAGES.get(kind.label.rpartition(".")[2])
        made[key] = Unreadable(kind.label) if dtype is None else Storage(count * dtype.itemsize, dtype, read(key))
    storage = made[key]
    if rest and rest[0] is not None and isinstance(storage, Storage):
        _, start, _ = rest[0]
        (start,) = _sizes((start,))
        return Storage(storage.nbytes, storage.dtype, lambda _: storage.load(), start)
    return storage
