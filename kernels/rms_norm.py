"""RMSNorm in Triton: a program takes as many rows as fill its block, each of which stays in registers.

The definition is vlmteacher/ops/rms_norm.py. Arithmetic is in float32; the normalised row is rounded before it is
multiplied by the weight, as in the definition.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def forward_kernel(x, weight, norm, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    at = row[:, None] * width + column[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(v * v, 1) / width + eps)
    unit = (v * scale[:, None]).to(norm.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(norm + at, (unit * factor[None, :]).to(norm.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(grad, x, weight, added, dx, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """added may be None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    at = row[:, None] * width + column[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = (1 / tl.sqrt(tl.sum(v * v, 1) / width + eps))[:, None]
    unit = v * scale
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
    total = (g - unit * (tl.sum(g * unit, 1) / width)[:, None]) * scale
    if added is not None:
        total += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)


def _launch(kernel: Any, eps: float, *tensors: Tensor | None) -> Tensor:
    """Launch a kernel over the rows of its first tensor (..., C); returns the result, like it."""
    like: Any = tensors[0]
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if like.numel():
        width = like.shape[-1]
        rows, block = like.numel() // width, triton.next_power_of_2(width)
        each = max(1, 1024 // block)
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(rows, each),)](
                *(None if t is None else t.contiguous() for t in tensors), out, rows, width, eps,
                ROWS=each, BLOCK=block, num_warps=min(max(each * block // 256, 1), 32),
            )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., C); arguments as of `rms_norm_reference`."""
    return _launch(forward_kernel, eps, x, weight)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> Tensor:
    """The gradient of x; arguments as of `rms_norm_backward_reference`."""
    return _launch(backward_kernel, eps, grad, x, weight, added)


def examples() -> None:
    """Launch every kernel on tensors without data, for the compile table.

    Qwen3-VL-4B's hidden width and head, the widest layer's in float32, and a width that is not aligned.
    """
    sizes = (
        (torch.bfloat16, (6000, 2560)), (torch.bfloat16, (6000, 32, 128)), (torch.float32, (6000, 5120)),
        (torch.bfloat16, (6000, 333)),
    )  # fmt: skip
    for dtype, shape in sizes:
        x = torch.empty(shape, dtype=dtype, device="meta")
        weight = torch.empty(shape[-1], dtype=dtype, device="meta")
        rms_norm(x, weight, 1e-6)
        for added in (None, x):
            rms_norm_backward(x, x, weight, 1e-6, added)
