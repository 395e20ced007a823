"""Gated residual, LayerNorm and modulation in Triton: one program per token, whose row stays in registers.

The definition is vlmteacher/ops/ada_norm.py. Arithmetic is in float32; `out` is rounded before it is normalised, as it
is in the definition.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _table_row(token, tokens, first, batches, rows):
    """The row of a (batches, rows, width) table that applies to a token; see `Sizes` in csrc/ada_norm/rows.h."""
    item = tl.where(batches == 1, 0, token // tokens)
    return item * rows + tl.where(token % tokens < first, 0, rows - 1)


@triton.jit
def _moments(v, inside, width, eps):
    """The centred row, and 1 / its standard deviation."""
    centred = tl.where(inside, v - tl.sum(v) / width, 0.0)
    return centred, 1 / tl.sqrt(tl.sum(centred * centred) / width + eps)


@triton.jit
def forward_kernel(x, y, gate, weight, bias, out, norm, tokens, width, first, batches, rows, eps, BLOCK: tl.constexpr):
    """y, gate, weight and bias may be None."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at, row = token * width + column, _table_row(token, tokens, first, batches, rows) * width + column
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        added = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            added *= tl.load(gate + row, mask=inside, other=0.0)
        rounded = (v + added).to(out.dtype.element_ty)
        tl.store(out + at, rounded, mask=inside)
        v = rounded.to(tl.float32)
    if weight is not None:
        centred, scale = _moments(v, inside, width, eps)
        value = centred * scale * tl.load(weight + row, mask=inside) + tl.load(bias + row, mask=inside)
        tl.store(norm + at, value.to(norm.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_out, grad_norm, kept, gate, weight, dx, dy, tokens, width, first, batches, rows, eps, BLOCK: tl.constexpr
):
    """grad_out, dx, dy and weight (with grad_norm and kept) may be None."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at, row = token * width + column, _table_row(token, tokens, first, batches, rows) * width + column
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if weight is not None:
        v = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_norm + at, mask=inside, other=0.0).to(tl.float32)
        grad *= tl.load(weight + row, mask=inside, other=0.0)
        centred, scale = _moments(v, inside, width, eps)
        along = tl.sum(grad * centred) * scale * scale / width
        total = (grad - tl.sum(grad) / width - centred * along) * scale
    if grad_out is not None:
        total += tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    if dx is not None:
        tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)
    if dy is not None:
        gated = total * tl.load(gate + row, mask=inside, other=0.0)
        tl.store(dy + at, gated.to(dy.dtype.element_ty), mask=inside)


def _launch(
    kernel: Any, like: Tensor, tables: tuple[Tensor | None, ...], first: int, eps: float, *tensors: Tensor | None
) -> None:
    """Launch a kernel over the tokens of `like`; `tensors` are its leading arguments."""
    items, tokens, width = like.shape
    batches, rows = next((t.shape[:2] for t in tables if t is not None), (1, 1))
    if not like.numel():
        return
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(like):
        kernel[(items * tokens,)](
            *(None if t is None else t.contiguous() for t in tensors),
            tokens, width, first, batches, rows, eps, BLOCK=block, num_warps=min(max(block // 256, 1), 32),
        )  # fmt: skip


def ada_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, first: int, eps: float
) -> list[Tensor]:
    """[out] if there is a y, then [norm] if there is a weight; arguments as of `ada_norm_reference`."""
    out, norm = (
        None if given is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for given in (y, weight)
    )
    _launch(forward_kernel, x, (gate, weight), first, eps, x, y, gate, weight, bias, out, norm)
    return [t for t in (out, norm) if t is not None]


def ada_norm_backward(
    grad_out: Tensor | None, grad_norm: Tensor | None, kept: Tensor | None, gate: Tensor | None, weight: Tensor | None,
    first: int, eps: float, need_x: bool, need_y: bool,
) -> list[Tensor]:  # fmt: skip
    """dx if needed, then dy if needed; arguments as of `ada_norm_backward_reference`."""
    like = grad_out if grad_out is not None else grad_norm
    assert like is not None
    dx, dy = (
        torch.empty(like.shape, dtype=like.dtype, device=like.device) if need else None for need in (need_x, need_y)
    )
    _launch(backward_kernel, like, (gate, weight), first, eps, grad_out, grad_norm, kept, gate, weight, dx, dy)
    return [t for t in (dx, dy) if t is not None]


def examples() -> None:
    """Launch every kernel on tensors without data, for the compile table.

    The forms of a Wan block at 5B's width; the widest form in the other dtypes, and at a width that is not aligned.
    """
    others = [(dtype, width, "y gate weight") for dtype, width in ((torch.float32, 3072), (torch.bfloat16, 5001))]
    forms = [(torch.bfloat16, 3072, form) for form in ("weight", "y gate", "y weight", "y gate weight")]
    for dtype, width, form in forms + others:
        x = torch.empty(1, 4096, width, dtype=dtype, device="meta")
        table = torch.empty(1, 2, width, device="meta")
        gate, weight = (table if name in form else None for name in ("gate", "weight"))
        ada_norm(x, x if "y" in form else None, gate, weight, weight, 880, 1e-6)
        grads = x if "y" in form else None, None if weight is None else x
        ada_norm_backward(*grads, x, gate, weight, 880, 1e-6, True, gate is not None)
