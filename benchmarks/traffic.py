"""The bytes that a LoRA linear layer moves between memory and processor, forward and backward, calculated.

    python -m benchmarks.traffic [--tokens 20240]

PEFT's layers and the frozen ones are counted, operator by operator, as torch runs them on tensors without data: every
operator reads its inputs once and writes its output once. The schemes are sums of the passes that their kernels make.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.lora_linear import RANK, layers

WIDE = 2  # bytes of x, y, W: bfloat16
SHAPES = [  # (case, K, N of each layer that shares x) of Wan2.2-TI2V-5B
    ("q, k, v", 3072, (3072, 3072, 3072)),
    ("out", 3072, (3072,)),
    ("ffn up", 3072, (14336,)),
    ("ffn down", 14336, (3072,)),
]


class Count(TorchDispatchMode):
    """Adds up what every operator that is no view reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func not in (torch.ops.aten.detach.default, torch.ops.aten.empty.memory_format):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def counted(modules: Sequence[nn.Module], x: Tensor, wanted: Sequence[Tensor]) -> int:
    """Bytes of every module on x, forward and backward to `wanted`."""
    with Count() as count:
        ys = [module(x) for module in modules]
        torch.autograd.grad(ys, wanted, [torch.empty_like(y) for y in ys])
    return count.bytes


def schemes(m: int, k: int, sizes: Sequence[int], rank: int) -> dict[str, float]:
    """Bytes of each scheme, forward and backward together; small factors and their gradients are counted as well."""
    n, group, ranks = sum(sizes), len(sizes), rank * len(sizes)
    x, y, s, weights = m * k, m * n, m * ranks, k * n
    factors = ranks * k + rank * n
    # forward: read x, W, A, B, write y, S. Backward: read dy, W, A, B and, for dA and dB, x and S; write dx, dA, dB.
    floor = (x + weights + factors + y + s) + (y + weights + factors + x + s + x + factors)
    # ours: S by a pass over x of its own, which every y then reads beside its x; backward dS by a pass over dy, dB by
    # another, dx reads dy and dS, dA reads dS and x
    ours = ((x + s) + group * x + weights + factors + y + s) + (y + s) + (y + s) + (y + s + weights + x) + (s + x)
    ours += 3 * factors
    # K-augmentation: x is copied beside S, S and dS are columns of the wide operands
    augmented = ours + 2 * x + 2 * y
    # LoRAFusion's scheme: S by a pass of its own, y = x W^T + S B^T fused, layer by layer; dS and dB in one pass over
    # dy, then dx = dy W + dS A, and dA; layers of one x share nothing
    fusion = group * x + s + group * x + weights + factors + y + s + (y + s) + s + (y + weights + s)
    fusion += x + 2 * (group - 1) * x + (s + group * x) + 3 * factors
    return {"ours": WIDE * ours, "K-augmentation": WIDE * augmented, "LoRAFusion": WIDE * fusion, "floor": WIDE * floor}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--tokens", type=int, default=20240, help="rows of x (default: 89 frames of 704x1280)")
    m = parser.parse_args().tokens
    rows = []
    for case, k, sizes in SHAPES:
        stock = layers(k, sizes, torch.bfloat16, "meta")
        x = torch.empty(m, k, dtype=torch.bfloat16, device="meta", requires_grad=True)
        trained = [x, *(p for layer in stock for p in layer.parameters() if p.requires_grad)]
        moved: dict[str, float] = {"PEFT": counted(stock, x, trained)}
        moved |= schemes(m, k, sizes, RANK)
        moved["frozen alone"] = counted([layer.base_layer for layer in stock], x, [x])
        rows.append((case, moved))
    names = list(rows[0][1])
    print(f"GB moved, forward + backward, {m} tokens, rank {RANK}, bfloat16 (PEFT's adapters in float32)\n")
    print("| layers | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for case, moved in rows:
        print(f"| {case} | " + " | ".join(f"{moved[name] / 1e9:.2f}" for name in names) + " |")


if __name__ == "__main__":
    main()
