"""Libraries that only some users need: imported where they are used, asked for by name where they are missing."""

import importlib
import importlib.util
from types import ModuleType

from deeplabzoo.errors import DeepLabZooError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Return an optional module; raises DeepLabZooError that names the extra of deeplabzoo which installs it.

    >>> require("no_such_module", extra="export", purpose="writing ONNX")
    Traceback (most recent call last):
    deeplabzoo.errors.DeepLabZooError: writing ONNX needs no_such_module; install it with `pip install "deeplabzoo[export]"`.
    """
    if importlib.util.find_spec(module.split(".")[0]) is None:
        library = module.split(".")[0]
        raise DeepLabZooError(f'{purpose} needs {library}; install it with `pip install "deeplabzoo[{extra}]"`.')
    return importlib.import_module(module)
