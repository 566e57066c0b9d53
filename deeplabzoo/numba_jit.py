"""Loops that no array library runs in one pass, compiled by numba where it is installed (extra `fast`).

numba is imported on first use, about half a second; a loop is compiled once per machine, seconds, and read from disk in later
processes. Compiled loops hold no Python lock, so that plain threads run them side by side: numba's own threads are not used,
as one of their layers may not be entered from two threads at once.
"""

import functools
import importlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from deeplabzoo.log import logger

Loop = TypeVar("Loop", bound=Callable[..., Any])

_import_lock = threading.RLock()


def numba_available() -> bool:
    """Whether loops can be compiled here; if not, this is logged once."""
    with _import_lock:
        return _import_numba() is not None


@functools.cache
def _import_numba() -> Any:
    try:
        return importlib.import_module("numba")
    except ImportError as error:  # missing, or at odds with the numpy that is there
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) and error.name == "numba" else f"fails ({error})"
        logger.info(
            f'numba {reason}; labels, scores, training input come without it, equal, slower (pip install "deeplabzoo[fast]").'
        )
        return None


@functools.cache
def cached_njit(loop: Loop) -> Loop:
    """Compile a function of arrays and numbers on its first call, and keep the machine code on disk where a disk allows it."""
    return _CachedLoop(loop)  # type: ignore[return-value]


def inner_njit(loop: Loop) -> Loop:
    """Compile a function that only compiled functions call."""
    function: Loop = _import_numba().njit(nogil=True, error_model="numpy")(loop)
    return function


class _CachedLoop:
    """A loop that is compiled in memory where its machine code cannot be kept: a read-only or full disk is no error."""

    def __init__(self, loop: Callable[..., Any]) -> None:
        self._loop = loop
        try:
            self._run = _import_numba().njit(nogil=True, error_model="numpy", cache=True)(loop)
        except RuntimeError:  # numba found no folder to write to
            self._run = inner_njit(loop)

    def __call__(self, *values: Any) -> Any:
        try:
            return self._run(*values)
        except OSError:  # of the cache: a loop over arrays opens no file
            self._run = inner_njit(self._loop)
            return self._run(*values)
