"""What stands between the matrix products of a diffusion transformer's block: gated residual, LayerNorm, modulation.

    out = x + y gate[row],  norm = LN(out) weight[row] + bias[row]

in one pass over the tokens. A table has one row for the first tokens of an item (a known first frame, whose timestep is
its own) and one for the others, where the plain expression has a copy for every token. The backward keeps `out` alone,
which the next residual adds to anyway, and computes mean and deviation again: dx = grad_out + LN'(grad_norm weight),
dy = dx gate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend, differentiable_once, plain


def _each(table: Tensor, tokens: int, first: int) -> Tensor:
    """(batches, rows, D) -> (batches, tokens or 1, D)."""
    if table.shape[1] == 1:
        return table
    return torch.cat([table[:, :1].expand(-1, first, -1), table[:, 1:].expand(-1, tokens - first, -1)], 1)


def ada_norm_reference(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, first: int, eps: float
) -> list[Tensor]:
    """The definition in plain differentiable torch: `out` where there is a y, then `norm` where there is a weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    found = []
    if y is not None:
        y = y.to(wide)
        x = (x.to(wide) + (y if gate is None else y * _each(gate, x.shape[1], first))).to(x.dtype)
        found.append(x)
    if weight is not None and bias is not None:
        norm = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
        found.append((norm * _each(weight, x.shape[1], first) + _each(bias, x.shape[1], first)).to(x.dtype))
    return found


def ada_norm_backward_reference(
    grad_out: Tensor | None, grad_norm: Tensor | None, kept: Tensor | None, gate: Tensor | None, weight: Tensor | None,
    first: int, eps: float, need_x: bool, need_y: bool,
) -> list[Tensor]:  # fmt: skip
    """What a backend computes: dx, then dy = dx gate, each where it is needed.

    kept: what went into the norm, where there is one (a `weight`, with its `grad_norm`).
    """
    dx: Tensor | None = None
    if grad_norm is not None and kept is not None and weight is not None:
        wide, sizes = weight.dtype, kept.shape[-1:]
        v, grad = kept.to(wide), grad_norm.to(wide) * _each(weight, kept.shape[1], first)
        _, mean, scale = torch.ops.aten.native_layer_norm(v, sizes, None, None, eps)
        mask = [True, False, False]
        dx = torch.ops.aten.native_layer_norm_backward(grad, v, sizes, mean, scale, None, None, mask)[0]
    if grad_out is not None:
        dx = grad_out.clone() if dx is None else grad_out + dx  # an operator's output is none of its inputs
    assert dx is not None
    like = grad_out if grad_out is not None else grad_norm
    found = [dx] if need_x else []
    if need_y and gate is not None:
        found.append(dx * _each(gate, dx.shape[1], first))
    return [each.to(like.dtype) for each in found]  # type: ignore[union-attr]


def _forward(x: Tensor, *rest: Any) -> list[Tensor]:
    fast = backend(x, "ada_norm")
    return (fast.ada_norm if fast else ada_norm_reference)(x, *rest)


def _backward(grad_out: Tensor | None, grad_norm: Tensor | None, *rest: Any) -> list[Tensor]:
    fast = backend(grad_norm if grad_out is None else grad_out, "ada_norm")
    return (fast.ada_norm_backward if fast else ada_norm_backward_reference)(grad_out, grad_norm, *rest)


# The same as operators, for whoever must see through them; see lora_linear.py.
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
        found = (_forward if plain(x) else _forward_operator)(x, y, gate, weight, bias, first, eps)
        kept = None if weight is None else x if y is None else found[0]
        ctx.facts = first, eps, y is not None
        ctx.save_for_backward(kept, gate, weight)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        first, eps, residual = ctx.facts
        kept, gate, weight = ctx.saved_tensors
        grad_out = grads[0] if residual else None
        grad_norm = grads[-1] if weight is not None else None
        if grad_norm is None:  # then the gradient passes as it is
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
            found = run(grad_out, grad_norm, kept, gate, weight, first, eps, need_plain, need_gated)
            dx = found[0] if need_plain else dx
            dy = found[-1] if need_gated else dx
        return (dx if need_x else None, dy if need_y else None, None, None, None, None, None)


def _run(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, first: int, eps: float
) -> Any:
    tables = [t for t in (gate, weight, bias) if t is not None]
    _check(x, y, tables, first)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tables):  # frozen in the method: no kernel for it
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
        weight, bias: (1 or B, 1 or 2, D) float32 (float64 for float64), 1 + scale and shift of adaptive normalisation.
            Of two rows the first is for the first `first` tokens of each item, the other for the rest.
        first: from 0 to N; without meaning where there is one row.
        eps: added to the variance.

    Returns:
        (B, N, D) in x's dtype; computed in float32 and rounded once. Differentiable once with respect to x, for which x
        alone is saved. Tables that require a gradient get it from the plain expression.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    return _run(x, None, None, weight, bias, first, eps)[0]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None, first: int = 0) -> Tensor:
    """x + y gate, x and y (B, N, D), the gate a table as in `ada_norm`; None is 1. Nothing is saved but the gate."""
    return _run(x, y, gate, None, None, first, 0.0)[0]


def residual_ada_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, first: int = 0, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(out, LN(out) weight + bias) with out = x + y gate: `gated_residual` and `ada_norm` of its result in one pass.

    The gate and the other two are tables of one shape. `out` alone is saved.
    """
    out, norm = _run(x, y, gate, weight, bias, first, eps)
    return out, norm
