"""The processors' classes that this machine can compute as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vlmteacher.ops import processors
from vlmteacher.ops.backends import cpp_status


def reachable() -> list[str]:
    """From the lowest on; `amx`, whose kernels are the vendor's and those of the class before, with that."""
    if not cpp_status()[0]:
        return ["baseline"]
    order = list(processors.PROCESSORS)
    last = order.index(processors._library.widest())
    return order[: last + 1 + (order[last] == "avx512_bf16")]


@contextmanager
def used_as(name: str) -> Iterator[None]:
    """Compute as a processor of this class; without the C++ library there is one class only."""
    before = processors.in_use()
    if cpp_status()[0]:
        processors.limit(name)
    try:
        yield
    finally:
        if cpp_status()[0]:
            processors.limit(before)
