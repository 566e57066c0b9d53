"""The frozen graph of TensorFlow's DeepLab zoo, out of its `.tar.gz` archives or as the `.pb` that lies in them.

An archive is read from front to back in memory and nothing is written, so the names in it lead nowhere; the graph's size and
what is unpacked on the way to it are bounded.
"""

import gzip
import zlib
from pathlib import Path, PurePosixPath

from deeplabzoo.errors import WeightsError

MAX_GRAPH_BYTES = 1 << 29
MAX_UNPACKED_BYTES = 1 << 31
GRAPH_FILE = "frozen_inference_graph.pb"
_GZIP, _TAR, _TAR_AT = b"\x1f\x8b", b"ustar", 257
_BLOCK = 512  # of a tar archive
_CHUNK = 1 << 20


def is_archive(path: Path) -> bool:
    """Whether a file is a gzipped tar archive; False for files that cannot be read."""
    try:
        with path.open("rb") as file:
            if file.read(2) != _GZIP:
                return False
        with gzip.open(path) as unpacked:
            return unpacked.read(_BLOCK)[_TAR_AT:].startswith(_TAR)
    except (OSError, EOFError, zlib.error):
        return False


def is_graph(path: Path) -> bool:
    """Whether a file begins as a serialised GraphDef does: with a node, its name and its kind."""
    try:
        with path.open("rb") as file:
            head = file.read(_BLOCK)
    except OSError:
        return False
    body = head[1:].lstrip(bytes(range(0x80, 0x100)))[1:]  # past the node's length: bytes with the top bit, and a last one
    if head[:1] != b"\x0a" or body[:1] != b"\x0a" or len(body) < 2:
        return False
    name, kind = body[2 : 2 + body[1]], body[2 + body[1] :]
    if kind[:1] != b"\x12" or len(kind) < 2:
        return False
    op = kind[2 : 2 + kind[1]]
    return len(op) == kind[1] > 0 and op.isalnum() and name.isascii() and name.decode("ascii").isprintable()


def read_graph(path: Path) -> bytes:
    """Return the bytes of the frozen graph; raises WeightsError in one sentence where there is none that can be read."""
    try:
        if not is_archive(path):
            if path.stat().st_size > MAX_GRAPH_BYTES:
                raise _too_large(path)
            return path.read_bytes()
        with gzip.open(path) as unpacked:
            return _member(unpacked, path)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise WeightsError(f"'{path}' is a damaged archive, or ends too early; download it again.") from None
    except OSError as error:
        raise WeightsError(f"'{path}' cannot be read: {error.strerror or error}.") from None


def _member(unpacked: gzip.GzipFile, path: Path) -> bytes:
    """Return the graph's bytes out of a tar archive, whose headers give a name and a size in octal digits."""
    left = MAX_UNPACKED_BYTES
    while True:
        header = unpacked.read(_BLOCK)
        if len(header) < _BLOCK or not header.strip(b"\0"):
            raise WeightsError(
                f"'{path}' holds no {GRAPH_FILE}; of TensorFlow's zoo only archives of segmentation networks do, and "
                "checkpoints alone are not read."
            )
        try:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError:
            raise WeightsError(f"'{path}' is a damaged archive; download it again.") from None
        is_file = header[156:157] in (b"0", b"\0")
        if is_file and PurePosixPath(header[:100].rstrip(b"\0").decode("latin-1")).name == GRAPH_FILE:
            if size > MAX_GRAPH_BYTES:
                raise _too_large(path)
            graph = unpacked.read(size)
            if len(graph) < size:
                raise EOFError
            return graph
        left -= _skip(unpacked, min(size + -size % _BLOCK, left))
        left -= _BLOCK
        if left <= 0:
            raise WeightsError(f"'{path}' unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB before any {GRAPH_FILE}.")


def _skip(unpacked: gzip.GzipFile, count: int) -> int:
    left = count
    while left > 0:
        chunk = unpacked.read(min(left, _CHUNK))
        if not chunk:
            raise EOFError
        left -= len(chunk)
    return count


def _too_large(path: Path) -> WeightsError:
    return WeightsError(f"The graph in '{path}' has more than {MAX_GRAPH_BYTES >> 20} MiB, too many for a DeepLab.")
