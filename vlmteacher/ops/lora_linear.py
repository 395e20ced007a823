"""Frozen linear layers with a LoRA, forward and backward, without the y-sized detours of the plain expression.

y = x W^T + b + s (x A^T) B^T. The low-rank product is added by the matrix product itself (one pass over y instead of
four), x is saved once for all layers that share it, and the frozen weight gets no gradient:
S = x A^T, dS = s dy B, dA = dS^T x, dB = s dy^T S, dx = dy W + dS A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmteacher.errors import InputError


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """The definition of `lora_linear`, in plain differentiable torch."""
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, lora_a), lora_b)


@torch.library.custom_op("vlmteacher::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
) -> list[Tensor]:
    """x (M, K) -> each layer's y (M, N), then S (M, sum of the ranks). `biases`: one for each layer, or none at all."""
    s = x @ torch.cat(list(lora_a)).T if len(lora_a) > 1 else x @ lora_a[0].T
    found, start = [], 0
    for i, (weight, b) in enumerate(zip(weights, lora_b, strict=True)):
        y = torch.addmm(biases[i], x, weight.T) if biases else x @ weight.T
        found.append(y.addmm_(s[:, start : start + b.shape[1]], b.T, alpha=scaling[i]))
        start += b.shape[1]
    return [*found, s]


