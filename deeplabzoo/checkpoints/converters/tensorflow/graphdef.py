"""A TensorFlow graph (GraphDef) as nodes and constants: the part of its protobuf messages that frozen models use.

What a constant may grow to in memory is bounded by the size of the file.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from deeplabzoo.errors import WeightsError

# Protobuf's wire format. Messages are read with a fixed depth, and every length is checked against the bytes that are there.

MAX_FIELDS = 1_000_000
"""Fields read from one file at most; the graphs of published models have some fifty thousands."""
_MAX_VARINT_BYTES = 10


def damaged_protobuf(what: str) -> WeightsError:
    """Return the error for a file that breaks its own format."""
    return WeightsError(f"The TensorFlow graph is damaged: {what}; download it again.")


@dataclass(frozen=True)
class Field:
    """One field of a message: its number and its value, a number or bytes."""

    number: int
    value: int | memoryview

    @property
    def data(self) -> memoryview:
        """The bytes of a string, a message or packed numbers; raises WeightsError for a number."""
        if isinstance(self.value, int):
            raise damaged_protobuf(f"its field {self.number} holds a number where bytes were expected")
        return self.value

    @property
    def integer(self) -> int:
        """The number, as a signed 64-bit integer; raises WeightsError for bytes."""
        if not isinstance(self.value, int):
            raise damaged_protobuf(f"its field {self.number} holds bytes where a number was expected")
        return self.value - (1 << 64) if self.value >= 1 << 63 else self.value


class ReadBudget:
    """Counts what is read from one file, so that a small file that is made of millions of empty parts takes no minutes."""

    def __init__(self) -> None:
        self._left = MAX_FIELDS

    def consume(self) -> None:
        """Count one field or number."""
        self._left -= 1
        if self._left < 0:
            raise damaged_protobuf(f"it has more than {MAX_FIELDS} fields")


def fields(message: memoryview, budget: ReadBudget) -> Iterator[Field]:
    """Yield the fields of one message; raises WeightsError where its bytes are no protobuf message."""
    at = 0
    while at < len(message):
        budget.consume()
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield Field(number, value)
            continue
        if kind == 2:
            length, at = _varint(message, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise damaged_protobuf(f"byte {at} begins a field of unknown kind")
        if length > len(message) - at:
            raise damaged_protobuf("a field is longer than what is left of its message")
        yield Field(number, message[at : at + length])
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(message[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & (1 << 64) - 1, at + index + 1
    raise damaged_protobuf("a number in it does not end")


def utf8(data: memoryview) -> str:
    """Return a string; raises WeightsError for bytes that are none."""
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError:
        raise damaged_protobuf("a name in it is no text") from None


def integers(message: memoryview, number: int, budget: ReadBudget) -> tuple[int, ...]:
    """Return repeated whole numbers, packed or one by one."""
    found: list[int] = []
    for field in fields(message, budget):
        if field.number != number:
            continue
        if isinstance(field.value, int):
            found.append(field.integer)
            continue
        at = 0
        while at < len(field.value):
            budget.consume()
            value, at = _varint(field.value, at)
            found.append(Field(number, value).integer)
    return tuple(found)


# The graph.

FloatArray = NDArray[np.float32]

# types.proto's DataType -> numpy layout of `tensor_content`, and the field of TensorProto with single values
_DTYPES = {1: ("<f4", 5), 2: ("<f8", 6), 3: ("<i4", 7), 9: ("<i8", 10)}
_MAX_RANK = 8
_SPARE_VALUES = 1 << 20  # that small graphs may repeat single numbers to
_MAX_IDENTITIES = 64


@dataclass(frozen=True, eq=False)
class Node:
    """One operation: its name, kind and inputs (names of nodes, without the number of their output), and its attributes."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: dict[str, memoryview]
    """AttrValue messages, not read yet."""
    budget: ReadBudget

    def _attribute(self, name: str, number: int) -> Field | None:
        message = self.attributes.get(name, memoryview(b""))
        return next((field for field in fields(message, self.budget) if field.number == number), None)

    def number(self, name: str, default: float) -> float:
        """Return a float attribute, as the shortest decimal of its 32 bits."""
        field = self._attribute(name, 4)
        if field is None:
            return default
        if len(field.data) != 4:
            raise damaged_protobuf(f"attribute '{name}' of '{self.name}' is no 32-bit number")
        return float(str(np.frombuffer(field.data, "<f4")[0]))

    def flag(self, name: str) -> bool:
        """Return a boolean attribute; False where it is not set."""
        field = self._attribute(name, 5)
        return field is not None and field.integer != 0

    def text(self, name: str, default: str = "") -> str:
        """Return a string attribute."""
        field = self._attribute(name, 2)
        return default if field is None else utf8(field.data)

    def integers(self, name: str) -> tuple[int, ...]:
        """Return a list of whole numbers; empty where it is not set."""
        field = self._attribute(name, 1)
        return () if field is None else integers(field.data, 3, self.budget)

    def tensor(self) -> memoryview:
        """Return the TensorProto message of a constant."""
        field = self._attribute("value", 8)
        if self.op != "Const" or field is None:
            raise WeightsError(
                f"Node '{self.name}' ({self.op}) of the graph is computed where weights in the file were expected."
            )
        return field.data


