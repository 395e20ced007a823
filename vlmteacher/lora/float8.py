"""The frozen products of a transformer in 8-bit floating point (e4m3), for GPUs that have such products.

The weight is quantised once, with a scale for each output; inputs and gradients at every product, with a scale for each
token. Only the LoRA is trained, so the backward has one product a layer, dx = dy W, with the same 8-bit weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmteacher.errors import InputError
from vlmteacher.ops.linear import is_plain
from vlmteacher.reasoners.checkpointing import block_list

FLOAT8, LARGEST = torch.float8_e4m3fn, 448.0
LEAST_CAPABILITY = (8, 9)  # compute capability of the first GPUs with such products
MULTIPLE = 16  # of both sides of a weight, which these products demand


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError for a device without products in 8-bit floating point, and a dtype that they do not give."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY:
        if dtype != torch.bfloat16:
            raise InputError(f"fp8 products give bfloat16, not {str(dtype).removeprefix('torch.')}: take bfloat16")
        return
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    raise InputError(
        f"fp8 needs a GPU with 8-bit products (compute capability 8.9 and up), the Reasoner is on {what}: leave it out"
    )


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (R, C) in e4m3, and the scale (R, 1) float32 of each row; x is their product, to 1/16 of each number."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_(min=1e-30).div_(LARGEST)
    return (x / scale).to(FLOAT8), scale


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b^T in `dtype` of a (M, K) and b (N, K), e4m3, with scales (M, 1) and (N, 1)."""
    if a.device.type == "cpu":  # in tests only, see `check_float8`: the products of the same numbers
        return ((a.float() * scale_a) @ (b.float() * scale_b).T).to(dtype)
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=dtype, use_fast_accum=False)


class _Linear(torch.autograd.Function):
    """x (M, K) -> x W^T (M, N), of the quantised x and W. Saves nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows, row_scale = quantize(x)
        return _product(rows, weight, row_scale, scale, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        # The weight's scales are within the sum over its outputs: they go with the gradient.
        rows, row_scale = quantize(grad * scale.T.to(grad.dtype))
        ones = torch.ones(weight.shape[1], 1, device=grad.device)
        return _product(rows, weight.T.contiguous(), row_scale, ones, grad.dtype), None, None


class Float8Linear(nn.Linear):
    """A frozen `nn.Linear` with its weight in e4m3 and `scale` (out, 1) float32. Differentiable in x."""

    scale: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> Float8Linear:
        """Turn a linear layer into one, in place; its weight is replaced."""
        weight, scale = quantize(linear.weight.detach())
        linear.__class__ = cls
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_buffer("scale", scale)
        return cast(Float8Linear, linear)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(input.flatten(0, -2), self.weight, self.scale)
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, input.shape[:-1])


def _layers(transformer: Any) -> list[nn.Linear]:
    """The linear layers of a diffusers transformer's blocks, but for those with a side that is no multiple of 16."""
    layers = [layer for layer in block_list(transformer).modules() if is_plain(layer)]
    return [layer for layer in layers if not any(side % MULTIPLE for side in layer.weight.shape)]


def saved_bytes(transformer: Any) -> int:
    """The bytes of weights that `quantize_blocks` saves on a transformer without a LoRA."""
    return sum(layer.weight.nbytes - layer.weight.numel() - 4 * layer.out_features for layer in _layers(transformer))


def quantize_blocks(transformer: Any) -> None:
    """Quantise the linear layers of a diffusers transformer's blocks, in place."""
    for layer in _layers(transformer):
        Float8Linear.of(layer)


def quantize_reasoner(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """Quantise the blocks of a Reasoner's transformers, in place; return the entry of run.json."""
    for name, network in networks.items():
        if name.startswith("transformer"):
            quantize_blocks(network)
    return {"fp8": "the Reasoner's blocks, e4m3"}


def is_float8(transformer: nn.Module) -> bool:
    """Whether `quantize_blocks` has been here."""
    return any(isinstance(layer, Float8Linear) for layer in transformer.modules())
