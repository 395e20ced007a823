"""Gated residual, LayerNorm and modulation, between the matrix products of a diffusion transformer's block.

    out = x + y gate[row],  norm = LN(out) weight[row] + bias[row]

in one pass over the tokens. The tables gate, weight and bias have one row for the first tokens of an item (a given
first frame, which has a timestep of its own) and one for the others, where the plain expression has a copy per token.
The backward keeps only `out`, which the next residual keeps anyway, and recomputes mean and deviation:
dx = grad_out + LN'(grad_norm weight), dy = dx gate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend, differentiable_once, plain


def _per_token(table: Tensor, tokens: int, first: int) -> Tensor:
    """Expand a table (batches, rows, D) to (batches, tokens or 1, D)."""
    if table.shape[1] == 1:
        return table
    return torch.cat([table[:, :1].expand(-1, first, -1), table[:, 1:].expand(-1, tokens - first, -1)], 1)


def ada_norm_reference(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, first: int, eps: float
) -> list[Tensor]:
    """The definition in plain differentiable torch. Returns `out` if there is a y, then `norm` if there is a weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    results = []
    if y is not None:
        y = y.to(wide)
        x = (x.to(wide) + (y if gate is None else y * _per_token(gate, x.shape[1], first))).to(x.dtype)
        results.append(x)
    if weight is not None and bias is not None:
        norm = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
        results.append((norm * _per_token(weight, x.shape[1], first) + _per_token(bias, x.shape[1], first)).to(x.dtype))
    return results


def ada_norm_backward_reference(
    grad_out: Tensor | None, grad_norm: Tensor | None, kept: Tensor | None, gate: Tensor | None, weight: Tensor | None,
    first: int, eps: float, need_x: bool, need_y: bool,
) -> list[Tensor]:  # fmt: skip
    """The backward that a backend computes: dx if `need_x`, then dy = dx gate if `need_y`.

    kept: the input of the norm, if there is one (then `weight` and `grad_norm` are given too).
    """
    dx: Tensor | None = None
    if grad_norm is not None and kept is not None and weight is not None:
        wide, sizes = weight.dtype, kept.shape[-1:]
        v, grad = kept.to(wide), grad_norm.to(wide) * _per_token(weight, kept.shape[1], first)
        _, mean, scale = torch.ops.aten.native_layer_norm(v, sizes, None, None, eps)
        mask = [True, False, False]
        dx = torch.ops.aten.native_layer_norm_backward(grad, v, sizes, mean, scale, None, None, mask)[0]
    if grad_out is not None:
        dx = grad_out.clone() if dx is None else grad_out + dx  # an operator's output is none of its inputs
    assert dx is not None
    like = grad_out if grad_out is not None else grad_norm
    grads = [dx] if need_x else []
    if need_y and gate is not None:
        grads.append(dx * _per_token(gate, dx.shape[1], first))
    return [grad.to(like.dtype) for grad in grads]  # type: ignore[union-attr]


def _forward(x: Tensor, *rest: Any) -> list[Tensor]:
    fast = backend(x, "ada_norm")
    return (fast.ada_norm if fast else ada_norm_reference)(x, *rest)


def _backward(grad_out: Tensor | None, grad_norm: Tensor | None, *rest: Any) -> list[Tensor]:
    fast = backend(grad_norm if grad_out is None else grad_out, "ada_norm")
    return (fast.ada_norm_backward if fast else ada_norm_backward_reference)(grad_out, grad_norm, *rest)


# Registered with torch.library for torch.compile, fake tensors and dispatch modes, see `backends.plain`.
@torch.library.custom_op("vlmteacher::ada_norm", mutates_args=())
def _forward_operator(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, first: int, eps: float
) -> list[Tensor]:
    return _forward(x, y, gate, weight, bias, first, eps)


@torch.library.custom_op("vlmteacher::ada_norm_backward", mutates_args=())
def _backward_operator(
    grad_out: Tensor | None, grad_norm: Tensor | None, kept: Tensor | None, gate: Tensor | None, weight: Tensor | None,
    first: int, eps: float, need_x: bool, need_y: bool,
) -> list[Tensor]:  # fmt: skip
    return _backward(grad_out, grad_norm, kept, gate, weight, first, eps, need_x, need_y)


@_forward_operator.register_fake
def _(x: Tensor, y: Any, gate: Any, weight: Any, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for each in (y, weight) if each is not None]


@_backward_operator.register_fake
def _(grad_out: Any, grad_norm: Any, *rest: Any) -> list[Tensor]:
    like = grad_norm if grad_out is None else grad_out
    return [like.new_empty(like.shape) for need in rest[-2:] if need]


