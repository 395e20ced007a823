"""Queries and keys before attention: RMSNorm over all heads' channels and rotary position embedding, in one pass.

    n = x weight / sqrt(mean(x^2) + eps),  (y_2i, y_2i+1) = (n_2i cos_i - n_2i+1 sin_i, n_2i sin_i + n_2i+1 cos_i)

The backward keeps only x and recomputes its mean square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend, differentiable_once, plain


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate each pair of channels of each head of x (B, N, C) by the angles of cos and sin (N, C / heads / 2)."""
    even, odd = x.unflatten(-1, (heads, -1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-3)


def qk_norm_rope_reference(
    xs: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor | None, sin: Tensor | None, heads: int, eps: float
) -> list[Tensor]:
    """The definition in plain differentiable torch."""
    ys = []
    for x, weight in zip(xs, weights, strict=True):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps)
        ys.append((y if cos is None or sin is None else _rotate_pairs(y, cos, sin, heads)).to(x.dtype))
    return ys


def qk_norm_rope_backward_reference(
    grads: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor | None, sin: Tensor | None,
    heads: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of the xs, from those of the ys."""
    dxs = []
    for grad, x, weight in zip(grads, xs, weights, strict=True):
        wide = torch.promote_types(x.dtype, torch.float32)
        g, v = grad.to(wide), x.to(wide)
        g = (g if cos is None or sin is None else _rotate_pairs(g, cos, -sin, heads)) * weight.to(wide)
        scale = (v.square().mean(-1, keepdim=True) + eps).rsqrt()
        along = (g * v).mean(-1, keepdim=True) * scale.square()
        dxs.append(((g - v * along) * scale).to(x.dtype))
    return dxs


def _forward(xs: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    fast = backend(xs[0], "qk_norm_rope")
    return (fast.qk_norm_rope if fast else qk_norm_rope_reference)(xs, *rest)


def _backward(grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    fast = backend(grads[0], "qk_norm_rope")
    return (fast.qk_norm_rope_backward if fast else qk_norm_rope_backward_reference)(grads, *rest)


# Registered with torch.library for torch.compile, fake tensors and dispatch modes, see `backends.plain`.
@torch.library.custom_op("vlmteacher::qk_norm_rope", mutates_args=())
def _forward_operator(
    xs: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor | None, sin: Tensor | None, heads: int, eps: float
) -> list[Tensor]:
    return _forward(xs, weights, cos, sin, heads, eps)


@torch.library.custom_op("vlmteacher::qk_norm_rope_backward", mutates_args=())
def _backward_operator(
    grads: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor | None, sin: Tensor | None,
    heads: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    return _backward(grads, xs, weights, cos, sin, heads, eps)


@_forward_operator.register_fake
@_backward_operator.register_fake
def _(xs: Any, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in xs]


class _QKNormRope(torch.autograd.Function):
    """The ys from cos, sin, heads, eps, all xs and all weights."""

    @staticmethod
    def forward(
        ctx: Any, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n = len(tensors) // 2
        run = _forward if plain(tensors[0]) else _forward_operator
        ys = run(tensors[:n], tensors[n:], cos, sin, heads, eps)
        ctx.options = heads, eps
        ctx.save_for_backward(cos, sin, *tensors)
        return tuple(ys)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        heads, eps = ctx.options
        cos, sin, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        wanted = [i for i in range(len(grads)) if needs[i]]
        run = _backward if plain(grads[0]) else _backward_operator
        xs, weights = tensors[: len(grads)], tensors[len(grads) :]
        dxs = run([grads[i] for i in wanted], [xs[i] for i in wanted], [weights[i] for i in wanted],
                  cos, sin, heads, eps)  # fmt: skip
        dx = dict(zip(wanted, dxs, strict=True))
        return (None, None, None, None, *(dx.get(i) for i in range(len(grads))), *[None] * len(grads))


def qk_norm_rope(
    xs: Sequence[Tensor], weights: Sequence[Tensor], rope: tuple[Tensor, Tensor] | None, heads: int, eps: float = 1e-6
) -> list[Tensor]:
    """RMSNorm over all channels and rotary position embedding, of queries and keys together.

    Args:
        xs: (B, N, C) each, floating point; without `rope` N may differ between them.
        weights: (C,) for each x, of any floating dtype. If one requires a gradient, the plain expression is used.
        rope: cos and sin, (N, C / heads / 2) float32 (float64 if x is), of the angles by which pairs of neighbouring
            channels of every head are rotated; None leaves out the rotation.
        heads: number of heads, each with C / heads channels, an even number.
        eps: added to the mean square.

    Returns:
        (B, N, C) for each x, in its dtype, computed in float32 and rounded once. Differentiable once with respect to
        the xs, saving only them.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.

    Source: `WanAttnProcessor` of diffusers (norm_q, norm_k, apply_rotary_emb).
    """
    _check(xs, weights, rope, heads)
    cos, sin = rope or (None, None)
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return qk_norm_rope_reference(xs, weights, cos, sin, heads, eps)
    weights = [weight.to(x.dtype) for weight, x in zip(weights, xs, strict=True)]
    return list(_QKNormRope.apply(cos, sin, heads, eps, *xs, *weights))


def _check(xs: Sequence[Tensor], weights: Sequence[Tensor], rope: tuple[Tensor, Tensor] | None, heads: int) -> None:
    if not xs or len(xs) != len(weights):
        raise InputError(f"{len(xs)} tensors need as many weights, not {len(weights)}")
    for x, weight in zip(xs, weights, strict=True):
        if x.dim() != 3 or not x.is_floating_point() or x.dtype != xs[0].dtype or x.device != xs[0].device:
            kinds = [f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in xs]
            raise InputError(f"qk_norm_rope takes floating-point (B, N, C) of one dtype and device, got {kinds}")
        if weight.shape != x.shape[-1:] or weight.device != x.device or not weight.is_floating_point():
            raise InputError(
                f"a weight, {weight.dtype} {tuple(weight.shape)} on {weight.device}, does not fit {x.dtype}"
                f" {tuple(x.shape)} on {x.device}"
            )
        if heads < 1 or x.shape[2] % (2 * heads):
            raise InputError(f"{x.shape[2]} channels make no {heads} heads of whole pairs")
        for table in rope or ():
            wide, shape = torch.promote_types(x.dtype, torch.float32), (x.shape[1], x.shape[2] // heads // 2)
            if table.shape != shape or table.dtype != wide or table.device != x.device:
                raise InputError(
                    f"cos and sin must be {wide} {shape} on {x.device}, not {table.dtype} {tuple(table.shape)} on"
                    f" {table.device}"
                )
