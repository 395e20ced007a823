"""Errors that a user can act on."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line that names the value and the remedy."""


class NonFiniteFrames(InputError):
    """Frames hold NaN or infinite values: what made them has broken down."""


class OutOfMemory(InputError):
    """A step does not fit in memory, whatever is done about it; the LoRA is left as it was before that step."""


class MissingExtra(ImportError):
    """An optional package is not installed. The message names the extra that brings it."""
