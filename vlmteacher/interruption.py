"""Signals that end a program early: the work stops where its state is whole, and keeps it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDINGS = (signal.SIGTERM, signal.SIGHUP)  # what a batch system, `kill` and a closed terminal send
TOGETHER = 1.0  # seconds
_came: list[KeyboardInterrupt] = []  # what a signal has raised inside `endings_interrupt`


class Interrupted(KeyboardInterrupt):
    """The process was asked to end by a signal other than Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def endings_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Interrupted` inside the block; those that come together, Ctrl-C among them, once.

    A signal that is ignored (`nohup`) or has a handler of somebody else's stays as it is. An error that a library made
    of the interruption (safetensors takes any exception for a damaged file) ends the block as the interruption.
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
        if latest - before < TOGETHER:  # what the first has started comes to its end
            return
        _came.append(KeyboardInterrupt() if number == signal.SIGINT else Interrupted(number))
        raise _came[-1]

    def report_others(error: Any) -> None:
        if error.exc_value not in _came:  # else Python could raise it nowhere, which `raise_lost` will
            report(error)

    for number in defaults:
        signal.signal(number, interrupt)
    sys.unraisablehook = report_others
    try:
        yield
    except Exception as error:
        if _came:
            raise _came[0] from error
        raise
    finally:
        _came.clear()
        sys.unraisablehook = report
        for number, default in defaults.items():
            signal.signal(number, default)


def raise_lost() -> None:
    """Raise the interruption that came, where the work still goes on: a library has swallowed it."""
    if _came:
        raise _came[0]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that would interrupt the block take effect at its end.

    For what must be done whole or not at all: an update with its entry in the history, the writing of a state.
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
