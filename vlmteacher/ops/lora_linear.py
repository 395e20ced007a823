"""Frozen linear layers with a LoRA, y = x W^T + b + s (x A^T) B^T, forward and backward.

The plain expression makes four passes over tensors of y's size. Here the matrix product adds the low-rank product
itself, x is saved once for all layers that share it, and the frozen weight gets no gradient:
S = x A^T, dS = s dy B, dA = dS^T x, dB = s dy^T S, dx = dy W + dS A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend, differentiable_once, plain

Weight: TypeAlias = "Tensor | Callable[[torch.dtype], Tensor]"


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """The definition of `lora_linear`, in plain differentiable torch."""
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, lora_a), lora_b)


def lora_linear_group_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
) -> list[Tensor]:
    """The forward that a backend computes: from x (M, K) each layer's y (M, N), then S (M, sum of the ranks).

    All tensors have one dtype. `biases` has one entry for each layer, or is empty.
    """
    s = x @ (torch.cat(list(lora_a)) if len(lora_a) > 1 else lora_a[0]).T
    ys, start = [], 0
    for i, (weight, b) in enumerate(zip(weights, lora_b, strict=True)):
        y = torch.addmm(biases[i], x, weight.T) if biases else x @ weight.T
        ys.append(y.addmm_(s[:, start : start + b.shape[1]], b.T, alpha=scaling[i]))
        start += b.shape[1]
    return [*ys, s]


def lora_linear_group_backward_reference(
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
    """The backward that a backend computes: dx, then every dA, then every dB, each of them if it is needed."""
    ranks = [b.shape[1] for b in lora_b]
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    results: list[Tensor] = []
    if need_x or need_a:
        ds = torch.cat([(grad @ b).mul_(factor) for grad, b, factor in zip(grads, lora_b, scaling, strict=True)], 1)
        if need_x:
            dx = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                dx.addmm_(grad, weight)
            results.append(dx.addmm_(ds, torch.cat(list(lora_a))))
        if need_a:
            results += [part.clone() for part in (ds.T @ x).split(ranks)]
    if need_b:
        for grad, factor, start, rank in zip(grads, scaling, starts, ranks, strict=True):
            results.append((grad.T @ s[:, start : start + rank]).mul_(factor))
    return results


def _forward(x: Tensor, weights: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    fast = backend(x, "lora_linear", weights)
    return (fast.lora_linear if fast else lora_linear_group_reference)(x, weights, *rest)


def _backward(grads: Sequence[Tensor], x: Tensor, s: Tensor, weights: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    fast = backend(grads[0], "lora_linear", weights)
    return (fast.lora_linear_backward if fast else lora_linear_group_backward_reference)(grads, x, s, weights, *rest)


# Registered with torch.library for torch.compile, fake tensors and dispatch modes, see `backends.plain`. Other calls go
# to the two functions above: a registered operator's overhead exceeds a small layer's arithmetic.
@torch.library.custom_op("vlmteacher::lora_linear", mutates_args=())
def _forward_operator(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
) -> list[Tensor]:
    return _forward(x, weights, biases, lora_a, lora_b, scaling)


@torch.library.custom_op("vlmteacher::lora_linear_backward", mutates_args=())
def _backward_operator(
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
    return _backward(grads, x, s, weights, lora_a, lora_b, scaling, need_x, need_a, need_b)


@_forward_operator.register_fake
def _(x: Tensor, weights: Any, biases: Any, lora_a: Any, lora_b: Any, scaling: Any) -> list[Tensor]:
    return [*(x.new_empty(len(x), len(w)) for w in weights), x.new_empty(len(x), sum(len(a) for a in lora_a))]


@_backward_operator.register_fake
def _(
    grads: Any, x: Tensor, s: Tensor, weights: Any, lora_a: Any, lora_b: Any, scaling: Any,
    need_x: bool, need_a: bool, need_b: bool,
) -> list[Tensor]:  # fmt: skip
    dx = [grads[0].new_empty(len(grads[0]), weights[0].shape[1])] if need_x else []
    return dx + [t.new_empty(t.shape) for t in (*(lora_a if need_a else ()), *(lora_b if need_b else ()))]


class _LoRALinear(torch.autograd.Function):
    """Each layer's y (..., N) from x (..., K), all weights, all biases (or none), all A and all B.

    Weights that are functions are called in the forward and again in the backward, which saves none of their results.

    For a small layer every line of Python here is a per cent of the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: int, scaling: list[float], *tensors: Any) -> tuple[Tensor, ...]:
        dtype, cut = x.dtype, len(tensors) - 2 * layers
        makers = () if isinstance(tensors[0], Tensor) else tensors[:layers]
        if makers:
            tensors = (*(make(dtype) for make in makers), *tensors[layers:])
        frozen, factors = tensors[:cut], tensors[cut:]
        for t in frozen:
            if t.dtype != dtype:  # under autocast
                frozen = tuple(t.to(dtype) for t in frozen)
                break
        # the C++ backend takes PEFT's float32 factors beside a bfloat16 x, and returns their gradients in float32
        if not (dtype == torch.bfloat16 and x.is_cpu and backend(x, "lora_linear")):
            factors = tuple(t.to(dtype) for t in factors)
        weights, a, b = frozen[:layers], factors[:layers], factors[layers:]
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        *ys, s = (_forward if plain(x) else _forward_operator)(rows, weights, frozen[layers:], a, b, scaling)
        needs = ctx.needs_input_grad
        need_a, need_b = True in needs[cut + 3 : -layers], True in needs[-layers:]
        ctx.options = layers, scaling, x.shape, needs, need_a, need_b, [t.dtype for t in tensors[cut:]], makers, dtype
        # a factor stands in for x or S if the backward does not need it
        kept = () if makers else weights
        ctx.save_for_backward(rows if need_a else a[0], s if need_b else a[0], *kept, *factors)
        return tuple(ys) if rows is x else tuple([y.view(*x.shape[:-1], y.shape[-1]) for y in ys])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        n, scaling, shape, needs, need_a, need_b, dtypes, makers, dtype = ctx.options
        rows, s, *tensors = ctx.saved_tensors
        if makers:
            tensors = [*(make(dtype) for make in makers), *tensors]
        flat = [(g if g.dim() == 2 else g.reshape(-1, g.shape[-1])).contiguous() for g in grads]
        run = _backward if plain(flat[0]) else _backward_operator
        out = run(flat, rows, s, tensors[:n], tensors[n : 2 * n], tensors[2 * n :], scaling, needs[0], need_a, need_b)
        dx = None
        if needs[0]:
            dx, *out = out
            dx = dx if len(shape) == 2 else dx.view(shape)
        if not (need_a and need_b):
            out = [*(out if need_a else [None] * n), *(out if need_b else [None] * n)]
        factors = [d if d is None or d.dtype == t else d.to(t) for d, t in zip(out, dtypes, strict=True)]
        biases = [g.sum(0) if need else None for g, need in zip(flat, needs[3 + n : -2 * n], strict=False)]
        return (dx, None, None, *[None] * n, *biases, *factors)


