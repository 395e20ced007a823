"""Types of settings that come from a file."""

from __future__ import annotations

from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlmteacher.errors import InputError


def check_kinds(settings: Any) -> None:
    """Raise InputError for the first value in a dataclass that is not of its field's type."""
    kinds = get_type_hints(type(settings))
    for each in fields(settings):
        value, kind = getattr(settings, each.name), kinds[each.name]
        if not _is(value, kind):
            wanted = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise InputError(f"{each.name} must be of the type {wanted}, not {value!r:.60}")


def _is(value: object, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_is(value, each) for each in arguments)
    if origin is Literal:
        return type(value) in {type(each) for each in arguments}
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if origin is None:
        return isinstance(value, (int, float) if kind is float else kind)
    # A list of YAML stands for a tuple too.
    return isinstance(value, (list, tuple)) and all(_is(each, arguments[0]) for each in value)
