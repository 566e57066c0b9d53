"""Files for the user: written whole or not at all, and known to be writable before the long work starts."""

import contextlib
import glob
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

from deeplabzoo.errors import OutputError

if sys.platform != "win32":
    import fcntl

_PARTIAL_NAME = re.compile(r"\.(.*)\.[0-9a-f]{12}\.part", re.DOTALL)
_MAX_NAME_CHARACTERS = 50
"""Of a name: at four bytes each they and the mark stay below 255 bytes."""


def ensure_folder(folder: Path) -> None:
    """Make `folder` if it is missing and prove that a file can be made in it; raises OutputError.

    A trial file is the only honest test: permission bits say nothing on read-only mounts, network drives, or for root.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".deeplabzoo-{secrets.token_hex(6)}"
        trial.open("xb").close()
        trial.unlink()
    except OSError as error:
        raise OutputError(f"Cannot write into '{folder}' ({error.strerror or error}); choose another place.") from None


def remove_partial_files(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left beside it; no other may be writing it now."""
    target = Path(os.path.realpath(path))
    for partial in target.parent.glob(_partial_name(glob.escape(target.name), "?" * 12)):
        partial.unlink(missing_ok=True)


def remove_orphaned_files(folder: Path, names: Collection[str]) -> None:
    """Remove what killed processes left half-written of files of these names in a folder; other processes may be writing there.

    A file that is being written is locked by its process; one that is younger than two seconds may not be locked yet.
    """
    begins = {name[:_MAX_NAME_CHARACTERS] for name in names}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _PARTIAL_NAME.fullmatch(entry.name)
            if found is None or found[1] not in begins or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > 2 and _is_unlocked(entry.path):
                    os.unlink(entry.path)


def _try_lock(file: BinaryIO) -> bool:
    """Lock a file for this process, where the file system can; return False where another process has locked it."""
    if sys.platform == "win32":  # an open file cannot be removed there anyway
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network drive without locks
        return True
    return True


def _is_unlocked(path: str) -> bool:
    with open(path, "rb") as file:
        return _try_lock(file)


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = False) -> None:
    """Call `write` with an open file that takes the place of `path` when it is complete; raises OutputError.

    A reader, or a run that is cut off, never sees half a file. A symbolic link keeps pointing where it did. `durable` also
    flushes the file to the disk before it takes its name, so that a power cut leaves the old or the new file, never a cut one.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(_partial_name(target.name, secrets.token_hex(6)))
    try:
        with partial.open("xb") as file:
            _try_lock(file)
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, target)
        if durable:
            fsync_path(target.parent)
    except OSError as error:
        raise OutputError(f"Cannot write '{path}': {error.strerror or error}.") from None
    finally:
        partial.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _partial_name(name: str, mark: str) -> str:
    """Return the name under which a file is written; a long one is shortened, so that a disk that takes `name` takes this."""
    return f".{name[:_MAX_NAME_CHARACTERS]}.{mark}.part"
