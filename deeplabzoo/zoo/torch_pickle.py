"""A file of PyTorch looked at before PyTorch reads it, since a small one can ask for any amount of memory.

PyTorch itself runs nothing that it does not know (`weights_only`), but it unpacks what is compressed, makes storages and byte
arrays as long as it is told, and copies a dictionary as often as it is told. Here the records of the zip file are added up, and
the pickle is run once with nothing but stand-ins in its world.
"""

import io
import pickle
import pickletools
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from deeplabzoo.zoo.pickle_fence import Copies, require_plain

_PICKLES_OF_OLD_FILES = 5
"""Magic number, protocol, the machine, the content and the names of the storages, one after another."""

_MAX_RANK = 64


class _Nothing:
    """Stands for whatever a name means; keeps nothing."""

    def __init__(self, *_: object) -> None:
        """Whatever it was made of is left out."""

    def __setstate__(self, state: object) -> None:
        """So is its state."""


class _Dictionary(dict[Any, Any]):
    """A dictionary with attributes, as a state dict is."""


def require_modest(path: Path) -> None:
    """Raise UnpicklingError, or whatever damaged bytes lead to, unless the file can be read in memory of about its own size."""
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            _require_modest_zip(file, path.stat().st_size)
        else:
            file.seek(0)
            _require_modest_pickles(file)


def _require_modest_zip(file: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED for one in records) or sum(one.file_size for one in records) > size:
            raise pickle.UnpicklingError("Records are compressed, or share their bytes.")
        for record in records:
            if record.filename.endswith(".pkl"):
                _run(archive.read(record))


def _require_modest_pickles(file: IO[bytes]) -> None:
    if _is_tar(file):
        raise pickle.UnpicklingError("PyTorch would unpack it into a folder, as it did in 2017.")
    for _ in range(_PICKLES_OF_OLD_FILES):
        start = file.tell()
        for _instruction in pickletools.genops(file):
            pass
        end = file.tell()
        file.seek(start)
        _run(file.read(end - start))


def _is_tar(file: IO[bytes]) -> bool:
    """Whether PyTorch would take a file that begins as a pickle for a tar archive: the first name in it may be any bytes."""
    try:
        tarfile.open(fileobj=file, mode="r:").close()
    except tarfile.TarError:
        return False
    finally:
        file.seek(0)
    return True


def _run(data: bytes) -> None:
    try:
        require_plain(data)
        _Rehearsal(data).load()
    except Exception as error:  # a damaged or hostile pickle can fail in any way its bytes lead to
        raise pickle.UnpicklingError(str(error)) from None


def _rebuilt(storage: object, offset: object, size: tuple[int, ...], *_: object) -> _Nothing:
    """Stand for a tensor; raises UnpicklingError for one of thousands of dimensions, which take time of their square."""
    if len(size) > _MAX_RANK:
        raise pickle.UnpicklingError("A tensor of too many dimensions.")
    return _Nothing()


class _Rehearsal(pickle.Unpickler):
    """Python's unpickler in a world of stand-ins: it imports nothing, and counts what it copies."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        copies = Copies(len(data))
        self._meanings: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): copies.counted(_Dictionary),
            ("collections", "Counter"): copies.counted(_Nothing),
            ("builtins", "set"): copies.counted(_Nothing),
            ("builtins", "bytearray"): copies.counted(_Nothing),
            ("_codecs", "encode"): copies.counted(_Nothing),
        }
        for rebuild in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            self._meanings["torch._utils", rebuild] = _rebuilt
        self._meanings |= {("__builtin__", name): one for (module, name), one in self._meanings.items() if module == "builtins"}

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for any name."""
        return self._meanings.get((module, name), _Nothing)

    def persistent_load(self, pid: Any) -> Any:
        """Return a stand-in for a storage, whose length PyTorch compares with its record's."""
        return _Nothing()
