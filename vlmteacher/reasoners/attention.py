"""Attention of diffusers' transformers: our own operator where it runs and nobody chose another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmteacher.ops.attention import attention, is_native


def attend(processor: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, H, d), (B, M, H, d) twice -> (B, N, H, d), as a diffusers attention processor would have it."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    backend, parallel = processor._attention_backend, processor._parallel_config
    if backend is None and parallel is None and is_native(q):
        return attention(q, k, v)
    output: Tensor = dispatch_attention_fn(q, k, v, backend=backend, parallel_config=parallel)
    return output
