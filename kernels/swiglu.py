"""SwiGLU in Triton. The definition is vlmteacher/ops/swiglu.py; arithmetic is in float32, silu is rounded before the
product, as in the definition."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def forward_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(out.dtype.element_ty).to(tl.float32)
    product = silu * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(grad, gate, up, d_gate, d_up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_gate + at, (d * u * s * (1 + g * (1 - s))).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + at, (d * g * s).to(d_up.dtype.element_ty), mask=inside)


def _launch(kernel: Any, like: Tensor, inputs: tuple[Tensor, ...], outputs: int) -> list[Tensor]:
    made = [torch.empty(like.shape, dtype=like.dtype, device=like.device) for _ in range(outputs)]
    if like.numel():
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(like.numel(), BLOCK),)](
                *(t.contiguous() for t in inputs), *made, like.numel(), BLOCK=BLOCK, num_warps=4
            )
    return made


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up."""
    return _launch(forward_kernel, gate, (gate, up), 1)[0]


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
    """The gradients of gate and up."""
    return _launch(backward_kernel, gate, (grad, gate, up), 2)


def examples() -> None:
    """Launch every kernel on tensors without data, for the compile table: Qwen3-VL-4B's MLP, and an odd number."""
    for dtype, width in ((torch.bfloat16, 9728), (torch.float32, 9728), (torch.bfloat16, 333)):
        x = torch.empty(6001, width, dtype=dtype, device="meta")
        swiglu(x, x)
        swiglu_backward(x, x, x)
