"""Protobuf's wire format out of a file that nobody vouches for: fields of messages, numbers and text.

Messages are read with a fixed depth, so nothing in a file can make the reading recurse; every length is checked against the
bytes that are there, and what is read of one file is counted.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from deeplabzoo.errors import WeightsError

MAX_FIELDS = 1_000_000
"""Fields read from one file at most; the graphs of published networks have some fifty thousands."""
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


# Reading tables out of a FlatBuffers file that nobody vouches for: every offset is checked before it is followed.
#
# The layout (FlatBuffers, "Internals"): a table starts with a signed offset *back* to its vtable; the vtable holds its own
# size, the table's size, and one 16-bit offset per field (0: the field is absent and has its default). Vectors, strings and
# sub-tables are reached through an unsigned 32-bit offset relative to where it is stored.


MAX_ENTRIES = 4_000_000
"""Vector entries read from one file at most; a network's lists (not its weights) have some ten thousands."""


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
