"""Strict JSON from untrusted files and arguments, decoded into typed dataclasses."""

import dataclasses
import functools
import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from deeplabzoo.errors import DeepLabZooError, WeightsError, did_you_mean

_MAX_DIGITS = 20


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says; raises ValueError, with the reason, for all that readers understand in different ways.

    That is: names that stand twice in one object, NaN and infinities, numbers that no 64 bits hold, and lists in lists without
    end, besides what is no JSON at all.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_reject_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the name {twice!r:.60} stands twice in one object")
    return found


def _reject_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits:.20} is too large")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"the number {digits[:_MAX_DIGITS]}… is too large")
    return int(digits)


# Plain JSON read into frozen dataclasses by their annotations: nothing is guessed; what is wrong is named with its place.


T = TypeVar("T")
_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def decode_dataclass(kind: type[T], value: Any, where: str) -> T:
    """Return `value`, plain JSON found at `where`, as an instance of the dataclass `kind`.

    Unknown fields, missing fields and values of another type raise WeightsError, and so does what the class itself refuses.
    """
    return _decode(kind, value, where)  # type: ignore[no-any-return]


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _decode(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _decode_fields(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, where)
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):
            raise WeightsError(f"{where} must be one of {', '.join(map(str, arguments))}, not {value!r}.")
        return value
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is Mapping:
        return _decode_mapping(arguments[1], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise WeightsError(f"{where} must be {_TYPE_NAMES[hint]}, not {value!r}.")
    return value


def _decode_fields(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise WeightsError(f"{where} must be an object of named fields, not {value!r}.")
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for unknown in value.keys() - fields.keys():
        raise WeightsError(f"{where} has an unknown field '{unknown}'.{did_you_mean(unknown, fields)}")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    for missing in sorted(required - value.keys()):
        raise WeightsError(f"{where} lacks the field '{missing}'.")
    read = {name: _decode(hints[name], one, f"{where}.{name}") for name, one in value.items()}
    try:
        return kind(**read)
    except DeepLabZooError as error:
        raise WeightsError(f"{where}: {error}") from None


def _decode_mapping(hint: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise WeightsError(f"{where} must be an object, not {value!r}.")
    return {str(name): _decode(hint, one, f"{where}.{name}") for name, one in value.items()}


def _decode_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _decode(options[0], value, where)
    # a choice between dataclasses is decided by their field `kind`, a Literal of one word
    by_type_name = {get_args(_hints(option)["kind"])[0]: option for option in options}
    word = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(word, str) or word not in by_type_name:
        raise WeightsError(f"{where}.kind must be one of {', '.join(by_type_name)}, not {word!r}.")
    return _decode(by_type_name[word], value, where)


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise WeightsError(f"{where} must be a list, not {value!r}.")
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(value) != len(arguments):
        raise WeightsError(f"{where} must have {len(arguments)} values, not {len(value)}.")
    return tuple(
        _decode(hint, one, f"{where}[{index}]") for index, (hint, one) in enumerate(zip(arguments, value, strict=True))
    )
