"""The hash of a file that did not change is not computed again: once in a process, and once at all for what we downloaded.

A remembered hash counts only while path, size, inode, device and both times of change are what they were; that of the inode
cannot be set back by a program that alters the bytes. What changed in the last seconds is always read, since clocks of file
systems tick coarsely. Notes that outlive the process lie in our own cache folder, speak of files in that folder alone, and are
believed only where they are ours.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from deeplabzoo.errors import OutputError
from deeplabzoo.output import write_atomically
from deeplabzoo.zoo.checksum import sha256_of

_FRESH_NS = 2_000_000_000
_FOLDER = "hashes"
"""Of the notes, below the cache folder."""
_Facts = tuple[int, ...]

_known: dict[tuple[str, _Facts], str] = {}


def known_sha256(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits; `cache` is our folder of downloads, which need not exist."""
    path = Path(os.path.realpath(path))
    facts = _facts(path)
    if time.time_ns() - max(facts[-2:]) < _FRESH_NS:
        return sha256_of(path)
    key = (str(path), facts)
    if key in _known:
        return _known[key]
    cache = Path(os.path.realpath(cache))
    note = cache / _FOLDER / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    is_ours = path.is_relative_to(cache)
    sha256 = _noted(note, facts) if is_ours else ""
    if not sha256:
        sha256 = sha256_of(path)
        if _facts(path) != facts:
            return sha256  # it changed while it was read: of which state this is nobody knows
        if is_ours:
            _write(note, facts, sha256)
    _known[key] = sha256
    return sha256


def _facts(path: Path) -> _Facts:
    status = path.stat()
    return (status.st_size, status.st_ino, status.st_dev, status.st_mtime_ns, status.st_ctime_ns)


def _noted(note: Path, facts: _Facts) -> str:
    """Return what a note says about a file of these facts; empty where it says nothing or is not ours."""
    try:
        if not hasattr(os, "getuid") or note.lstat().st_uid != os.getuid():
            return ""
        found = json.loads(note.read_bytes())
        sha256 = str(found["sha256"])
        return sha256 if tuple(found["facts"]) == facts and len(sha256) == 64 else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _write(note: Path, facts: _Facts, sha256: str) -> None:
    text = json.dumps({"facts": facts, "sha256": sha256})
    with contextlib.suppress(OSError, OutputError):  # a cache that is only read works, and is hashed each time
        note.parent.mkdir(exist_ok=True)
        write_atomically(note, lambda file: file.write(text.encode()))
