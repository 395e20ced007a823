"""Frozen linear layers, whose bfloat16 products are made in float32 on processors without instructions for them.

There torch multiplies bfloat16 at a fifth of float32's speed or less (`ops/processors.py`). The inputs are widened, and
the sum is rounded once; nothing is kept but the frozen weight.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmteacher.ops.backends import cpp_status, without_data
from vlmteacher.ops.processors import VENDOR, serving

cpp_status()  # loads the operators here, for torch.compile cannot trace it

Network = TypeVar("Network", bound=nn.Module)


def _widens(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return serving("linear", x.dtype) == VENDOR and not without_data(x)  # a plan is for other processors


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times a frozen weight (N, K), transposed, plus the bias (N,); without a gradient."""
    if not _widens(x):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def linear_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient at the input of a frozen linear layer: grad (..., N) times its weight (N, K)."""
    if not _widens(grad):
        return grad @ weight
    return (grad.float() @ weight.float()).to(grad.dtype)


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear_forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return linear_backward(grad, *ctx.saved_tensors), None, None


class FrozenLinear(nn.Linear):
    """An `nn.Linear` that is not trained. Differentiable in its input, once; as `nn.Linear` where it is trained."""

    def forward(self, input: Tensor) -> Tensor:
        if not _widens(input):  # asked first, for it is the answer on every GPU
            return super().forward(input)
        weight, bias = self.weight, self.bias
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or input.dtype != weight.dtype:
            return super().forward(input)
        return _Widened.apply(input, weight, bias)


def is_plain(layer: object) -> bool:
    """Whether a layer is `nn.Linear` itself, frozen or not, and no other class that has a forward of its own."""
    return type(layer) in (nn.Linear, FrozenLinear)


def frozen(network: Network) -> Network:
    """Freeze a network, in place, for evaluation: no gradients of its weights, its linear layers `FrozenLinear`s."""
    for module in network.eval().requires_grad_(False).modules():
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter:  # and none of torchao's
            module.__class__ = FrozenLinear
    return network
