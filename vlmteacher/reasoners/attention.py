"""Attention of diffusers' transformers by our own operator, unless another backend is chosen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmteacher.ops.attention import attention, is_native


def attend(processor: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (B, N, H, d) to k and v (B, M, H, d), returned as (B, N, H, d).

    processor: the diffusers attention processor that calls, for its backend and its context parallelism.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    backend, parallel = processor._attention_backend, processor._parallel_config
    if backend is None and parallel is None and is_native(q):
        return attention(q, k, v)
    output: Tensor = dispatch_attention_fn(q, k, v, backend=backend, parallel_config=parallel)
    return output
