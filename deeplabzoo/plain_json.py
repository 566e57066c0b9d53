"""JSON out of files and arguments that nobody vouches for: one meaning or none."""

import json
import math
from typing import Any

_MOST_DIGITS = 20


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says; raises ValueError, with the reason, for all that readers understand in different ways.

    That is: names that stand twice in one object, NaN and infinities, numbers that no 64 bits hold, and lists in lists without
    end, besides what is no JSON at all.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the name {twice!r:.60} stands twice in one object")
    return found


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits:.20} is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"the number {digits[:_MOST_DIGITS]}… is too large")
    return int(digits)
