"""Reading tables out of a FlatBuffers file that nobody vouches for: every offset is checked before it is followed.

The layout (FlatBuffers, "Internals"): a table starts with a signed offset *back* to its vtable; the vtable holds its own
size, the table's size, and one 16-bit offset per field (0: the field is absent and has its default). Vectors, strings and
sub-tables are reached through an unsigned 32-bit offset relative to where it is stored.
"""

import struct

from deeplabzoo.errors import WeightsError

MAX_ENTRIES = 4_000_000
"""Vector entries read from one file at most; a network's lists (not its weights) have some ten thousands."""


class Source:
    """The bytes of a file and how many vector entries may still be read from it.

    Tables may overlap, so a small file can claim any number of long vectors; honest files read each byte about once.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._entries_left = min(len(data), MAX_ENTRIES)

    def number(self, layout: str, position: int) -> int:
        """Read a whole number stored as struct `layout` at a byte position."""
        if position < 0 or position + struct.calcsize(layout) > len(self.data):
            raise damaged(f"it points to byte {position} of {len(self.data)}")
        return int(struct.unpack_from(layout, self.data, position)[0])

    def spend(self, entries: int) -> None:
        """Count vector entries that are about to be read."""
        self._entries_left -= entries
        if self._entries_left < 0:
            raise damaged("it lists more than it can hold")


class Table:
    """One table of a FlatBuffers file; fields are asked for by slot, their index in the schema.

    Every reader returns the default of an absent field and raises WeightsError where an offset or a length leaves the file.
    """

    def __init__(self, source: Source, position: int) -> None:
        self._source = source
        self._position = position
        self._vtable = position - source.number("<i", position)
        self._slots = (source.number("<H", self._vtable) - 4) // 2

    @classmethod
    def root(cls, data: bytes) -> "Table":
        """Return the file's root table, which its first four bytes point to."""
        source = Source(data)
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
            raise damaged(f"a vector of {count} entries at byte {at} runs past its end")
        return at + 4, count

    def numbers(self, slot: int, code: str = "i") -> tuple[int | float, ...]:
        """Read a vector of numbers of struct type `code` (default: signed 32 bits)."""
        start, count = self.span(slot, struct.calcsize(f"<{code}"))
        self._source.spend(count)
        return struct.unpack_from(f"<{count}{code}", self._source.data, start)

    def tables(self, slot: int) -> list["Table"]:
        """Read a vector of tables."""
        start, count = self.span(slot, 4)
        self._source.spend(4 * count)
        places = range(start, start + 4 * count, 4)
        return [Table(self._source, place + self._source.number("<I", place)) for place in places]

    def text(self, slot: int) -> str:
        """Read a string, at most 200 characters of it; bytes that are not UTF-8 are replaced."""
        start, count = self.span(slot)
        return self._source.data[start : start + min(count, 200)].decode("utf-8", "replace")


def damaged(what: str) -> WeightsError:
    """Return the error for a file that contradicts itself: `what` says where."""
    return WeightsError(f"The TensorFlow Lite file is damaged: {what}; download it again.")
