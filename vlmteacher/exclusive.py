"""A lock on a transformer: a call puts its LoRA on it, so that only one thread and one call may use it at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from vlmteacher.errors import InputError


class _Use:
    """A lock of one thread, and the depth of its nested calls."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0


_USES: WeakKeyDictionary[Any, _Use] = WeakKeyDictionary()


@contextmanager
def exclusive(network: Any, nested: bool = False) -> Iterator[None]:
    """Hold `network` for this thread. Raises InputError while another thread holds it.

    nested: allow it inside another use by the same thread, such as in a callback; without it this is an InputError too.
    """
    use = _USES.setdefault(network, _Use())
    if not use.lock.acquire(blocking=False):
        raise InputError("this pipeline is at work in another thread: wait for it, or load one for each thread")
    try:
        if use.depth and not nested:
            raise InputError(
                "this pipeline is in the middle of a call: a callback may sample, but not call or change it"
            )
        use.depth += 1
        try:
            yield
        finally:
            use.depth -= 1
    finally:
        use.lock.release()
