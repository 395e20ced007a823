"""Signals that end a program early: the work stops where its state is whole, and keeps it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ENDINGS = (signal.SIGTERM, signal.SIGHUP)  # what a batch system, `kill` and a closed terminal send
_came: list[KeyboardInterrupt] = []  # what a signal has raised inside `endings_interrupt`


class Interrupted(KeyboardInterrupt):
    """The process was asked to end by a signal other than Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def endings_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Interrupted` inside the block, unless one of them or Ctrl-C did so before.

    A signal that is ignored (`nohup`) or has a handler of somebody else's stays as it is. An error that a library made
    of the interruption (safetensors takes any exception for a damaged file) ends the block as the interruption.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults = {signal.SIGINT: signal.default_int_handler} | dict.fromkeys(ENDINGS, signal.SIG_DFL)
    defaults = {number: default for number, default in defaults.items() if signal.getsignal(number) is default}

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        for each in defaults:  # what is written now is written to its end, but for who insists by Ctrl-C
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else _overhear)
        _came.append(KeyboardInterrupt() if number == signal.SIGINT else Interrupted(number))
        raise _came[0]

    for number in defaults:
        signal.signal(number, interrupt)
    try:
        yield
    except Exception as error:
        if _came:
            raise _came[0] from error
        raise
    finally:
        _came.clear()
        for number, default in defaults.items():
            signal.signal(number, default)


def raise_lost() -> None:
    """Raise the interruption that came, where the work still goes on: a library has swallowed it."""
    if _came:
        raise _came[0]


def _overhear(*_: object) -> None:
    """Do nothing; unlike SIG_IGN also for a signal that has come already and waits for Python."""


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
