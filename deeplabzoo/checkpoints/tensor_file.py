"""Weights files opened without running code: safetensors, PyTorch's zip and older form, pickles of numpy arrays.

`open_contents` returns the tensors by full name, still unread, and what else the file holds; bytes are read for the tensors
that are wanted, and no more of them than the file has.
"""

import mmap
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from deeplabzoo.checkpoints.native import read_safetensors
from deeplabzoo.checkpoints.safe_pickle import (
    Pickle,
    Placeholder,
    Storage,
    Stored,
    StoredArray,
    StoredTensor,
    Unreadable,
    storage_of,
)
from deeplabzoo.errors import WeightsError

_MAX_DEPTH = 8
"""Of dictionaries within dictionaries that are searched for tensors."""
_MAX_NAMES = 16 << 20
"""Characters of all tensors' full names; a model of a thousand tensors has some 100 000."""
_MAX_REUSE = 4
"""Times that a file's bytes may stand for values on average: tied tensors are written once."""


class _OtherFormatError(Exception):
    """A file of a kind that holds no state dict; its text follows the file's name in a sentence."""


# Files: PyTorch's zip, PyTorch's form from before 1.6, a plain pickle.

_MAGIC = 0x1950A86A20F9469CFC6C
"""The number that a PyTorch file from before 1.6 begins with."""
_MAGIC_BYTES = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The same, as its pickle writes it."""


def _read_bytes(file: IO[bytes], begin: int, count: int) -> torch.Tensor:
    tensor = torch.empty(count, dtype=torch.uint8)
    into = tensor.numpy().data
    file.seek(begin)
    while into and (done := file.readinto(into)):  # type: ignore[attr-defined]
        into = into[done:]
    if into:
        raise pickle.UnpicklingError("bytes of a tensor are missing")
    return tensor


def _read_zip(file: IO[bytes], size: int) -> Any:
    """Return the value of the pickle in PyTorch's zip. Its directory is read once, by Python, and PyTorch never sees it."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    names = {one.filename: one for one in records}
    pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    if any(name.rpartition("/")[2] == "constants.pkl" or "/code/" in f"/{name}" for name in names):
        raise _OtherFormatError(
            "is a TorchScript archive, not a state dict; save one with torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
        )
    if any(name.endswith((".pt2", "archive_format", "serialized_exported_program.json")) for name in names):
        raise _OtherFormatError(
            "is an exported program (torch.export), not a state dict; save the model's state_dict() instead"
        )
    if len(pickles) != 1 or len(names) != len(records):
        raise zipfile.BadZipFile("it is a zip without exactly one data.pkl, or has a name twice")
    if any(one.compress_type != zipfile.ZIP_STORED for one in records) or sum(one.file_size for one in records) > size:
        raise pickle.UnpicklingError("records are compressed, or share their bytes")
    folder = pickles[0].removesuffix("data.pkl")
    order = names.get(f"{folder}byteorder")
    swapped = order is not None and _record(file, order, size)[1] and _whole(file, order, size) == b"big"

    def read(key: str) -> Callable[[int], torch.Tensor]:
        record = names.get(f"{folder}data/{key}")
        if record is None:
            raise pickle.UnpicklingError(f"it has no record data/{key}")
        begin, length = _record(file, record, size)

        def load(count: int) -> torch.Tensor:
            if count > length:
                raise pickle.UnpicklingError("a storage is longer than its record")
            return _read_bytes(file, begin, count)

        return load

    made: dict[str, Any] = {}
    value = Pickle(_whole(file, names[pickles[0]], size), lambda pid: storage_of(pid, made, read)).run()
    if swapped:
        for storage in made.values():
            _swap(storage)
    return value


def _swap(storage: Any) -> None:
    if isinstance(storage, Storage) and storage.dtype.itemsize > 1:
        read, width = storage.read, storage.dtype.itemsize
        storage.read = lambda count: read(count).reshape(-1, width).flip(1).reshape(-1)


