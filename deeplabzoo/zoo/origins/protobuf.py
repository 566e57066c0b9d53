"""Protobuf's wire format out of a file that nobody vouches for: fields of messages, numbers and text.

Messages are read with a fixed depth, so nothing in a file can make the reading recurse; every length is checked against the
bytes that are there, and what is read of one file is counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from deeplabzoo.errors import WeightsError

MAX_FIELDS = 1_000_000
"""Fields read from one file at most; the graphs of published networks have some fifty thousands."""
_MAX_VARINT_BYTES = 10


def damaged(what: str) -> WeightsError:
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
            raise damaged(f"its field {self.number} holds a number where bytes were expected")
        return self.value

    @property
    def integer(self) -> int:
        """The number, as a signed 64-bit integer; raises WeightsError for bytes."""
        if not isinstance(self.value, int):
            raise damaged(f"its field {self.number} holds bytes where a number was expected")
        return self.value - (1 << 64) if self.value >= 1 << 63 else self.value


class Meter:
    """Counts what is read from one file, so that a small file that is made of millions of empty parts takes no minutes."""

    def __init__(self) -> None:
        self._left = MAX_FIELDS

    def spend(self) -> None:
        """Count one field or number."""
        self._left -= 1
        if self._left < 0:
            raise damaged(f"it has more than {MAX_FIELDS} fields")


def fields(message: memoryview, meter: Meter) -> Iterator[Field]:
    """Yield the fields of one message; raises WeightsError where its bytes are no protobuf message."""
    at = 0
    while at < len(message):
        meter.spend()
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
            raise damaged(f"byte {at} begins a field of unknown kind")
        if length > len(message) - at:
            raise damaged("a field is longer than what is left of its message")
        yield Field(number, message[at : at + length])
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(message[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & (1 << 64) - 1, at + index + 1
    raise damaged("a number in it does not end")


def utf8(data: memoryview) -> str:
    """Return a string; raises WeightsError for bytes that are none."""
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError:
        raise damaged("a name in it is no text") from None


def integers(message: memoryview, number: int, meter: Meter) -> tuple[int, ...]:
    """Return repeated whole numbers, packed or one by one."""
    found: list[int] = []
    for field in fields(message, meter):
        if field.number != number:
            continue
        if isinstance(field.value, int):
            found.append(field.integer)
            continue
        at = 0
        while at < len(field.value):
            meter.spend()
            value, at = _varint(field.value, at)
            found.append(Field(number, value).integer)
    return tuple(found)
