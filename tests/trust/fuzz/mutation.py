"""Changes that readers dislike, to bytes and to JSON trees, each a pure function of a random generator."""

import json
import random
from collections.abc import Sequence
from typing import Any

_EXACTNESS_SIZES = (
    0,
    1,
    2,
    3,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
"""Offsets, lengths and counts that overflow, or lie just inside or outside of something."""
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1e308, -0.0, float("nan"), float("inf"), float("-inf"), 10**400, 1 << 64, "", "x", "..",
    "../../x", "/etc/passwd", "C:\\x", "a\0b", "\x1b[2J", "\ud800", "\u202e", "line\nline", "²", "x" * 5000, [], {}, [[]],
    [None], {"": None}, [0] * 300, {"__class__": "os.system"}, "none", "NaN", "1e999", [1, "a"], ["a", 1.5], [[1, 2], [3]],
)  # fmt: skip


def mutated(data: bytes, random_: random.Random, words: Sequence[bytes] = (), max_bytes: int = 1 << 16) -> bytes:
    """Return `data` changed in one to four places: bytes replaced, moved, repeated, taken away or set to awkward numbers."""
    found = bytearray(data)
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        at = random_.randrange(len(found) + 1)
        length = min(random_.choice((1, 1, 2, 4, 8, 32, 200)), len(found) - at)
        match random_.randrange(8):
            case 0:
                found[at : at + length] = random_.randbytes(length)
            case 1:
                width = random_.choice((1, 2, 4, 8))
                number = random_.choice(_EXACTNESS_SIZES) & (1 << 8 * width) - 1
                found[at : at + width] = number.to_bytes(width, random_.choice(("little", "big")))
            case 2:
                del found[at : at + length]
            case 3:
                del found[at:]
            case 4:
                found[at:at] = found[at : at + length] * random_.choice((1, 2, 50))
            case 5:
                found[at:at] = random_.choice(words) if words else b"\0"
            case 6 if at < len(found):
                found[at] ^= 1 << random_.randrange(8)
            case _:
                other = random_.randrange(len(found) + 1)
                found[at : at + length] = found[other : other + length]
    return bytes(found[:max_bytes])


def mutated_json(data: bytes, random_: random.Random, words: Sequence[bytes] = ()) -> bytes | None:
    """Return JSON with one to three values replaced, removed, doubled, nested or renamed; None where `data` is none."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(random_.choice((1, 1, 2, 3))):
        tree = _changed(tree, random_, words)
    try:
        text = json.dumps(tree)
    except (ValueError, RecursionError):
        return None
    if random_.random() < 0.02:
        text = text.replace("null", "[" * 100_000, 1)
    if random_.random() < 0.1:
        text = text.replace("\\u0000", "\0").replace("1e+308", "1e999")
    return text.encode("utf-8", "surrogatepass")


def _changed(tree: Any, random_: random.Random, words: Sequence[bytes]) -> Any:
    if isinstance(tree, dict) and tree and random_.random() < 0.9:
        key = random_.choice(list(tree))
        match random_.randrange(12):
            case 0:
                return {name: one for name, one in tree.items() if name != key}
            case 1:
                return {
                    random_.choice((f"{name}_", "", name[:-1], "\x1b[31m", "../x")) if name == key else name: one
                    for name, one in tree.items()
                }
            case _:
                return {name: _changed(one, random_, words) if name == key else one for name, one in tree.items()}
    if isinstance(tree, list) and tree and random_.random() < 0.9:
        at = random_.randrange(len(tree))
        match random_.randrange(8):
            case 0:
                return tree[:at] + tree[at + 1 :]
            case 1:
                return tree[:at] + [tree[at]] * random_.choice((2, 2, 100)) + tree[at + 1 :]
            case _:
                return [_changed(one, random_, words) if index == at else one for index, one in enumerate(tree)]
    return _another(tree, random_, words)


def _another(value: Any, random_: random.Random, words: Sequence[bytes]) -> Any:
    match random_.randrange(8):
        case 0:
            return [value]
        case 1:
            return {"kind": value}
        case 2 if isinstance(value, str) and value:
            return mutated(value.encode("utf-8", "surrogatepass"), random_, words).decode("utf-8", "replace")
        case 3 if isinstance(value, int | float):
            return value * random_.choice((-1, 0, 1000, 10**9))
        case 4 if words:
            return random_.choice(words).decode("utf-8", "replace")
        case _:
            return random_.choice(_VALUES)
