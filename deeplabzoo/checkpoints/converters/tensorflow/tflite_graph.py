"""A TensorFlow Lite file as tensors and operators: the part of its schema (version 3) that models of convolutions use."""

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeplabzoo.errors import WeightsError

# Reading tables out of a FlatBuffers file that may be hostile: every offset is checked before it is followed.
#
# The layout (FlatBuffers, "Internals"): a table starts with a signed offset *back* to its vtable; the vtable holds its own
# size, the table's size, and one 16-bit offset per field (0: the field is absent and has its default). Vectors, strings and
# sub-tables are reached through an unsigned 32-bit offset relative to where it is stored.


MAX_ENTRIES = 4_000_000
"""Vector entries read from one file at most; a model's lists (not its weights) have some ten thousands."""


class BoundedReader:
    """The bytes of a file and how many vector entries may still be read from it.

    Tables may overlap, so a small file can claim any number of long vectors; honest files read each byte about once.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._entries_left = min(len(data), MAX_ENTRIES)

    def number(self, layout: str, position: int) -> int:
        """Read a whole number stored as struct `layout` at a byte position."""
        if position < 0 or position + struct.calcsize(layout) > len(self.data):
            raise damaged_flatbuffer(f"it points to byte {position} of {len(self.data)}")
        return int(struct.unpack_from(layout, self.data, position)[0])

    def consume(self, entries: int) -> None:
        """Count vector entries that are about to be read."""
        self._entries_left -= entries
        if self._entries_left < 0:
            raise damaged_flatbuffer("it lists more than it can hold")


class Table:
    """One table of a FlatBuffers file; fields are asked for by slot, their index in the schema.

    Every reader returns the default of an absent field and raises WeightsError where an offset or a length leaves the file.
    """

    def __init__(self, source: BoundedReader, position: int) -> None:
        self._source = source
        self._position = position
        self._vtable = position - source.number("<i", position)
        self._slots = (source.number("<H", self._vtable) - 4) // 2

    @classmethod
    def root(cls, data: bytes) -> "Table":
        """Return the file's root table, which its first four bytes point to."""
        source = BoundedReader(data)
        return cls(source, source.number("<I", 0))

    def _at(self, slot: int) -> int | None:
        """Return where the field's bytes are, or None if the field is absent."""
        if slot >= self._slots:
            return None
        offset = self._source.number("<H", self._vtable + 4 + 2 * slot)
        return self._position + offset if offset else None

    def _target(self, slot: int) -> int | None:
        """Return where the vector, string or table of a field starts, or None if it is absent."""
        at = self._at(slot)
        return None if at is None else at + self._source.number("<I", at)

    def integer(self, slot: int, layout: str = "<i", default: int = 0) -> int:
        """Read a whole number stored as struct `layout` (default: signed 32 bits)."""
        at = self._at(slot)
        return default if at is None else self._source.number(layout, at)

    def flag(self, slot: int) -> bool:
        """Read a boolean; absent means False."""
        return self.integer(slot, "<B") != 0

    def table(self, slot: int) -> "Table | None":
        """Read a sub-table, or None if it is absent."""
        at = self._target(slot)
        return None if at is None else Table(self._source, at)

    def span(self, slot: int, item_bytes: int = 1) -> tuple[int, int]:
        """Return (start, count) of a vector, checked to lie inside the file; (0, 0) if it is absent."""
        at = self._target(slot)
        if at is None:
            return 0, 0
        count = self._source.number("<I", at)
        if at + 4 + count * item_bytes > len(self._source.data):
            raise damaged_flatbuffer(f"a vector of {count} entries at byte {at} runs past its end")
        return at + 4, count

    def numbers(self, slot: int, code: str = "i") -> tuple[int | float, ...]:
        """Read a vector of numbers of struct type `code` (default: signed 32 bits)."""
        start, count = self.span(slot, struct.calcsize(f"<{code}"))
        self._source.consume(count)
        return struct.unpack_from(f"<{count}{code}", self._source.data, start)

    def tables(self, slot: int) -> list["Table"]:
        """Read a vector of tables."""
        start, count = self.span(slot, 4)
        self._source.consume(4 * count)
        places = range(start, start + 4 * count, 4)
        return [Table(self._source, place + self._source.number("<I", place)) for place in places]

    def text(self, slot: int) -> str:
        """Read a string, at most 200 characters of it; bytes that are not UTF-8 are replaced."""
        start, count = self.span(slot)
        return self._source.data[start : start + min(count, 200)].decode("utf-8", "replace")


def damaged_flatbuffer(what: str) -> WeightsError:
    """Return the error for a file that contradicts itself: `what` says where."""
    return WeightsError(f"The TensorFlow Lite file is damaged: {what}; download it again.")