# `apply` without its handling of torch.func's transforms, whose presence `_transforms` reports
_bare_apply = super(torch.autograd.Function, _LoRALinear).apply
_transforms = torch._C._are_functorch_transforms_active


def lora_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """A frozen linear layer with a LoRA: x W^T + b + scaling (x A^T) B^T.

    Args:
        x: (..., K), any strides, floating point. Under autocast it is cast first, as a linear layer's input is.
        weight, bias: (N, K) and (N,) or None. The weight is frozen: it may not require a gradient. A function of a
            dtype that makes the weight, as of a quantised one, is called in the forward and again in the backward.
        lora_a, lora_b: (r, K) and (N, r) with r at least 1, cast to x's dtype (PEFT keeps them in float32).
        scaling: the factor s.

    Returns:
        (..., N). Differentiable once with respect to any of x, bias, lora_a and lora_b.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, a rank of 0, or a weight that requires a gradient.
    """
    return lora_linear_group(x, [weight], None if bias is None else [bias], [lora_a], [lora_b], [scaling])[0]


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor] | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
) -> list[Tensor]:
    """`lora_linear` of several layers that share x (q, k and v), which is read and saved once for all of them.

    Each sequence has one entry per layer; `biases` is None if no layer has one. All weights are tensors, or all are
    functions. Raises InputError as `lora_linear`.
    """
    _check(x, weights, biases, lora_a, lora_b, scaling)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    apply = _LoRALinear.apply if torch.compiler.is_compiling() or _transforms() else _bare_apply
    return list(apply(x, len(weights), [float(s) for s in scaling], *weights, *(biases or ()), *lora_a, *lora_b))


