"""Overrides of a recipe's fields from text (`--set field=value`), and recipes from JSON."""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from deeplabzoo.errors import UnknownNameError, UsageError, did_you_mean
from deeplabzoo.strict_json import parse_json
from deeplabzoo.training.recipe import Recipe

Plain = TypeVar("Plain")
_MAX_DIGITS = 6
"""Of an index in a list."""


def apply_overrides(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """Return the recipe with overrides applied.

    Args:
        recipe: The recipe.
        assignments: `field=value`, e.g. `lr=0.01`, `augmentation.crop=321,321`; dots lead into a field's own fields
            (`stages.0.lr=1e-3`). Setting `steps` unsets `epochs`, and the other way round.

    Raises:
        UnknownNameError: A field does not exist.
        UsageError: A value is of the wrong type.
    """
    values = recipe.to_dict()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UsageError(f"'{assignment}' is not of the form field=value, e.g. --set lr=0.01.")
        _assign(values, key, text)
        if key in ("steps", "epochs") and values[key] is not None:
            values["epochs" if key == "steps" else "steps"] = None
    return recipe_from_dict(values)


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain JSON values.

    Args:
        values: Fields by name, as in recipe.json.

    Raises:
        UsageError: A field is unknown or missing, or a value is of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"A recipe is an object of named fields, not {values!r}.")
    return _build(Recipe, values, "")


def _assign(values: dict[str, Any], key: str, text: str) -> None:
    """Put the parsed text where the dotted key points."""
    *path, last = key.split(".")
    place: Any = values
    for depth, part in enumerate(path):
        place = place[_step(place, part, key, ".".join(path[:depth]))]
    place[_step(place, last, key, ".".join(path))] = _parse_value(text)


def _step(place: Any, part: str, key: str, within: str) -> Any:
    if isinstance(place, list) and part.isdecimal() and len(part) < _MAX_DIGITS and int(part) < len(place):
        return int(part)
    if isinstance(place, dict) and part in place:
        return part
    known = (
        list(place)
        if isinstance(place, dict)
        else [str(index) for index in range(len(place) if isinstance(place, list) else 0)]
    )
    prefix = f"{within}." if within else ""
    nested = [] if within else [f"{name}.{part}" for name, one in place.items() if isinstance(one, dict) and part in one]
    if nested:
        meant = " or ".join(f"'{one}'" for one in nested)
        raise UnknownNameError(f"A recipe has no field '{key}'. Did you mean {meant}?")
    hint = did_you_mean(part, known) or (f" It has {', '.join(known)}." if within and known else "")
    raise UnknownNameError(f"A recipe has no field '{key}'.{hint.replace(chr(39), chr(39) + prefix, 1) if prefix else hint}")


def _parse_value(text: str) -> Any:
    """Read JSON where it is JSON; else `a,b` as a list, `ce:1,lovasz:0.5` as pairs, and anything else as text."""
    try:
        return parse_json(text)
    except ValueError:
        pass
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    if "," in text:
        return [_parse_value(part.strip()) for part in text.strip("()[] ").split(",") if part.strip()]
    name, colon, factor = text.partition(":")
    if colon and name.isidentifier():
        with contextlib.suppress(ValueError):
            number = float(factor)
            return [name, number] if math.isfinite(number) else text
    return text


def _build(cls: type[Plain], values: Mapping[str, Any], prefix: str) -> Plain:
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UnknownNameError(f"A recipe has no field '{prefix}{key}'.{did_you_mean(key, known)}")
    try:
        return cls(**{key: _coerced(value, hints[key], f"{prefix}{key}") for key, value in values.items()})
    except TypeError as error:
        raise UsageError(f"The recipe is incomplete: {error}.") from None


def _coerced(value: Any, hint: Any, key: str) -> Any:
    """Return the plain value as the type that the field declares; raises UsageError naming both."""
    options = _options(hint)
    if value == "none" and types.NoneType in options and not any("none" in typing.get_args(one) for one in options):
        return None
    for option in options:
        try:
            return _as(value, option, key)
        except _TypeMismatchError:
            continue
    raise UsageError(f"{key} must be {_type_name(hint)}, not {value!r}.")


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself; `Literal[...] | None` is a union of typing's own kind."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


class _TypeMismatchError(Exception):
    """A value is not of this type; another member of the union may fit."""


def _as(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is types.NoneType and value is None:
        return None
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        return int(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    if origin is typing.Literal and value in arguments:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(typing.cast(type[Any], hint), value, f"{key}.")
    if origin is tuple:
        return _as_tuple(value, arguments, key)
    raise _TypeMismatchError


def _as_tuple(value: Any, arguments: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    """Return a list of the right length: one number stands for both sides, one loss or one pair for a list of them."""
    of_pairs = typing.get_origin(arguments[0]) is tuple
    if of_pairs and isinstance(value, str):
        value = [[value, 1.0]]
    elif of_pairs and isinstance(value, list) and value and not any(isinstance(one, list) for one in value):
        value = [value] if len(value) == 2 and isinstance(value[1], int | float) else [[one, 1.0] for one in value]
    elif of_pairs and isinstance(value, list):
        value = [one if isinstance(one, list) else [one, 1.0] for one in value]
    if arguments[-1] is Ellipsis:
        items = value if isinstance(value, list) else [value]
        if value is None or (isinstance(value, str) and arguments[0] is not str):
            raise _TypeMismatchError
        return tuple(_as(one, arguments[0], f"{key}.{index}") for index, one in enumerate(items))
    items = [value] * len(arguments) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(items, list) or len(items) != len(arguments):
        raise _TypeMismatchError
    return tuple(_as(one, argument, key) for one, argument in zip(items, arguments, strict=True))


def _type_name(hint: Any) -> str:
    """Return a type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if len(_options(hint)) > 1:
        return " or ".join(_type_name(one) for one in _options(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of {_type_name(arguments[0])}"
        return "(" + ", ".join(map(_type_name, arguments)) + ")"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "none"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
