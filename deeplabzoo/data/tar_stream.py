"""The inside of a tar archive as a file that reads no more at once, and leads no further, than an honest archive needs."""

import bz2
import gzip
import tarfile
from pathlib import Path
from typing import IO

_MAX_READ = 16 << 20
"""Most bytes that tarfile may ask for at once: it reads the long names and extra headers of an entry whole."""


class TarStream:
    """A tar file, unpacked as it is read; raises ReadError beyond `max_bytes` of it, or for too much at once.

    A megabyte of gzip may hold a header of a gigabyte, or hours of zeros before the first name that is wanted.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._file, self._max_bytes = _opened(path), max_bytes

    def read(self, count: int = -1) -> bytes:
        """Read at most `count` bytes, which must be given."""
        if not 0 <= count <= _MAX_READ:
            raise tarfile.ReadError("a header in it is too long")
        return self._file.read(count)

    def tell(self) -> int:
        """Return the position in the unpacked tar."""
        return self._file.tell()

    def seek(self, position: int) -> int:
        """Go on at a position, which is read up to where the file is compressed."""
        if position > self._max_bytes:
            raise tarfile.ReadError(f"it goes on beyond {self._max_bytes} bytes")
        return self._file.seek(position)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _opened(path: Path) -> IO[bytes]:
    """Open a file, through gzip or bzip2 where it begins as they do; xz may take gigabytes of memory to unpack a few bytes."""
    with path.open("rb") as file:
        head = file.read(3)
    if head[:2] == b"\x1f\x8b":
        return gzip.open(path)  # type: ignore[return-value]
    return bz2.open(path) if head == b"BZh" else path.open("rb")