def _check(
    x: Tensor,
    weights: Sequence[Weight],
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
    for weight, bias, a, b in zip(weights, biases or [None] * n, lora_a, lora_b, strict=True):
        if isinstance(weight, Tensor) and not _fits(x, weight, bias, a, b):
            _check_layer(x, {"weight": weight, "lora_a": a, "lora_b": b} | ({} if bias is None else {"bias": bias}))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> bool:
    """Whether a layer's arguments are valid, decided in a few microseconds for the usual layer."""
    if b.dim() != 2 or not b.shape[1]:
        return False
    (n, rank), k, device = b.shape, x.shape[-1], x.device
    return (
        weight.shape == (n, k)
        and a.shape == (rank, k)
        and weight.dtype == x.dtype
        and a.is_floating_point()
        and b.is_floating_point()
        and weight.device == a.device == b.device == device
        and (bias is None or (bias.shape == (n,) and bias.dtype == x.dtype and bias.device == device))
        and not weight.requires_grad
    )


def _check_layer(x: Tensor, layer: dict[str, Tensor]) -> None:
    """Raise the InputError that says why a layer cannot be computed; a layer that autocast makes valid passes."""
    weight, a, b = layer["weight"], layer["lora_a"], layer["lora_b"]

    def shapes() -> str:
        return ", ".join(f"{name} {tuple(t.shape)}" for name, t in ({"x": x} | layer).items())

    fits = weight.dim() == 2 and weight.shape[1] == x.shape[-1] and a.dim() == 2 and b.dim() == 2
    fits = fits and a.shape[1] == weight.shape[1] and b.shape == (weight.shape[0], a.shape[0])
    if not fits or ("bias" in layer and layer["bias"].shape != weight.shape[:1]):
        raise InputError(f"shapes do not fit (..., K), (N, K), (r, K), (N, r), (N,): {shapes()}")
    if not a.shape[0]:
        raise InputError(f"the LoRA rank must be at least 1: {shapes()}")
    if any(t.device != x.device for t in layer.values()):
        devices = ", ".join(f"{name} on {t.device}" for name, t in ({"x": x} | layer).items())
        raise InputError(f"lora_linear takes tensors on one device: {devices}")
    if not all(t.is_floating_point() for t in layer.values()):
        raise InputError(f"lora_linear takes floating-point weights, got {[str(t.dtype) for t in layer.values()]}")
    frozen = {name: t.dtype for name, t in layer.items() if name in ("weight", "bias")}
    if any(dtype != x.dtype for dtype in frozen.values()) and not torch.is_autocast_enabled(x.device.type):
        dtypes = ", ".join(f"{name} {dtype}" for name, dtype in ({"x": x.dtype} | frozen).items())
        raise InputError(f"lora_linear takes x, weight and bias of one dtype (or autocast): {dtypes}")
    if weight.requires_grad:
        raise InputError("the weight of a lora_linear is frozen: call weight.requires_grad_(False)")
