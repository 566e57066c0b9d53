"""Labels of a picture that is being worked on, beside the output: after a kill or a power cut the finished rows remain.

Two files, `.NAME.rows` with the raw labels and `.NAME.progress` with how many rows of it count. The second is replaced only
after the rows are on the disk, so it never promises what is not there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout

from deeplabzoo.data.images import Labels
from deeplabzoo.errors import OutputError
from deeplabzoo.output import write_atomically

_LONG_NAME_BYTES = 200


class UnfinishedLabels:
    """Rows of labels, appended from the top; `finished` of them survive whatever ends the process.

    `facts` say what the labels were made of (picture, weights, tiles): rows that were made of something else are begun anew.
    Raises OutputError where the files cannot be written or another process is writing them.
    """

    def __init__(self, output: Path, hw: tuple[int, int], dtype: np.dtype[Any], facts: Mapping[str, Any]) -> None:
        self.hw, self.dtype = hw, dtype
        self._rows, self._progress = (_beside(output, end) for end in ("rows", "progress"))
        self._lock = FileLock(_beside(output, "lock"))
        self._identity = hashlib.sha256(json.dumps([hw, str(dtype), dict(facts)], sort_keys=True).encode()).hexdigest()
        self.finished = self._appended = 0

    def __enter__(self) -> Self:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise OutputError(f"Another process is writing labels beside '{self._rows.parent}'; wait for it to end.") from None
        except OSError as error:
            raise OutputError(f"Cannot write '{self._rows}': {error.strerror or error}.") from None
        self.finished = self._promised()
        self._file = self._rows.open("r+b" if self.finished else "w+b")
        self._file.seek(self.finished * self._row_bytes)  # what lies beyond does not count and is written anew
        self._appended = self.finished
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()

    def append(self, labels_HW: Labels) -> None:
        """Add rows below those that are there; they count once `keep` was called."""
        self._file.write(np.ascontiguousarray(labels_HW, self.dtype).tobytes())
        self._appended += len(labels_HW)

    def keep(self) -> None:
        """Make all rows that were appended count, once they are on the disk; raises OutputError where it is full."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"Cannot write '{self._rows}': {error.strerror or error}.") from None
        self.finished = self._appended
        text = json.dumps({"identity": self._identity, "rows": self.finished})
        write_atomically(self._progress, lambda file: file.write(text.encode()))

    def rows(self, top: int, bottom: int) -> Labels:
        """Return rows `top` to `bottom` (without it) that were kept."""
        self._file.seek(top * self._row_bytes)
        data = self._file.read((bottom - top) * self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(bottom - top, self.hw[1])

    def remove(self) -> None:
        """Delete the files, now that the output holds the labels; the progress first, so that it never promises in vain."""
        self._progress.unlink(missing_ok=True)
        self._rows.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)

    @property
    def _row_bytes(self) -> int:
        return self.hw[1] * self.dtype.itemsize

    def _promised(self) -> int:
        try:
            kept = json.loads(self._progress.read_bytes())
            rows = int(kept["rows"]) if kept["identity"] == self._identity else 0
            return rows if self._rows.stat().st_size >= rows * self._row_bytes and 0 <= rows <= self.hw[0] else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def _beside(output: Path, ending: str) -> Path:
    """Return `.NAME.ending` next to the output; a name that would become too long for a disk keeps its beginning and a hash."""
    name = output.name
    if len(os.fsencode(name)) > _LONG_NAME_BYTES:
        name = f"{name[:20]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return output.with_name(f".{name}.{ending}")
