"""Errors and warnings for users."""

from __future__ import annotations

import errno
import os


class InputError(ValueError):
    """An input that cannot be used. The message is one line that names the value and the remedy."""


class NonFiniteFrames(InputError):
    """Frames hold NaN or infinite values."""


class NonFiniteError(ArithmeticError):
    """A loss or its gradient is not a finite number. The trained weights are those before that step.

    `Optimization.step` raises it only before the first update; later it returns to the best LoRA instead.
    """


class OutOfMemory(InputError):
    """A step does not fit in memory even on the last rung of the memory ladder. The LoRA is as before that step."""


class OutputError(OSError):
    """A result cannot be written: the disk is full, read-only or missing. Earlier files are unchanged.

    The command line ends with exit status 1, because the input was right; `--resume` continues when there is room.
    """

    def __init__(self, path: str | os.PathLike[str], error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error), os.fspath(path))

    def __reduce__(self) -> tuple[type[OutputError], tuple[str, OSError]]:
        return OutputError, (self.filename, OSError(self.errno, self.strerror))

    def __str__(self) -> str:
        full = self.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there" if full else "see that it can be"
        return f"{self.filename} cannot be written ({self.strerror}): {remedy}, or give another place"


class TaskFailed(RuntimeError):
    """Some of several independent tasks failed at every attempt; the results of the others are kept.

    The command line ends with exit status 1, and `--resume` tries the failed ones again.
    """


class RankLost(RuntimeError):
    """Another process of this run has ended, so that no step can be made. The LoRA is as before that step.

    The command line ends with exit status 1, and `--resume` continues.
    """


class Notice(UserWarning):
    """A warning about a result that is still computed. The command line prints it as one line."""


class MissingExtra(ImportError):
    """An optional package is not installed. The message names the extra that installs it."""


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
