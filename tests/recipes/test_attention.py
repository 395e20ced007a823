"""The library's attention in place of torch's."""

import torch
from torch.nn import functional as F

from recipes.microworld.attention import fast_attention
from vlmteacher.ops.attention import is_native


def test_our_attention_stands_in_for_torchs():
    stock = F.scaled_dot_product_attention
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    found = []
    for mask in (None, torch.rand(7, 7) > 0.3):
        expected = stock(q, k, v, mask)
        with fast_attention():
            given = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
        found.append(given.grad_fn.name() == expected.grad_fn.name())
    assert found == [not is_native(q), True] and F.scaled_dot_product_attention is stock
    with fast_attention(), torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