@torch.library.custom_op("vlmteacher::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> list[Tensor]:
    """dx where it is needed, then every dA, then every dB, where they are needed."""
    ranks = [b.shape[1] for b in lora_b]
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    found: list[Tensor] = []
    ds = x.new_empty(s.shape) if need_x or need_a else None
    if ds is not None:
        for grad, b, factor, start in zip(grads, lora_b, scaling, starts, strict=True):
            part = ds[:, start : start + b.shape[1]]
            torch.addmm(part, grad, b, beta=0, alpha=factor, out=part)
    if need_x:
        assert ds is not None
        dx = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            dx.addmm_(grad, weight)
        found.append(dx.addmm_(ds, torch.cat(list(lora_a))))
    if need_a:
        assert ds is not None
        found += [part.clone() for part in (ds.T @ x).split(ranks)]
    if need_b:
        for grad, factor, start, rank in zip(grads, scaling, starts, ranks, strict=True):
            found.append((grad.T @ s[:, start : start + rank]).mul_(factor))
    return found


@_lora_linear.register_fake
def _(x: Tensor, weights: Any, biases: Any, lora_a: Any, lora_b: Any, scaling: Any) -> list[Tensor]:
    return [*(x.new_empty(len(x), len(w)) for w in weights), x.new_empty(len(x), sum(len(a) for a in lora_a))]


@_lora_linear_backward.register_fake
def _(
    grads: Any, x: Tensor, s: Tensor, weights: Any, lora_a: Any, lora_b: Any, scaling: Any,
    need_x: bool, need_a: bool, need_b: bool,
) -> list[Tensor]:  # fmt: skip
    like = ([x] if need_x else []) + (list(lora_a) if need_a else []) + (list(lora_b) if need_b else [])
    return [x.new_empty(tensor.shape) for tensor in like]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, lora_a, lora_b, ctx.scaling = inputs
    ctx.layers, ctx.biased = len(weights), len(biases) > 0
    ctx.save_for_backward(x, output[-1], *weights, *lora_a, *lora_b)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, s, *rest = ctx.saved_tensors
    n = ctx.layers
    weights, lora_a, lora_b = rest[:n], rest[n : 2 * n], rest[2 * n :]
    grads = [grad.contiguous() for grad in grads[:n]]  # the last is that of S, which nobody is given
    need_x, _, need_bias, need_a, need_b, _ = ctx.needs_input_grad
    needs = (bool(need_x), _any(need_a), _any(need_b))
    found = _lora_linear_backward(grads, x, s, weights, lora_a, lora_b, ctx.scaling, *needs)
    dx = found.pop(0) if needs[0] else None
    da = found[:n] if needs[1] else [None] * n
    db = found[-n:] if needs[2] else [None] * n
    dbias = ([grad.sum(0) for grad in grads] if _any(need_bias) else [None] * n) if ctx.biased else []
    return dx, [None] * n, dbias, da, db, None


def _any(needs: Any) -> bool:
    return any(needs) if isinstance(needs, list | tuple) else bool(needs)


_lora_linear.register_autograd(_differentiate, setup_context=_save)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """A frozen linear layer with a LoRA: x W^T + b + scaling (x A^T) B^T.

    Args:
        x: (..., K), any strides, floating point. Under autocast it is cast first, as a linear layer's input is.
        weight, bias: (N, K) and (N,) or None. The weight is frozen: it may not require a gradient.
        lora_a, lora_b: (r, K) and (N, r) with r at least 1; of another dtype than x (PEFT keeps them in float32) they
            are cast to that of x.
        scaling: s, a number.

    Returns:
        (..., N). Differentiable, once, with respect to x, bias, lora_a and lora_b, or any of them.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, a rank of 0, or a weight that requires a gradient.
    """
    return lora_linear_group(x, [weight], None if bias is None else [bias], [lora_a], [lora_b], [scaling])[0]


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
) -> list[Tensor]:
    """`lora_linear` of several layers that share x (q, k and v), which is read and saved once for all.

    One entry a layer in each sequence; `biases` is None where no layer has one. See `lora_linear`.
    """
    _check(x, weights, biases, lora_a, lora_b, scaling)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    dtype, leading = x.dtype, x.shape[:-1]
    weights, lora_a, lora_b = ([t.to(dtype) for t in tensors] for tensors in (weights, lora_a, lora_b))
    biases = [bias.to(dtype) for bias in biases or ()]
    *found, _ = _lora_linear(
        x.reshape(-1, x.shape[-1]), weights, biases, lora_a, lora_b, [float(factor) for factor in scaling]
    )
    return [y.view(*leading, y.shape[-1]) for y in found]


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
) -> None:
    n = len(weights)
    if not n or any(len(each) != n for each in (lora_a, lora_b, scaling)) or (biases is not None and len(biases) != n):
        raise InputError(f"{n} weights need as many biases (or None), lora_a, lora_b and scaling")
    if not x.dim() or not x.is_floating_point():
        raise InputError(f"lora_linear takes a floating-point x (..., K), got {x.dtype} {tuple(x.shape)}")
    for i, (weight, a, b) in enumerate(zip(weights, lora_a, lora_b, strict=True)):
        bias = None if biases is None else biases[i]
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_a {tuple(a.shape)}, lora_b {tuple(b.shape)}"
        if bias is not None:
            shapes += f", bias {tuple(bias.shape)}"
        fits = weight.dim() == 2 and weight.shape[1] == x.shape[-1] and a.dim() == 2 and b.dim() == 2
        fits = fits and a.shape[1] == weight.shape[1] and b.shape == (weight.shape[0], a.shape[0])
        if not fits or (bias is not None and bias.shape != weight.shape[:1]):
            raise InputError(f"shapes do not fit (..., K), (N, K), (r, K), (N, r), (N,): {shapes}")
        if not len(a):
            raise InputError(f"the LoRA rank must be at least 1: {shapes}")
        tensors = [weight, a, b] if bias is None else [weight, a, b, bias]
        if any(t.device != x.device for t in tensors):
            raise InputError(
                f"tensors on several devices: x on {x.device}, the layer on {[str(t.device) for t in tensors]}"
            )
        if not all(t.is_floating_point() for t in tensors):
            raise InputError(f"lora_linear takes floating-point weights, got {[str(t.dtype) for t in tensors]}")
        if weight.requires_grad:
            raise InputError("the weight of a lora_linear is frozen: call weight.requires_grad_(False)")
