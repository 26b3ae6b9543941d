"""Values against the type hints of a dataclass's fields, and how a refusal says what a hint means."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any


@functools.cache
def type_hints(kind: type) -> dict[str, Any]:
    """Field name -> type hint of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a type hint says; a whole number is also a float, and True is no number."""
    if hint is Any:
        return True
    if len(choices(hint)) > 1:
        return any(fits(value, kind) for kind in choices(hint))
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and _items_fit(value, items)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _items_fit(value: tuple[Any, ...], hints: tuple[Any, ...]) -> bool:
    if len(hints) == 2 and hints[1] is Ellipsis:
        return all(fits(item, hints[0]) for item in value)
    return len(value) == len(hints) and all(fits(item, kind) for item, kind in zip(value, hints, strict=True))


def describe(hint: Any) -> str:
    """A type hint as a reader of an error message would say it."""
    if len(choices(hint)) > 1:
        return " or ".join(describe(kind) for kind in choices(hint))
    if typing.get_origin(hint) is tuple:
        return str(hint).replace("typing.", "")
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
