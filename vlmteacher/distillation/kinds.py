"""Check the types of settings that come from a file."""

from __future__ import annotations

from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlmteacher.errors import InputError


def check_kinds(settings: Any) -> None:
    """Raise InputError for the first field of a dataclass whose value is not of the annotated type."""
    kinds = get_type_hints(type(settings))
    for entry in fields(settings):
        value, kind = getattr(settings, entry.name), kinds[entry.name]
        if not _is(value, kind):
            wanted = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise InputError(f"{entry.name} must be of the type {wanted}, not {value!r:.60}")


def _is(value: object, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_is(value, argument) for argument in arguments)
    if origin is Literal:
        return type(value) in {type(argument) for argument in arguments}
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if origin is None:
        return isinstance(value, (int, float) if kind is float else kind)
    # YAML has no tuples: a list is accepted for one.
    return isinstance(value, (list, tuple)) and all(_is(item, arguments[0]) for item in value)
