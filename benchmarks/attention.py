"""Attention, forward and backward, against torch's: the Teacher's frame pairs, its packed questions, the Reasoner.

python -m benchmarks.attention [--json] [--dtype bfloat16]

Stock is `F.scaled_dot_product_attention` on the same tensors, with a dense mask where there is one; for the packed
questions in two calls, the prefix on its causal path, which is how the Teacher called it before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.memory import saved_bytes
from benchmarks.timing import arguments, compare, publish
from vlmteacher.ops.attention import Spans, attention

# case: batch, queries, keys, query heads, key heads, channels of a head
SHAPES = {
    "mid, a frame pair": (1, 576, 576, 6, 6, 64),
    "mid, packed questions": (1, 1880, 1880, 8, 4, 64),
    "mid, Reasoner to itself": (1, 1296, 1296, 8, 8, 64),
    "mid, Reasoner to the text": (1, 1296, 512, 8, 8, 64),
    "microworld, Teacher": (6, 64, 64, 3, 3, 64),
    "Qwen3-VL-4B, a frame pair": (1, 3520, 3520, 2, 2, 64),  # 2 of 16 heads
    "4B, language, packed": (1, 4096, 4096, 4, 1, 128),  # 4 of 32 heads, a part of the tokens
}
QUESTIONS = 30  # tokens of each of four


def packed(tokens: int) -> Spans:
    """A causal prefix and four questions behind it."""
    place = torch.arange(1, tokens + 1)
    prefix = tokens - 4 * QUESTIONS
    start = prefix + (place - 1 - prefix).clamp(min=0) // QUESTIONS * QUESTIONS
    return Spans(torch.stack([place.clamp(max=prefix), start, place], 1).int(), tokens, causal=prefix)


def draw(case: str, dtype: torch.dtype, device: str) -> tuple[tuple[Tensor, Tensor, Tensor], Spans | None]:
    """q, k and v of a case, and its mask."""
    batch, queries, keys, heads, key_heads, dim = SHAPES[case]
    sizes = ((queries, heads), (keys, key_heads), (keys, key_heads))
    q, k, v = (torch.randn(batch, n, h, dim, device=device).to(dtype).requires_grad_() for n, h in sizes)
    return (q, k, v), packed(queries) if "packed" in case else None


def suite_case(case: str, side: str) -> Callable[[], object]:
    """Forward + backward in bfloat16, by the operator or torch's `scaled_dot_product_attention`."""
    inputs, spans = draw(case, torch.bfloat16, "cpu")
    grad, backend = torch.randn_like(inputs[0]), None if side == "ours" else "sdpa"
    return lambda: torch.autograd.grad(attention(*inputs, spans, backend), inputs, grad)


SUITE = {case: functools.partial(suite_case, case) for case in list(SHAPES)[:5]}


def main() -> None:
    settings = arguments(__doc__ or "", "bfloat16")
    dtype = getattr(torch, settings.dtype)
    rows = []
    for case in SHAPES:
        inputs, spans = draw(case, dtype, settings.device)
        forward = functools.partial(attention, *inputs, spans)

        def both(
            backend: str | None,
            forward: Callable[..., Tensor] = forward,
            inputs: tuple[Tensor, ...] = inputs,
            grad: Tensor = torch.randn_like(inputs[0]),  # noqa: B008
        ) -> Callable[[], object]:
            return lambda: torch.autograd.grad(forward(backend), inputs, grad)

        row = compare(case, both(None), both("sdpa"), settings.pairs, settings.device)
        ours, theirs = (saved_bytes(functools.partial(forward, backend))[0] for backend in (None, "sdpa"))
        rows.append(row | {"memory_ratio": ours / theirs})
    publish("attention", settings, rows)


if __name__ == "__main__":
    main()
