"""A TensorFlow graph (GraphDef) as nodes and constants: the part of its protobuf messages that frozen networks use.

What a constant may grow to in memory is bounded by the size of the file.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeplabzoo.errors import WeightsError
from deeplabzoo.zoo.origins.protobuf import Field, Meter, damaged, fields, integers, utf8

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
    meter: Meter

    def _attribute(self, name: str, number: int) -> Field | None:
        message = self.attributes.get(name, memoryview(b""))
        return next((field for field in fields(message, self.meter) if field.number == number), None)

    def number(self, name: str, default: float) -> float:
        """Return a float attribute, as the shortest decimal of its 32 bits."""
        field = self._attribute(name, 4)
        if field is None:
            return default
        if len(field.data) != 4:
            raise damaged(f"attribute '{name}' of '{self.name}' is no 32-bit number")
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
        return () if field is None else integers(field.data, 3, self.meter)

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
        self._meter = Meter()
        self._budget = len(data) // 4 + _SPARE_VALUES
        """How many more values single numbers may still be repeated to: no more than the file itself could hold."""
        for field in fields(memoryview(data), self._meter):
            if field.number == 1:
                node = _node(field.data, self._meter)
                if node.name in self.nodes:
                    raise damaged(f"it has two nodes '{node.name}'")
                self.nodes[node.name] = node
        self.readers: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            for name in dict.fromkeys(node.inputs):
                self.readers.setdefault(name, []).append(node)

    def input_of(self, node: Node, index: int) -> Node:
        """Return the node that feeds another, past identities; raises WeightsError where there is none."""
        for _ in range(_MAX_IDENTITIES):
            if index >= len(node.inputs) or node.inputs[index] not in self.nodes:
                raise damaged(f"node '{node.name}' ({node.op}) has no input {index}")
            node, index = self.nodes[node.inputs[index]], 0
            if node.op not in ("Identity", "StopGradient"):
                return node
        raise damaged(f"node '{node.name}' stands behind a chain of identities that does not end")

    def readers_of(self, node: Node) -> list[Node]:
        """Return the nodes that read another, past identities."""
        found: list[Node] = []
        seen = {node.name}
        waiting = [node]
        while waiting:
            for reader in self.readers.get(waiting.pop().name, ()):
                if reader.op == "Identity" and reader.name not in seen:
                    seen.add(reader.name)
                    if len(seen) > _MAX_IDENTITIES:
                        raise damaged(f"node '{node.name}' is passed on more than {_MAX_IDENTITIES} times")
                    waiting.append(reader)
                elif reader.op != "Identity":
                    found.append(reader)
        return found

    def values(self, node: Node) -> NDArray[np.generic]:
        """Return a constant's values; raises WeightsError if it is computed, of another type, or not as long as it says."""
        kind, content = 0, memoryview(b"")
        shape: tuple[int, ...] = ()
        message = node.tensor()
        for field in fields(message, self._meter):
            if field.number == 1:
                kind = field.integer
            elif field.number == 2:
                shape = _shape(field.data, node.name, self._meter)
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
                raise damaged(f"constant '{node.name}' of shape {shape} has {len(content)} bytes")
            return np.frombuffer(content, layout).reshape(shape)
        single = _single_values(message, number, layout, self._meter)
        if not 0 < len(single) <= count:
            raise damaged(f"constant '{node.name}' of shape {shape} has {len(single)} values")
        self._budget -= count
        if self._budget < 0:
            raise WeightsError("The constants of the TensorFlow graph would grow far beyond the file's size; it is not read.")
        return np.concatenate([single, np.full(count - len(single), single[-1])]).reshape(shape)

    def real(self, node: Node) -> FloatArray:
        """Return a constant's values as float32, all of them finite."""
        values = self.values(node).astype(np.float32)
        if not np.isfinite(values).all():
            raise WeightsError(f"Constant '{node.name}' of the graph holds values that are not finite; it cannot be used.")
        return values


def _node(message: memoryview, meter: Meter) -> Node:
    name = op = ""
    inputs: list[str] = []
    attributes: dict[str, memoryview] = {}
    for field in fields(message, meter):
        if field.number == 1:
            name = utf8(field.data)
        elif field.number == 2:
            op = utf8(field.data)
        elif field.number == 3:
            source = utf8(field.data)
            if not source.startswith("^"):  # those only say what must run before
                inputs.append(source.split(":")[0])
        elif field.number == 5:
            entry = {one.number: one for one in fields(field.data, meter)}
            if 1 in entry and 2 in entry:
                attributes[utf8(entry[1].data)] = entry[2].data
    if not name or not op:
        raise damaged("a node in it has no name or no kind")
    return Node(name, op, tuple(inputs), attributes, meter)


def _shape(message: memoryview, name: str, meter: Meter) -> tuple[int, ...]:
    dimensions = (field.data for field in fields(message, meter) if field.number == 2)
    shape = [next((one.integer for one in fields(dimension, meter) if one.number == 1), 0) for dimension in dimensions]
    if len(shape) > _MAX_RANK or any(not 0 < size < 1 << 31 for size in shape):
        raise damaged(f"constant '{name}' has shape {shape[:_MAX_RANK]}")
    return tuple(shape)


def _single_values(message: memoryview, number: int, layout: str, meter: Meter) -> NDArray[np.generic]:
    if layout.startswith("<i"):
        return np.array(integers(message, number, meter), np.int64)
    width = int(layout[-1])
    parts = [bytes(field.data) for field in fields(message, meter) if field.number == number]
    if any(len(part) % width for part in parts):
        raise damaged("a list of numbers ends within one")
    return np.frombuffer(b"".join(parts), layout)
