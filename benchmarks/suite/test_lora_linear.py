"""Forward + backward of one group of LoRA layers at a time; see README.md here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.lora_linear import SHAPES, layers
from vlmteacher.ops.lora_linear import lora_linear_group


@pytest.mark.parametrize("which", ["ours", "peft", "frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:6], ids=lambda shape: shape[0].replace(" ", "-"))
def test_forward_and_backward(benchmark: Any, shape: Any, dtype: torch.dtype, which: str) -> None:
    case, tokens, k, sizes = shape
    stock = layers(k, sizes, dtype, "cpu")
    x = torch.randn(tokens, k, dtype=dtype, requires_grad=True)
    grads = [torch.randn(tokens, n, dtype=dtype) for n in sizes]
    weights, biases = ([getattr(layer.base_layer, name) for layer in stock] for name in ("weight", "bias"))
    a, b = ([getattr(layer, name)["default"].weight for layer in stock] for name in ("lora_A", "lora_B"))
    forward = {
        "ours": lambda: lora_linear_group(x, weights, biases, a, b, [1.0] * len(stock)),
        "peft": lambda: [layer(x) for layer in stock],
        "frozen": lambda: [layer.base_layer(x) for layer in stock],
    }[which]
    wanted = [x] if which == "frozen" else [x, *a, *b]
    benchmark.group = f"{case}, {dtype}"
    benchmark(lambda: torch.autograd.grad(forward(), wanted, grads))
