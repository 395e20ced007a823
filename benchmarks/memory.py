"""Count the bytes that autograd keeps between forward and backward: the same on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(function: Callable[[], Any], weights: Iterable[Tensor] = ()) -> tuple[int, Any]:
    """Call `function`; return the bytes that autograd keeps for its backward pass, and the function's result.

    Each storage counts once, and `weights` do not count.
    """
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, tuple[int, Tensor]] = {}  # holds the tensors, because a freed storage's address is used again

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return sum(size for size, _ in kept.values()), result
