"""Arrays by name out of an HDF5 file that nobody vouches for, with h5py, which is imported on use."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeplabzoo.errors import WeightsError

_MAGIC = b"\x89HDF\r\n\x1a\n"
_MAX_ARRAYS = 10_000


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 does; False for files that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Return the arrays of floating-point numbers by their paths in the file, in float32.

    Links, which may lead to other files, are not followed; arrays must lie in the file as large as they are, so that none grows
    out of a few compressed bytes. Raises WeightsError in one sentence, also where h5py is not installed.
    """
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError:
        raise WeightsError(f"'{path}' is an HDF5 file, which takes h5py: pip install \"deeplabzoo[keras]\".") from None
    try:
        with h5py.File(path, "r") as file:
            names: list[str] = []
            file.visititems(lambda name, found: _note(names, name, is_array=isinstance(found, h5py.Dataset)))
            if len(names) > _MAX_ARRAYS:
                raise WeightsError(f"'{path}' holds more than {_MAX_ARRAYS} arrays, too many for a DeepLab.")
            return {name: _tensor(file[name], name) for name in names if file[name].dtype.kind == "f"}
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can fail in any way its bytes lead the library to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"'{path}' is not a whole HDF5 file ({reason}); download or save it again.") from None


def _note(names: list[str], name: str, *, is_array: bool) -> bool | None:
    """Add an array's name; anything but None ends the visit."""
    if is_array:
        names.append(name)
    return True if len(names) > _MAX_ARRAYS else None


def _tensor(array: Any, name: str) -> Tensor:
    if array.external or array.is_virtual or array.id.get_storage_size() < array.nbytes:
        raise WeightsError(f"Array '{name}' of the HDF5 file is compressed, incomplete or kept elsewhere; save it plainly.")
    values = torch.from_numpy(np.asarray(array, np.float32))
    if not torch.isfinite(values).all():
        raise WeightsError(f"Array '{name}' of the HDF5 file holds values that are not finite; it cannot be used.")
    return values
