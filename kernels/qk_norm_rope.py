"""RMSNorm and rotary position embedding in Triton: one program per token, whose row stays in registers.

The definition is vlmteacher/ops/qk_norm_rope.py. Arithmetic is in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(v, cos, sin, pairs, width, sign: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate the pairs of neighbouring channels of a row by a token's angles, the same for every head."""
    pair = tl.arange(0, BLOCK // 2)
    c = tl.load(cos + pair % pairs, mask=2 * pair < width, other=0.0)
    s = tl.load(sin + pair % pairs, mask=2 * pair < width, other=0.0) * sign
    even, odd = tl.split(tl.reshape(v, [BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BLOCK])


@triton.jit
def forward_kernel(x, weight, cos, sin, out, tokens, width, pairs, eps, BLOCK: tl.constexpr):
    """cos and sin may be None: no rotation."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside, at = column < width, token * width + column
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v *= 1 / tl.sqrt(tl.sum(v * v) / width + eps)
    v *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if cos is not None:
        angles = token % tokens * pairs
        v = _turn(v, cos + angles, sin + angles, pairs, width, 1, BLOCK)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(grad, x, weight, cos, sin, dx, tokens, width, pairs, eps, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside, at = column < width, token * width + column
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if cos is not None:
        angles = token % tokens * pairs
        g = _turn(g, cos + angles, sin + angles, pairs, width, -1, BLOCK)
    g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(v * v) / width + eps)
    along = tl.sum(g * v) * scale * scale / width
    tl.store(dx + at, ((g - v * along) * scale).to(dx.dtype.element_ty), mask=inside)


def _launch(
    kernel, x: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float, *tensors: Tensor
) -> Tensor:
    """Launch a kernel over the tokens of x; `tensors` are its arguments before the angles."""
    items, tokens, width = x.shape
    block = triton.next_power_of_2(width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    with torch.cuda.device_of(x):
        kernel[(items * tokens,)](
            *(t.contiguous() for t in tensors), cos, sin, out,
            tokens, width, width // heads // 2, eps, BLOCK=block, num_warps=min(max(block // 256, 1), 32),
        )  # fmt: skip
    return out


def qk_norm_rope(
    xs: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor | None, sin: Tensor | None, heads: int, eps: float
) -> list[Tensor]:
    """Every x (B, N, C), normalised and rotated."""
    return [_launch(forward_kernel, x, cos, sin, heads, eps, x, w) for x, w in zip(xs, weights, strict=True)]


def qk_norm_rope_backward(
    grads: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor | None, sin: Tensor | None,
    heads: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of the xs, (B, N, C) each."""
    each = zip(grads, xs, weights, strict=True)
    return [_launch(backward_kernel, x, cos, sin, heads, eps, grad, x, w) for grad, x, w in each]


def examples() -> None:
    """Launch every kernel on tensors without data, for the compile table.

    Self- and cross-attention at 5B's width, and a width that is not aligned.
    """
    sizes = ((torch.bfloat16, 24, 128), (torch.float32, 24, 128), (torch.bfloat16, 3, 46))
    for dtype, heads, channels in sizes:
        x = torch.empty(1, 4096, heads * channels, dtype=dtype, device="meta")
        angles = torch.empty(4096, channels // 2, device="meta")
        for table in (angles, None) if dtype == torch.bfloat16 else (angles,):
            args = ([x], [x[0, 0]], table, table, heads, 1e-6)
            qk_norm_rope(*args)
            qk_norm_rope_backward([x], *args)
