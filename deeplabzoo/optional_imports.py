"""Libraries that only some users need: imported where they are used, asked for by name where they are missing, kept quiet."""

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

from deeplabzoo.errors import DeepLabZooError

_TELEMETRY_MODULES = {"openvino": "openvino_telemetry", "nncf": "openvino_telemetry"}
"""Libraries that tell their makers over the network when they are imported and used, and the module they do it by."""


def require_module(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Return an optional module; raises DeepLabZooError that names the extra of deeplabzoo which installs it.

    >>> require_module("no_such_module", extra="export", purpose="writing ONNX")
    Traceback (most recent call last):
    deeplabzoo.errors.DeepLabZooError: writing ONNX needs no_such_module; install it with `pip install "deeplabzoo[export]"`.
    """
    library = module.split(".")[0]
    if importlib.util.find_spec(library) is None:
        raise DeepLabZooError(f'{purpose} needs {library}; install it with `pip install "deeplabzoo[{extra}]"`.')
    return import_without_telemetry(module)


def import_without_telemetry(module: str) -> ModuleType:
    """Import a module of a library with its usage telemetry disabled.

    OpenVINO and NNCF work without the module that they report by, so it is made unfindable in this process, unless a program
    has imported it before. Ray reads a variable when it starts a cluster, which a user may have set otherwise; ONNX Runtime has
    a function, which matters on Windows. Raises ImportError.
    """
    library = module.split(".")[0]
    reporter = _TELEMETRY_MODULES.get(library)
    if reporter is not None and reporter not in sys.modules:
        sys.modules[reporter] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    if library == "ray":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    found = importlib.import_module(module)
    if library == "onnxruntime":
        runtime: Any = sys.modules[library]
        runtime.disable_telemetry_events()
    return found
