"""Checks of arguments by type. Each raises InputError, which names the argument and shows the value."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from vlmteacher.errors import InputError

LARGEST_NUMBER = 1e18  # of a setting: ten times the product of two fits a float32
LARGEST = 2**63 - 1  # of a tensor's size, a number of steps, a seed


def show(value: object) -> str:
    """Any value as text in one line, for a message."""
    try:
        return " ".join(reprlib.repr(value).split())
    except Exception:  # an integer of thousands of digits, an object whose __repr__ fails
        return f"a {type(value).__name__}"


def whole(name: str, value: object, least: int = 1) -> int:
    """An integer of Python or numpy, at least `least`, as Python's."""
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= LARGEST:
        return int(value)
    raise InputError(f"{name} must be a whole number of at least {least}, not {show(value)}")


def number(name: str, value: object) -> float:
    """A real number of Python or numpy, NaN and infinity included, as a float; Python's own int stays an int."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return value if type(value) is int and float(value) == value else float(value)
        except OverflowError:
            pass
    raise InputError(f"{name} must be a number, not {show(value)}")


def flag(name: str, value: object) -> bool:
    """True or False of Python or numpy, as Python's."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise InputError(f"{name} must be True or False, not {show(value)}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> Any:
    """One of `choices`."""
    if isinstance(value, str) and value in choices:
        return value
    raise InputError(f"{name} must be {' or '.join(choices)}, not {show(value)}")


def path(name: str, value: object) -> str:
    """A path or a hub id as text. Raises InputError for an empty one: a shell makes it of a variable without value."""
    if isinstance(value, (str, os.PathLike)) and isinstance(text := os.fspath(value), str):
        if not text.strip():
            raise InputError(f"{name} is empty: give a path or a name")
        return text
    raise InputError(f"{name} must be a path or a name, not {show(value)}")


def paths(name: str, value: object) -> str | list[str]:
    """A path or a hub id as text, or a list of them."""
    return [path(name, each) for each in value] if isinstance(value, (list, tuple)) else path(name, value)


def single(name: str, value: object) -> object:
    """`value`, or the only entry of a list: diffusers' pipelines take lists, a call here is one instance."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != 1:
        raise InputError(f"{name} is a list of {len(value)}: a call answers one instance, call once for each")
    return value[0]


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or has spaces and characters of no width only."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def text(name: str, value: object) -> str:
    """A string."""
    if isinstance(value, str):
        return value
    raise InputError(f"{name} must be a string, not {show(value)}")


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """The end of a message that names what is most like `text`; empty where nothing is."""
    import difflib

    close = difflib.get_close_matches(text, list(names), 1)
    return f": did you mean {close[0]}?" if close else ""
