"""References for the plan: torch's own FLOP counter, and the bytes that autograd saves on real tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import memory


def flash_flops(
    query: Sequence[int], key: Sequence[int], _: Any, __: float = 0.0, is_causal: bool = False, **___: Any
) -> int:
    b, h, n, d = query
    return 2 * 2 * b * h * n * key[2] * d // (1 + is_causal)  # two products; not taken from the planner


def flash_backward_flops(grad: Sequence[int], query: Sequence[int], key: Sequence[int], *rest: Any, **_: Any) -> int:
    b, h, n, d = query
    is_causal = rest[4]  # after value, output, logsumexp, dropout_p
    return 5 * 2 * b * h * n * key[2] * d // (1 + is_causal)


def our_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    b, n, h, d = query
    return 2 * 2 * b * h * n * key[1] * d


def our_backward_flops(grad: Sequence[int], query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    return our_flops(query, key) * 5 // 2


def stock_count(function: Callable[[], Any]) -> int:
    """The FLOPs by torch's own counter, with formulas for the CPU's attention, torch's and ours."""
    aten, own = torch.ops.aten, torch.ops.vlmteacher
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: flash_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward_flops,
        own.attention: our_flops,
        own.attention_backward: our_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


def saved_bytes(function: Callable[[], Any], *modules: nn.Module) -> tuple[int, Any]:
    """Returns the bytes that autograd keeps, without the modules' own, and the function's result."""
    return memory.saved_bytes(function, [t for m in modules for t in (*m.parameters(), *m.buffers())])
