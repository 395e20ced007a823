"""Signals that end a program early: work stops where its state is consistent, and the state is kept."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDINGS = (signal.SIGTERM, signal.SIGHUP)  # sent by a batch system, `kill` and a closed terminal
TOGETHER = 1.0  # seconds within which several signals count as one
_raised: list[KeyboardInterrupt] = []  # by the handlers of `endings_interrupt`


class Interrupted(KeyboardInterrupt):
    """A signal other than SIGINT asked the process to end. status: the exit status, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def endings_interrupt() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise `Interrupted` inside the block.

    Signals within `TOGETHER`, SIGINT included, raise once. A signal that is ignored (`nohup`) or has another handler
    keeps it. Where a library turns the interruption into another error (safetensors reports a damaged file, Ray raises
    its own KeyboardInterrupt), the block still ends with the interruption.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults = {signal.SIGINT: signal.default_int_handler} | dict.fromkeys(ENDINGS, signal.SIG_DFL)
    defaults = {number: default for number, default in defaults.items() if signal.getsignal(number) is default}
    latest = -TOGETHER
    report = sys.unraisablehook

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal latest
        before, latest = latest, time.monotonic()
        if latest - before < TOGETHER:  # the first one is being handled
            return
        _raised.append(KeyboardInterrupt() if number == signal.SIGINT else Interrupted(number))
        raise _raised[-1]

    def report_others(error: Any) -> None:
        if error.exc_value not in _raised:  # an interruption in a finalizer is lost: `raise_lost` raises it
            report(error)

    for number in defaults:
        signal.signal(number, interrupt)
    sys.unraisablehook = report_others
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _raised and error not in _raised:
            raise _raised[0] from error
        raise
    finally:
        _raised.clear()
        sys.unraisablehook = report
        for number, default in defaults.items():
            signal.signal(number, default)


def raise_lost() -> None:
    """Raise an interruption that a library has swallowed. For loops, once in each step."""
    if _raised:
        raise _raised[0]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay signals to the end of the block.

    For work that must be done whole: an update with its row of the history, the writing of a state.
    """
    if threading.current_thread() is not threading.main_thread():  # Python runs handlers in the main thread only
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDINGS)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    came: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