class _AdaNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        first: int, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        results = (_forward if plain(x) else _forward_operator)(x, y, gate, weight, bias, first, eps)
        kept = None if weight is None else x if y is None else results[0]
        ctx.options = first, eps, y is not None
        ctx.save_for_backward(kept, gate, weight)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        first, eps, residual = ctx.options
        kept, gate, weight = ctx.saved_tensors
        grad_out = grads[0] if residual else None
        grad_norm = grads[-1] if weight is not None else None
        if grad_norm is None:  # only `out` was used: its gradient is dx
            kept = weight = None
        need_x, need_y = ctx.needs_input_grad[:2]
        need_gated = need_y and gate is not None
        dx = dy = None
        if weight is None:
            if grad_out is None:
                return (None,) * 7
            dx = dy = grad_out
            need_plain = False
        else:
            need_plain = need_x or (need_y and gate is None)
        if need_plain or need_gated:
            like: Any = grad_norm if grad_out is None else grad_out
            run = _backward if plain(like) else _backward_operator
            computed = run(grad_out, grad_norm, kept, gate, weight, first, eps, need_plain, need_gated)
            dx = computed[0] if need_plain else dx
            dy = computed[-1] if need_gated else dx
        return (dx if need_x else None, dy if need_y else None, None, None, None, None, None)


def _run(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, first: int, eps: float
) -> Any:
    tables = [t for t in (gate, weight, bias) if t is not None]
    _check(x, y, tables, first)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tables):  # the method freezes them: no kernel
        return ada_norm_reference(x, y, gate, weight, bias, first, eps)
    gate, weight, bias = (None if t is None else t.contiguous() for t in (gate, weight, bias))
    return _AdaNorm.apply(x, y, gate, weight, bias, first, eps)


def _check(x: Tensor, y: Tensor | None, tables: list[Tensor], first: int) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise InputError(f"ada_norm takes a floating-point x (B, N, D), got {x.dtype} {tuple(x.shape)}")
    if y is not None and (y.shape != x.shape or y.dtype != x.dtype or y.device != x.device):
        raise InputError(
            f"y must be like x: x is {x.dtype} {tuple(x.shape)} on {x.device}, y {y.dtype} {tuple(y.shape)} on"
            f" {y.device}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    for table in tables:
        if table.dim() != 3 or table.shape[0] not in (1, len(x)) or table.shape[2] != x.shape[2]:
            raise InputError(f"a table of {tuple(table.shape)} is none of (1 or {len(x)}, 1 or 2, {x.shape[2]})")
        if table.shape != tables[0].shape or table.shape[1] not in (1, 2):
            raise InputError(f"tables must be of one shape with 1 or 2 rows: {[tuple(t.shape) for t in tables]}")
        if table.dtype != wide or table.device != x.device:
            raise InputError(f"a table for {x.dtype} on {x.device} must be {wide} there: {table.dtype}, {table.device}")
    if not 0 <= first <= x.shape[1]:
        raise InputError(f"first must be from 0 to the {x.shape[1]} tokens, not {first}")


def ada_norm(x: Tensor, weight: Tensor, bias: Tensor, first: int = 0, eps: float = 1e-6) -> Tensor:
    """LayerNorm and modulation: LN(x) weight + bias.

    Args:
        x: (B, N, D) tokens, floating point.
        weight, bias: (1 or B, 1 or 2, D) float32 (float64 if x is), 1 + scale and shift of adaptive normalisation. Of
            two rows the first applies to the first `first` tokens of each item, the second to the rest.
        first: from 0 to N; ignored if the tables have one row.
        eps: added to the variance.

    Returns:
        (B, N, D) in x's dtype, computed in float32 and rounded once. Differentiable once with respect to x, saving only
        x. If a table requires a gradient, the plain expression is used.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    return _run(x, None, None, weight, bias, first, eps)[0]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None, first: int = 0) -> Tensor:
    """x + y gate for x and y (B, N, D) and a table `gate` as in `ada_norm` (None: 1). Saves only the gate.

    Raises InputError: shapes, dtypes or devices that do not fit.
    """
    return _run(x, y, gate, None, None, first, 0.0)[0]


def residual_ada_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, first: int = 0, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(out, LN(out) weight + bias) with out = x + y gate: `gated_residual`, then `ada_norm` of it, in one pass.

    The three tables have one shape. Saves only `out`. Raises InputError: shapes, dtypes or devices that do not fit.
    """
    out, norm = _run(x, y, gate, weight, bias, first, eps)
    return out, norm
