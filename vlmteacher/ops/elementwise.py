"""Element-wise work between the products of a transformer: each one pass, forward and backward, in float32 inside.

On the CPU it is C++ where the processor has AVX-512 BF16. Elsewhere, and for whoever must see through it
(torch.compile, fake tensors, a dispatch mode), it is torch's own operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmteacher.ops.backends import has_avx512_bf16, plain


def _is_fast(x: Tensor) -> bool:
    own = x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu"
    return own and x.numel() > 0 and plain(x) and has_avx512_bf16()


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition of `rotate`, in plain differentiable torch."""
    a, b = x.float().chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = a.shape[-1]
    out[..., :half] = torch.addcmul(a * cos, b, sin, value=-1)
    out[..., half:] = torch.addcmul(b * cos, a, sin)
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if not _is_fast(x) or cos.dtype != torch.float32:
        return rotate_reference(x, cos, -sin if back else sin)
    batch = x if x.dim() == 4 else x[None]
    out: Tensor = torch.ops.vlmteacher_cpp.rotate(batch, cos, sin, back)
    return out.view(x.shape)


class _Rotate(torch.autograd.Function):
    """Saves the angles only, for its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, True), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, `x cos + rotate_half(x) sin`, in float32, in the dtype of x.

    x: (N, H, d) or (B, N, H, d); cos, sin: (N, 1, d / 2) float32: the first half, which the second repeats.
    Differentiable once with respect to x.
    """
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out: Tensor = torch.ops.vlmteacher_cpp.gelu(x, None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out: Tensor = torch.ops.vlmteacher_cpp.gelu(*ctx.saved_tensors, grad)
        return out


def gelu(x: Tensor) -> Tensor:
    """`F.gelu(x, approximate="tanh")` of any shape; by the C++ backend differentiable once."""
    if not _is_fast(x):
        return F.gelu(x, approximate="tanh")
    out: Tensor = _Gelu.apply(x)
    return out
