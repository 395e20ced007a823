"""SwiGLU, the gate of a language model's MLP: silu(gate) up, one pass forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import backend, differentiable_once, plain, runs_triton


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition."""
    return F.silu(gate) * up


def swiglu_backward_reference(grad: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
    """The gradients of gate and up."""
    return [torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)]


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    fast = backend(gate, "swiglu")
    out: Tensor = (fast.swiglu if fast else swiglu_reference)(gate, up)
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
    fast = backend(gate, "swiglu")
    return (fast.swiglu_backward if fast else swiglu_backward_reference)(grad, gate, up)


# Registered with torch.library for torch.compile, fake tensors and dispatch modes, see `backends.plain`.
@torch.library.custom_op("vlmteacher::swiglu", mutates_args=())
def _forward_operator(gate: Tensor, up: Tensor) -> Tensor:
    return _forward(gate, up)


@torch.library.custom_op("vlmteacher::swiglu_backward", mutates_args=())
def _backward_operator(grad: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
    return _backward(grad, gate, up)


@_forward_operator.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_backward_operator.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
    return [gate.new_empty(gate.shape), gate.new_empty(gate.shape)]


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, from that of `swiglu`'s result; all of one shape and dtype."""
    run = swiglu_backward_reference
    if runs_triton(gate):
        run = _backward if plain(grad) else _backward_operator
    d_gate, d_up = run(grad, gate, up)
    return d_gate, d_up


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        run = swiglu_reference
        if runs_triton(gate):
            run = _forward if plain(gate) else _forward_operator
        return run(gate, up)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_backward(grad, *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, for two floating-point tensors of one shape, dtype and device.

    Returns a tensor like them. Differentiable once, saving only the two. Raises InputError: tensors that do not fit.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device or not gate.is_floating_point():
        kinds = ", ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (gate, up))
        raise InputError(f"swiglu takes two floating-point tensors of one shape, dtype and device, got {kinds}")
    out: Tensor = _Swiglu.apply(gate, up)
    return out
