"""What every parser promises about any bytes at all, watched from outside while it reads them.

It returns, or raises one of our own errors whose message is one printable sentence. It runs no code of the input, starts no
process, opens no connection, and opens no file outside the input's folder but those of Python and of this package. It takes no
more processor time and no more memory than its target says.
"""

import contextlib
import functools
import importlib
import os
import resource
import signal
import site
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from deeplabzoo.errors import DeepLabZooError

LONGEST_SENTENCE = 2000
"""Characters; the longest list of names that a message holds has some 900."""
_REPOSITORY = Path(__file__).resolve().parents[3]
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "os.startfile", "os.kill", "os.putenv", "os.link",
    "os.symlink", "os.truncate", "subprocess.", "socket.", "ctypes.dlopen",
    "ctypes.call_function", "pickle.find_class", "webbrowser.", "urllib.", "sqlite3.", "ftplib.", "smtplib.",
)  # fmt: skip
"""Beginnings of the names of audit events (Python's table of them) that no parser has a reason for."""
_CHANGING = ("os.chmod", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.")
"""Those that a parser which unpacks has a reason for, within its folder."""


@dataclass(frozen=True)
class Target:
    """One parser: it reads the file at a path, alone in its folder."""

    name: str
    parse: Callable[[Path], object]
    seeds: Callable[[], Sequence[bytes]]
    """Inputs to begin with, most of them right ones."""
    words: tuple[bytes, ...] = ()
    """What the format is made of, for mutations."""
    file_name: str = "input"
    is_json: bool = False
    """Whether to change values of the parsed tree as well as bytes."""
    max_bytes: int = 1 << 16
    """Longest input tried."""
    seconds: float = 2.0
    """Processor time stated for one input, and for each MiB of it."""
    mebibytes: int = 256
    """Memory stated for one input, beyond what was in use before."""
    writes: bool = False
    """Whether the parser unpacks into its folder; what it made is taken away by the target."""


@dataclass(frozen=True)
class Broken:
    """One promise that an input broke."""

    what: str
    where: str
    """The innermost lines of ours, or the event; equal ones count as one defect."""


class _StoppedError(BaseException):
    """Ends a parser from a signal or an audit event, past any `except Exception` of its."""


class Watch:
    """Watches parsers in this process; `the_watch` gives the only one, since audit hooks cannot be taken away again."""

    def __init__(self) -> None:
        self._folder: str | None = None
        self._writes = False
        self.outcome: BaseException | None = None
        """What the last input ended in; None where it was read."""
        self._seen: list[str] = []
        self._readable = tuple(
            {*map(os.path.realpath, (sys.prefix, sys.base_prefix, *site.getsitepackages())), str(_REPOSITORY)}
        )
        for library in ("h5py", "timm", "torch"):  # what they do while they are imported is not the parser's doing
            with contextlib.suppress(ImportError):
                importlib.import_module(library)
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._folder is None:
            return
        if event.startswith(_FORBIDDEN):
            self._refuse(f"{event} {arguments!r:.200}")
        paths = [os.fsdecode(one) for one in arguments if isinstance(one, str | bytes)]
        if event.startswith(_CHANGING) and not (self._writes and all(map(self._is_inside, paths))):
            self._refuse(f"{event} {arguments!r:.200}")
        if (
            event == "open"
            and isinstance(arguments[0], str | bytes)
            and not self._is_inside(paths[0])
            and paths[0] != os.devnull
        ):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
            if writes or not os.path.realpath(paths[0]).startswith((*self._readable, "/proc/", "/dev/urandom")):
                self._refuse(f"open {paths[0]!r} to {'write' if writes else 'read'}")

    def _is_inside(self, path: str) -> bool:
        return f"{os.path.realpath(path)}{os.sep}".startswith(f"{self._folder}{os.sep}")

    def _refuse(self, what: str) -> None:
        self._seen.append(what)
        raise _StoppedError(what)

    def run(self, target: Target, data: bytes, folder: Path) -> Broken | None:
        """Let the target read `data`; returns the promise that was broken, if one was."""
        path = folder / target.file_name
        path.write_bytes(data)
        self._seen.clear()
        before, started = _resident(), time.process_time()
        self.outcome = None
        self._writes = target.writes
        self._folder = os.path.realpath(folder)
        try:
            stated = target.seconds * (1 + len(data) / (1 << 20))
            with contextlib.chdir(folder), warnings.catch_warnings(), _alarm(4 * stated):
                warnings.simplefilter("error")
                target.parse(path)
        except BaseException as error:
            self.outcome = error
        finally:
            self._folder = None
        seconds, grown = time.process_time() - started, (_peak() - before) >> 20
        found = [one.name for one in folder.iterdir() if one.name != target.file_name]
        if self._seen:
            return Broken(f"did {self._seen[0]}", self._seen[0].split()[0])
        if found:
            return Broken(f"wrote {found}", "folder")
        if self.outcome is not None and (broken := _judged(self.outcome)) is not None:
            return broken
        if seconds > stated:
            return Broken(f"took {seconds:.1f} s, {stated:.1f} s are stated", "seconds")
        if grown > target.mebibytes:
            return Broken(f"took {grown} MiB, {target.mebibytes} MiB are stated", "memory")
        return None


@functools.cache
def the_watch() -> Watch:
    """Return the watch of this process."""
    return Watch()


@contextmanager
def limited_memory(mebibytes: int) -> Iterator[None]:
    """Let this process take so much more address space than it has, so that a bomb ends here and not with the machine."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (mebibytes << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _judged(outcome: BaseException) -> Broken | None:
    if not isinstance(outcome, DeepLabZooError):
        if isinstance(outcome, KeyboardInterrupt):
            raise outcome
        return Broken(f"raised {type(outcome).__name__}: {outcome!s:.300}", _place(outcome))
    sentence = str(outcome)
    if not sentence.isprintable() or not sentence:
        return Broken(f"said what is not printable: {sentence!r:.300}", f"unprintable {_place(outcome)}")
    if len(sentence) > LONGEST_SENTENCE:
        return Broken(f"said {len(sentence)} characters: {sentence:.200}", f"long {_place(outcome)}")
    return None


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}deeplabzoo{os.sep}" in frame.filename] or list(frames)
    last = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(ours[-2:]))
    return f"{type(error).__name__} at {last}"


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Stop the work after so much processor time of this process; a process that stands still on a busy machine is not late."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _StoppedError(f"still at work after {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _resident() -> int:
    """Return the memory in use in bytes, and begin a new peak where the system lets a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0