class GraphDef:
    """The nodes of a graph by name, and which nodes read each; raises WeightsError on anything malformed."""

    def __init__(self, data: bytes) -> None:
        self.nodes: dict[str, Node] = {}
        self._read_budget = ReadBudget()
        self._values_left = len(data) // 4 + _SPARE_VALUES
        """How many more values single numbers may still be repeated to: no more than the file itself could hold."""
        for field in fields(memoryview(data), self._read_budget):
            if field.number == 1:
                node = _node(field.data, self._read_budget)
                if node.name in self.nodes:
                    raise damaged_protobuf(f"it has two nodes '{node.name}'")
                self.nodes[node.name] = node
        self.consumers: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            for name in dict.fromkeys(node.inputs):
                self.consumers.setdefault(name, []).append(node)

    def input_of(self, node: Node, index: int) -> Node:
        """Return the node that feeds another, past identities; raises WeightsError where there is none."""
        for _ in range(_MAX_IDENTITIES):
            if index >= len(node.inputs) or node.inputs[index] not in self.nodes:
                raise damaged_protobuf(f"node '{node.name}' ({node.op}) has no input {index}")
            node, index = self.nodes[node.inputs[index]], 0
            if node.op not in ("Identity", "StopGradient"):
                return node
        raise damaged_protobuf(f"node '{node.name}' stands behind a chain of identities that does not end")

    def consumers_of(self, node: Node) -> list[Node]:
        """Return the nodes that read another, past identities."""
        found: list[Node] = []
        seen = {node.name}
        waiting = [node]
        while waiting:
            for reader in self.consumers.get(waiting.pop().name, ()):
                if reader.op == "Identity" and reader.name not in seen:
                    seen.add(reader.name)
                    if len(seen) > _MAX_IDENTITIES:
                        raise damaged_protobuf(f"node '{node.name}' is passed on more than {_MAX_IDENTITIES} times")
                    waiting.append(reader)
                elif reader.op != "Identity":
                    found.append(reader)
        return found

    def values(self, node: Node) -> NDArray[np.generic]:
        """Return a constant's values; raises WeightsError if it is computed, of another type, or not as long as it says."""
        kind, content = 0, memoryview(b"")
        shape: tuple[int, ...] = ()
        message = node.tensor()
        for field in fields(message, self._read_budget):
            if field.number == 1:
                kind = field.integer
            elif field.number == 2:
                shape = _shape(field.data, node.name, self._read_budget)
            elif field.number == 4:
                content = field.data
        if kind not in _DTYPES:
            raise WeightsError(f"Constant '{node.name}' of the graph is of TensorFlow's type {kind}; expected plain numbers.")
        layout, number = _DTYPES[kind]
        count = 1
        for size in shape:
            count *= size
        if len(content):
            if len(content) != count * np.dtype(layout).itemsize:
                raise damaged_protobuf(f"constant '{node.name}' of shape {shape} has {len(content)} bytes")
            return np.frombuffer(content, layout).reshape(shape)
        single = _single_values(message, number, layout, self._read_budget)
        if not 0 < len(single) <= count:
            raise damaged_protobuf(f"constant '{node.name}' of shape {shape} has {len(single)} values")
        self._values_left -= count
        if self._values_left < 0:
            raise WeightsError("The constants of the TensorFlow graph would grow far beyond the file's size; it is not read.")
        return np.concatenate([single, np.full(count - len(single), single[-1])]).reshape(shape)

    def float_values(self, node: Node) -> FloatArray:
        """Return a constant's values as float32, all of them finite."""
        values = self.values(node).astype(np.float32)
        if not np.isfinite(values).all():
            raise WeightsError(f"Constant '{node.name}' of the graph holds values that are not finite; it cannot be used.")
        return values


def _node(message: memoryview, budget: ReadBudget) -> Node:
    name = op = ""
    inputs: list[str] = []
    attributes: dict[str, memoryview] = {}
    for field in fields(message, budget):
        if field.number == 1:
            name = utf8(field.data)
        elif field.number == 2:
            op = utf8(field.data)
        elif field.number == 3:
            source = utf8(field.data)
            if not source.startswith("^"):  # those only say what must run before
                inputs.append(source.split(":")[0])
        elif field.number == 5:
            entry = {one.number: one for one in fields(field.data, budget)}
            if 1 in entry and 2 in entry:
                attributes[utf8(entry[1].data)] = entry[2].data
    if not name or not op:
        raise damaged_protobuf("a node in it has no name or no kind")
    return Node(name, op, tuple(inputs), attributes, budget)


def _shape(message: memoryview, name: str, budget: ReadBudget) -> tuple[int, ...]:
    dimensions = (field.data for field in fields(message, budget) if field.number == 2)
    shape = [next((one.integer for one in fields(dimension, budget) if one.number == 1), 0) for dimension in dimensions]
    if len(shape) > _MAX_RANK or any(not 0 < size < 1 << 31 for size in shape):
        raise damaged_protobuf(f"constant '{name}' has shape {shape[:_MAX_RANK]}")
    return tuple(shape)


def _single_values(message: memoryview, number: int, layout: str, budget: ReadBudget) -> NDArray[np.generic]:
    if layout.startswith("<i"):
        return np.array(integers(message, number, budget), np.int64)
    width = int(layout[-1])
    parts = [bytes(field.data) for field in fields(message, budget) if field.number == number]
    if any(len(part) % width for part in parts):
        raise damaged_protobuf("a list of numbers ends within one")
    return np.frombuffer(b"".join(parts), layout)


# The frozen graph of TensorFlow's DeepLab zoo, out of its `.tar.gz` archives or as the `.pb` that lies in them.
#
# An archive is read from front to back in memory and nothing is written, so the names in it lead nowhere; the graph's size and
# what is unpacked on the way to it are bounded.


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
                f"'{path}' holds no {GRAPH_FILE}; of TensorFlow's zoo only archives of segmentation models do, and "
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
