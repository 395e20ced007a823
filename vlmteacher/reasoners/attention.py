"""Attention of diffusers' transformers by our own operator, unless another backend is chosen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmteacher.ops.attention import attention, is_native
from vlmteacher.reasoners.own_tokens import exchange


def attend(processor: Any, q: Tensor, k: Tensor, v: Tensor, *, to_self: bool = False) -> Tensor:
    """Attention of q (B, N, H, d) to k and v (B, M, H, d), returned as (B, N, H, d).

    processor: the diffusers attention processor that calls, for its backend and its context parallelism. to_self: k and
    v are of q's tokens, which context parallelism shares among the ranks; of other tokens every rank has all.
    """
    if not to_self or processor._parallel_config is None:
        return _attend(processor, q, k, v)
    # Not by diffusers' own attention for it, which computes every attention again in the backward.
    output = _attend(processor, *(exchange(processor, x) for x in (q, k, v)))
    return exchange(processor, output, back=True)


def _attend(processor: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    if processor._attention_backend is None and is_native(q):
        return attention(q, k, v)
    output: Tensor = dispatch_attention_fn(q, k, v, backend=processor._attention_backend)
    return output
