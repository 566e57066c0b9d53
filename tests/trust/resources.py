"""What a process holds at this moment, as Linux tells it: memory, open files, threads, Python's objects."""

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_MB = 1e6


@dataclass(frozen=True)
class Held:
    """A process's resources at one moment."""

    resident_mb: float
    files: int
    threads: int
    objects: int
    """Blocks that Python's allocator has given out; 0 for another process."""

    @classmethod
    def now(cls) -> Self:
        """Measure this process, after what is garbage has gone."""
        gc.collect()
        return cls.of(os.getpid(), sys.getallocatedblocks())

    @classmethod
    def of(cls, process: int, objects: int = 0) -> Self:
        """Measure any process of this user."""
        place = Path("/proc", str(process))
        pages = int((place / "statm").read_text().split()[1])
        files = sum(1 for one in (place / "fd").iterdir() if not os.fspath(one).endswith("/proc"))
        threads = sum(1 for _ in (place / "task").iterdir())
        return cls(round(pages * os.sysconf("SC_PAGE_SIZE") / _MB, 1), files, threads, objects)
