"""Element-wise operators of a transformer, each one pass forward and backward, computed in float32.

C++ on CPUs with AVX-512, Triton for the rotation on GPUs, torch's own operators elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend, cpp_status, plain, runs_triton
from vlmteacher.ops.checks import expect
from vlmteacher.ops.processors import is_own

cpp_status()  # loads the operators here, for torch.compile cannot trace it


def _is_fast(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() > 0 and is_own("elementwise", x.dtype)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition of `rotate`, in plain differentiable torch."""
    a, b = x.float().chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = a.shape[-1]
    out[..., :half] = torch.addcmul(a * cos, b, sin, value=-1)
    out[..., half:] = torch.addcmul(b * cos, a, sin)
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    batch = x if x.dim() == 4 else x[None]
    fast = torch.ops.vlmteacher_cpp if x.device.type == "cpu" else backend(x, "elementwise")
    out: Tensor = fast.rotate(batch, cos, sin, back)
    return out.view(x.shape)


def _gelu(x: Tensor, grad: Tensor | None) -> Tensor:
    """gelu(x) without a `grad`, else grad * gelu'(x)."""
    out: Tensor = torch.ops.vlmteacher_cpp.gelu(x, grad)
    return out


# Registered with torch.library for torch.compile, fake tensors and dispatch modes, see `backends.plain`.
@torch.library.custom_op("vlmteacher::rotate", mutates_args=())
def _rotate_operator(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return _rotate(x, cos, sin, back)


@torch.library.custom_op("vlmteacher::gelu", mutates_args=())
def _gelu_operator(x: Tensor, grad: Tensor | None) -> Tensor:
    return _gelu(x, grad)


@_rotate_operator.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


@_gelu_operator.register_fake
def _(x: Tensor, grad: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if not (_is_fast(x) or runs_triton(x)) or cos.dtype != torch.float32:
        return rotate_reference(x, cos, -sin if back else sin)
    return (_rotate if plain(x) else _rotate_operator)(x, cos, sin, back)


class _Rotate(torch.autograd.Function):
    """Saves only the angles: the gradient is the inverse rotation."""

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
    """Rotary position embedding: x cos + rotate_half(x) sin, computed in float32.

    Args:
        x: (N, H, d) or (B, N, H, d), d even, floating point, of any strides.
        cos, sin: (N, 1, d / 2) of the angles, which hold for both halves of d; float32 (with other floating dtypes
            torch's operators are used).

    Returns:
        A tensor of x's shape and dtype. Differentiable once with respect to x.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    if x.dim() not in (3, 4) or not x.is_floating_point() or x.shape[-1] % 2:
        raise InputError(f"rotate takes a floating-point (N, H, d) or (B, N, H, d), d even: {x.dtype} {tuple(x.shape)}")
    dtype = cos.dtype if cos.is_floating_point() else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        expect(name, table, (x.shape[-3], 1, x.shape[-1] // 2), dtype, x.device)
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (_gelu if plain(x) else _gelu_operator)(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (_gelu if plain(grad) else _gelu_operator)(x, grad)


def gelu(x: Tensor) -> Tensor:
    """`F.gelu(x, approximate="tanh")` of any shape; differentiable once by the C++ backend. Raises InputError."""
    if not x.is_floating_point():
        raise InputError(f"gelu takes floating-point tensors, not {x.dtype} {tuple(x.shape)}")
    if not _is_fast(x):
        return F.gelu(x, approximate="tanh")
    out: Tensor = _Gelu.apply(x)
    return out