def _record(file: IO[bytes], record: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Return where a record's bytes begin, and how many they are. PyTorch may have written no checksum, so none is compared."""
    file.seek(record.header_offset)
    head = file.read(30)
    begin = record.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if head[:4] != b"PK\x03\x04" or begin + record.file_size > size:
        raise zipfile.BadZipFile("a record lies outside the file")
    return begin, record.file_size


def _whole(file: IO[bytes], record: zipfile.ZipInfo, size: int) -> bytes:
    begin, length = _record(file, record, size)
    file.seek(begin)
    return file.read(length)


def _read_old(file: IO[bytes]) -> Any:
    """Return the value of a PyTorch file from before 1.6: five pickles, then the storages one after another."""
    places: dict[str, tuple[int, int]] = {}
    made: dict[str, Any] = {}

    def read(key: str) -> Callable[[int], torch.Tensor]:
        def load(count: int) -> torch.Tensor:
            begin, length = places.get(key, (0, 0))
            if count > length:
                raise pickle.UnpicklingError("a storage is missing, or longer than the file has it")
            return _read_bytes(file, begin, count)

        return load

    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        if Pickle(whole, None).run() != _MAGIC:
            raise pickle.UnpicklingError("it does not begin as PyTorch's files do")
        for _ in ("protocol", "system"):
            Pickle(whole, None).run()
        value = Pickle(whole, lambda pid: storage_of(pid, made, read)).run()
        keys = Pickle(whole, None).run()
        at = whole.tell()
        for key in keys:
            storage = made.get(key) if type(key) is str else None
            width = storage.dtype.itemsize if isinstance(storage, Storage) else 0
            length = int.from_bytes(whole[at : at + 8], "little") * width
            if not width or at + 8 + length > len(whole):
                break  # of an unknown kind, or cut: what comes after it cannot be found
            places[key] = at + 8, length
            at += 8 + length
    return value


def _read_plain(file: IO[bytes]) -> Any:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        return Pickle(whole, None).run()


# What a file holds, with its tensors under full names.


@dataclass
class Contents:
    """The tensors of a file by full name (`state_dict.encoder.conv1.weight`), mostly still unread, and what else it holds."""

    path: Path
    tensors: dict[str, Stored | Tensor]
    value: Any = None
    """The file's whole value, for facts such as class names."""
    objects: dict[str, str] = field(default_factory=dict)
    """Name of each object that is not read -> its class."""
    file: IO[bytes] | None = None

    def __enter__(self) -> "Contents":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def load(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Return some tensors (`names`: full name -> new name), floating ones in float32; raises WeightsError."""
        wanted = {new: self.tensors[name] for name, new in names.items()}
        for new, one in wanted.items():
            if isinstance(one, Unreadable) or (isinstance(one, StoredTensor) and one.dtype.is_complex):
                kind = one.kind if isinstance(one, Unreadable) else "complex"
                raise WeightsError(
                    f"'{self.path}' holds '{new}', which is no plain tensor with a name ({kind}); ask for a state dict."
                )
        claimed = sum(one.nbytes for one in wanted.values() if not isinstance(one, Tensor))
        if claimed > _MAX_REUSE * self.path.stat().st_size:
            raise WeightsError(f"'{self.path}' claims {claimed} bytes of tensors and has not nearly as many; it is not read.")
        with _errors(self.path):
            return {new: _float32(one if isinstance(one, Tensor) else one.load()) for new, one in wanted.items()}


def _float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def open_contents(path: Path) -> Contents:
    """Open a `.safetensors`, PyTorch or pickled numpy file, recognised by its structure; close it with a `with` block.

    Raises WeightsError, in one sentence, for a file that is empty, damaged, of another kind, or holds no tensors by name.
    """
    head, size = _first_bytes(path)
    if path.suffix == ".safetensors" or is_safetensors(head, size):
        return Contents(path, dict(read_safetensors(path)[1]))
    is_zip = head[:4] == b"PK\x03\x04"
    if not is_zip and head[:1] != b"\x80":
        raise WeightsError(
            f"'{path}' is no weights file that deeplabzoo knows: neither safetensors nor PyTorch, and no known foreign format."
        )
    file = path.open("rb", buffering=0)
    try:
        with _errors(path):
            value = _read_zip(file, size) if is_zip else _read_old(file) if _MAGIC_BYTES in head else _read_plain(file)
            return _find_tensors(Contents(path, {}, value, file=file))
    except BaseException:
        file.close()
        raise


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or hostile file leads to into one sentence."""
    try:
        yield
    except WeightsError:
        raise
    except _OtherFormatError as error:
        raise WeightsError(f"'{path}' {error}.") from None
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"'{path}' holds Python objects or code beside tensors, which are never run, or is damaged ({error}); "
            "ask for its state dict alone, best as safetensors."
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"'{path}' is not a whole PyTorch file ({reason}); download or save it again.") from None


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` has the structure of safetensors: a length, then that much JSON.

    No single byte decides: the length may begin with the first byte of a pickle, a zip, an archive or a protocol buffer.
    """
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def has_safetensors_structure(path: Path) -> bool:
    """Whether a file has the structure of safetensors; False for files that cannot be read."""
    try:
        with path.open("rb") as file:
            return is_safetensors(file.read(9), path.stat().st_size)
    except OSError:
        return False


def _first_bytes(path: Path) -> tuple[bytes, int]:
    if path.is_dir():
        raise WeightsError(f"'{path}' is a folder; name the weights file in it.")
    try:
        with path.open("rb") as file:
            head, size = file.read(32), path.stat().st_size
    except FileNotFoundError:
        raise WeightsError(f"There is no weights file '{path}'.") from None
    except OSError as error:
        raise WeightsError(f"'{path}' cannot be read: {error.strerror}.") from None
    if not head:
        raise WeightsError(f"'{path}' is empty; download or save it again.")
    return head, size


def _find_tensors(contents: Contents) -> Contents:
    """Fill in the tensors by full name, and the objects that are left out; raises WeightsError where there is no tensor."""
    unnamed, length, seen = False, 0, set[int]()
    queue: list[tuple[str, Any, int]] = [("", contents.value, 0)]
    modules = []
    while queue:
        prefix, value, depth = queue.pop()
        if isinstance(value, Placeholder) and isinstance(value.state, dict) and "_modules" in value.state:
            modules.append(value.label)
        items = value.items if isinstance(value, Placeholder) else value
        if not isinstance(items, dict) or id(items) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(items))
        for key, one in items.items():
            if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], StoredArray):
                one = one[1]  # a tensor of Paddle's: its name and its array
            is_tensor = isinstance(one, StoredTensor | StoredArray | Unreadable)
            if not isinstance(key, str):
                unnamed |= is_tensor and depth == 0
                continue
            name = f"{prefix}{key}"
            if isinstance(one, Placeholder):
                contents.objects[name[:100]] = one.label
            if isinstance(one, dict | Placeholder) or is_tensor:
                length += len(name)
            if length > _MAX_NAMES:
                raise pickle.UnpicklingError("its names are too long")
            if is_tensor and contents.tensors.setdefault(name, one) is not one:
                raise pickle.UnpicklingError(f"it has two tensors called {name[:100]}")
            if isinstance(one, dict | Placeholder):
                queue.append((f"{name}.", one, depth + 1))
    if contents.tensors:
        return contents
    if unnamed:
        raise _OtherFormatError("holds tensors under keys that are no plain tensor with a name; ask for a state dict")
    if modules:
        raise _OtherFormatError(
            f"is a whole pickled model ({modules[0]}), whose code is never run; where that code is installed, save its tensors "
            "alone: torch.save(torch.load(FILE, weights_only=False).state_dict(), OTHER)"
        )
    if isinstance(contents.value, Placeholder | StoredTensor | StoredArray | Unreadable) or not isinstance(
        contents.value, dict
    ):
        raise pickle.UnpicklingError("it is no dictionary of tensors")
    raise _OtherFormatError(
        "holds no state dict: expected tensors by name, at its top or under a key such as state_dict or model"
    )