# The graph.

MAGIC = b"TFL3"
MAX_FILE_BYTES = 1 << 30
FloatArray = NDArray[np.float32]

# schema's enum TensorType -> numpy layout; other types (strings, 4-bit, complex) do not occur in these models' weights
_DTYPES = {0: "<f4", 1: "<f2", 2: "<i4", 3: "u1", 4: "<i8", 7: "<i2", 9: "i1", 10: "<f8"}
_FLOATS = {0, 1, 10}
# schema's enum BuiltinOperator
_OPERATORS = {
    0: "ADD", 1: "AVERAGE_POOL_2D", 2: "CONCATENATION", 3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 6: "DEQUANTIZE",
    9: "FULLY_CONNECTED", 14: "LOGISTIC", 17: "MAX_POOL_2D", 18: "MUL", 19: "RELU", 20: "RELU_N1_TO_1", 21: "RELU6",
    22: "RESHAPE", 23: "RESIZE_BILINEAR", 25: "SOFTMAX", 28: "TANH", 32: "CUSTOM", 34: "PAD", 37: "BATCH_TO_SPACE_ND",
    38: "SPACE_TO_BATCH_ND", 39: "TRANSPOSE", 40: "MEAN", 41: "SUB", 42: "DIV", 43: "SQUEEZE", 45: "STRIDED_SLICE",
    53: "CAST", 56: "ARG_MAX", 60: "PADV2", 67: "TRANSPOSE_CONV", 70: "EXPAND_DIMS", 77: "SHAPE",
    97: "RESIZE_NEAREST_NEIGHBOR", 98: "LEAKY_RELU", 114: "QUANTIZE", 117: "HARD_SWISH",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's declaration: shape in NHWC order, type, and `value = (stored - zero_point) * scale` if it is quantised."""

    shape: tuple[int, ...]
    type: int
    buffer: int
    name: str
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int
    """Dimension along which several scales lie."""
    plain: bool
    """False for sparse or variable tensors, whose buffer is not simply their values."""

    @property
    def is_quantised(self) -> bool:
        """Whether the values are stored as scaled integers."""
        return bool(self.scales) and self.type not in _FLOATS

    def real_range(self) -> tuple[float, float] | None:
        """Return the smallest and largest real value that a per-tensor quantised 8-bit tensor can hold, else None."""
        limits = {3: (0, 255), 9: (-128, 127)}.get(self.type)
        if limits is None or len(self.scales) != 1:
            return None
        low, high = ((limit - self.zero_points[0]) * self.scales[0] for limit in limits)
        return low, high


@dataclass(frozen=True)
class Operator:
    """One operator: its schema name, the indices of its tensors (-1: an optional input left out) and its options."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Table | None

    def option(self, slot: int, layout: str = "<i", default: int = 0) -> int:
        """Read a numeric option by its slot in the operator's options table."""
        return default if self.options is None else self.options.integer(slot, layout, default)


class Graph:
    """The main subgraph of a TensorFlow Lite file; raises WeightsError on anything malformed."""

    def __init__(self, data: bytes) -> None:
        if len(data) < 8 or data[4:8] != MAGIC:
            raise WeightsError("Not a TensorFlow Lite file: bytes 4 to 8 are not 'TFL3'.")
        self.data = data
        self._budget = 2 * len(data)
        model = Table.root(data)
        subgraphs = model.tables(2)
        if not subgraphs:
            raise damaged_flatbuffer("it holds no graph")
        main = subgraphs[0]
        self._buffers = model.tables(4)
        self.tensors = [_tensor(table) for table in main.tables(0)]
        self.inputs = self._indices(main, 1)
        self.outputs = self._indices(main, 2)
        codes = [_operator_name(code) for code in model.tables(1)]
        self.operators = [self._operator(table, codes) for table in main.tables(3)]

    def _indices(self, table: Table, slot: int) -> tuple[int, ...]:
        indices = tuple(int(index) for index in table.numbers(slot))
        if len(indices) > 256 or any(not -1 <= index < len(self.tensors) for index in indices):
            raise damaged_flatbuffer("an operator names tensors that do not exist")
        return indices

    def _operator(self, table: Table, codes: list[str]) -> Operator:
        code = table.integer(0, "<I")
        if code >= len(codes):
            raise damaged_flatbuffer(f"an operator has code {code} of {len(codes)}")
        return Operator(codes[code], self._indices(table, 1), self._indices(table, 2), table.table(4))

    def is_constant(self, index: int) -> bool:
        """Whether the tensor's values stand in the file."""
        return index >= 0 and self._place(self.tensors[index])[1] > 0

    def _place(self, tensor: TensorInfo) -> tuple[int, int]:
        """Return (start, bytes) of a tensor's values; files over 2 GB keep them behind the tables (Buffer.offset, .size)."""
        if tensor.buffer >= len(self._buffers):
            raise damaged_flatbuffer(f"tensor '{tensor.name}' names buffer {tensor.buffer} of {len(self._buffers)}")
        buffer = self._buffers[tensor.buffer]
        start, count = buffer.span(0)
        if count == 0:
            start, count = buffer.integer(1, "<Q"), buffer.integer(2, "<Q")
            if start + count > len(self.data):
                raise damaged_flatbuffer(f"the values of tensor '{tensor.name}' lie past its end")
        return start, count

    def stored(self, index: int) -> NDArray[np.generic]:
        """Return a constant tensor's values as they are stored."""
        tensor = self.tensors[index]
        if tensor.type not in _DTYPES or not tensor.plain:
            raise WeightsError(f"Tensor '{tensor.name}' is sparse or of a type that is not supported (type {tensor.type}).")
        start, count = self._place(tensor)
        dtype = np.dtype(_DTYPES[tensor.type])
        elements = _product(tensor.shape)
        if elements * dtype.itemsize != count:
            raise damaged_flatbuffer(f"tensor '{tensor.name}' of shape {tensor.shape} has {count} bytes of values")
        self._budget -= elements
        if self._budget < 0:
            raise damaged_flatbuffer("its tensors share more values than it holds")
        return np.frombuffer(self.data, dtype, elements, start).reshape(tensor.shape)

    def float_values(self, index: int) -> FloatArray:
        """Return a constant tensor's real values, float32: dequantised per tensor or per channel where they are integers."""
        tensor = self.tensors[index]
        values = self.stored(index)
        if not tensor.is_quantised:
            return _finite(values.astype(np.float32), tensor)
        scales, zero_points = self.quantisation(tensor)
        return _finite((values.astype(np.float64) - zero_points) * scales, tensor)

    def quantisation(self, tensor: TensorInfo) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (scales, zero points) shaped to broadcast over the tensor."""
        scales = np.asarray(tensor.scales, np.float64)
        zero_points = np.asarray(tensor.zero_points or (0,), np.float64)
        shape = [1] * len(tensor.shape)
        if len(scales) > 1:
            if not 0 <= tensor.axis < len(shape) or tensor.shape[tensor.axis] != len(scales):
                raise damaged_flatbuffer(f"tensor '{tensor.name}' of shape {tensor.shape} has {len(scales)} scales")
            shape[tensor.axis] = len(scales)
        if len(zero_points) not in (1, len(scales)):
            raise damaged_flatbuffer(f"tensor '{tensor.name}' has {len(scales)} scales and {len(zero_points)} zero points")
        zero_points = np.broadcast_to(zero_points, scales.shape)
        return scales.reshape(shape), zero_points.reshape(shape)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _finite(values: NDArray[np.floating], tensor: TensorInfo) -> FloatArray:
    with np.errstate(over="ignore", invalid="ignore"):
        float_values = values.astype(np.float32)
    if not np.isfinite(float_values).all():
        raise WeightsError(f"Tensor '{tensor.name}' holds values that are not finite numbers; the file cannot be used.")
    return float_values


def _tensor(table: Table) -> TensorInfo:
    shape = tuple(int(size) for size in table.numbers(0))
    name = table.text(3)
    if len(shape) > 8 or any(size < 0 for size in shape):
        raise damaged_flatbuffer(f"tensor '{name}' has shape {shape[:8]}")
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    axis = 0
    quantisation = table.table(4)
    if quantisation is not None:
        scales = tuple(float(scale) for scale in quantisation.numbers(2, "f"))
        zero_points = tuple(int(point) for point in quantisation.numbers(3, "q"))
        axis = quantisation.integer(6)
        if any(not 0 < scale < 1e30 for scale in scales):
            raise damaged_flatbuffer(f"tensor '{name}' has a quantisation scale that is not a positive number")
        zero_points = zero_points or (0,) * len(scales)
    plain = table.table(6) is None and not table.flag(5)
    return TensorInfo(shape, table.integer(1, "<b"), table.integer(2, "<I"), name, scales, zero_points, axis, plain)


def _operator_name(code: Table) -> str:
    # files from before 2020 have the 8-bit field alone; codes above 127 stand in the 32-bit field alone
    number = max(code.integer(0, "<b"), code.integer(3))
    name = _OPERATORS.get(number, f"operator number {number}")
    return f"CUSTOM {code.text(1)!r}" if name == "CUSTOM" else name
