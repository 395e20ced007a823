"""One thread, and one call in it, at a time works with a transformer: a call puts its LoRA on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from vlmteacher.errors import InputError


class _Use:
    """Who is at work: a lock of one thread, and how deep its calls are nested."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0


_USES: WeakKeyDictionary[Any, _Use] = WeakKeyDictionary()


@contextmanager
def exclusive(network: Any, nested: bool = False) -> Iterator[None]:
    """Hold `network` for this thread. Raises InputError, and disturbs nobody, where another thread holds it.

    nested: may happen inside another use of the same thread, in a callback for one; else that is refused too.
    """
    use = _USES.setdefault(network, _Use())
    if not use.lock.acquire(blocking=False):
        raise InputError("this pipeline is at work in another thread: wait for it, or load one for each thread")
    try:
        if use.depth and not nested:
            raise InputError("this pipeline is in the middle of a call: a callback can look, but not call or change it")
        use.depth += 1
        try:
            yield
        finally:
            use.depth -= 1
    finally:
        use.lock.release()
