"""The library's attention in place of torch's, for diffusers' models on few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from vlmteacher.ops.attention import attention, is_native


@contextmanager
def fast_attention() -> Iterator[None]:
    """Replace `F.scaled_dot_product_attention` inside the block: on so few tokens torch's takes a third of a step.

    Where no kernel of ours serves the tensors, torch's stays.
    """
    stock = F.scaled_dot_product_attention

    def ours(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if attn_mask is not None or dropout_p or is_causal or scale is not None:
            return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
        if not is_native(q):  # `attention` would call this function
            return stock(query, key, value, enable_gqa=enable_gqa)
        return attention(q, k, v, backend="native").transpose(1, 2)

    F.scaled_dot_product_attention = ours
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock
