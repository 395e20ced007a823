"""Errors that a user can act on."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line that names the value and the remedy."""


class NonFiniteFrames(InputError):
    """Frames hold NaN or infinite values: what made them has broken down."""


class MissingExtra(ImportError):
    """An optional package is not installed. The message names the extra that brings it."""
