"""RMSNorm over the last dimension, as the decoder layers of language models have it:

    norm = (x / sqrt(mean(x^2) + eps), rounded to x's dtype) weight

The weight is frozen; the backward keeps only x and recomputes its mean square. Both halves are functions of their own
too, for autograd functions that hold more than a norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend, differentiable_once, plain, runs_triton


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    return inverse.div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition."""
    return (x * _inverse_rms(x, eps)).to(x.dtype) * weight


def rms_norm_backward_reference(grad: Tensor, x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> Tensor:
    """The gradient of x, plus `added`."""
    inverse = _inverse_rms(x, eps)
    unit = x * inverse
    grad = (grad * weight).float()
    dx = (grad - unit * (grad * unit).mean(-1, keepdim=True)).mul_(inverse).to(x.dtype)
    return dx if added is None else added + dx


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    fast = backend(x, "rms_norm")
    norm: Tensor = (fast.rms_norm if fast else rms_norm_reference)(x, weight, eps)
    return norm


def _backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> Tensor:
    fast = backend(x, "rms_norm")
    dx: Tensor = (fast.rms_norm_backward if fast else rms_norm_backward_reference)(grad, x, weight, eps, added)
    return dx


# Registered with torch.library for torch.compile, fake tensors and dispatch modes, see `backends.plain`.
@torch.library.custom_op("vlmteacher::rms_norm", mutates_args=())
def _forward_operator(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _forward(x, weight, eps)


@torch.library.custom_op("vlmteacher::rms_norm_backward", mutates_args=())
def _backward_operator(grad: Tensor, x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> Tensor:
    return _backward(grad, x, weight, eps, added)


@_forward_operator.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` for the inside of an autograd function."""
    run = rms_norm_reference
    if runs_triton(x) and weight.dtype == x.dtype:
        run = _forward if plain(x) else _forward_operator
    return run(x, weight, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> Tensor:
    """The gradient of x (..., C) from that of its norm; `added`, which came by a residual, is added to it."""
    run = rms_norm_backward_reference
    if runs_triton(x) and weight.dtype == x.dtype:
        run = _backward if plain(grad) else _backward_operator
    return run(grad, x, weight, eps, added)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return rms_norm_forward(x, weight, eps)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        return rms_norm_backward(grad, x, weight, ctx.eps), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension, with a frozen weight.

    Args:
        x: (..., C), floating point.
        weight: (C,) of x's dtype, without gradient.
        eps: added to the mean square.

    Returns:
        (..., C) in x's dtype, computed in float32. Differentiable once with respect to x, saving only x.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or a weight that requires a gradient.
    """
    fits = x.dim() > 0 and x.is_floating_point() and weight.shape == x.shape[-1:]
    if not fits or weight.dtype != x.dtype or weight.device != x.device:
        raise InputError(
            f"rms_norm takes a floating-point x (..., C) and a weight (C,) like it, got {x.dtype} {tuple(x.shape)} on"
            f" {x.device} and {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise InputError("rms_norm has no gradient for its weight: freeze it")
    norm: Tensor = _RMSNorm.apply(x, weight, eps)
    return norm
