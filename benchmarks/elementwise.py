"""The Teacher's operators between its products, forward + backward, against torch's expressions.

python -m benchmarks.elementwise [--json] [--dtype float32]

On a CPU RMSNorm and SwiGLU are torch's own expressions on both sides, those of ours with less kept for the backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import saved_bytes
from benchmarks.timing import arguments, compare, publish
from vlmteacher.ops.elementwise import gelu, rotate, rotate_reference
from vlmteacher.ops.rms_norm import rms_norm
from vlmteacher.ops.swiglu import swiglu

# operator and shape: tokens, heads, channels of a head; or tokens, channels
SHAPES: dict[str, tuple[int, ...]] = {
    "rotate, microworld": (384, 3, 64),
    "rotate, Qwen3-VL-4B, a frame pair": (3520, 16, 64),
    "gelu, microworld": (384, 768),
    "gelu, Qwen3-VL-4B, a frame pair": (3520, 4096),
    "rms_norm, microworld": (200, 256),
    "rms_norm, Qwen3-VL-4B, 512 tokens": (512, 2560),
    "rms_norm, Qwen3-VL-4B, queries of 512 tokens": (512, 32, 128),
    "swiglu, microworld": (200, 768),
    "swiglu, Qwen3-VL-4B, 512 tokens": (512, 9728),
}
Sides = dict[str, Callable[[], Tensor]]


def stock_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The forward of transformers' RMSNorm."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def sides(case: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Sides]:
    """The inputs of a case, and its forward by each side."""
    operator, shape = case.partition(",")[0], SHAPES[case]
    x, up = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    if operator == "gelu":
        return [x], {"ours": lambda: gelu(x), "stock": lambda: F.gelu(x, approximate="tanh")}
    if operator == "swiglu":
        return [x, up], {"ours": lambda: swiglu(x, up), "stock": lambda: F.silu(x) * up}
    if operator == "rms_norm":
        weight = torch.randn(shape[-1], device=device).to(dtype)
        return [x], {"ours": lambda: rms_norm(x, weight), "stock": lambda: stock_rms_norm(x, weight)}
    cos, sin = torch.randn(2, shape[0], 1, shape[2] // 2, device=device)
    return [x], {"ours": lambda: rotate(x, cos, sin), "stock": lambda: rotate_reference(x, cos, sin)}


def both(inputs: Sequence[Tensor], forward: Callable[[], Tensor]) -> Callable[[], object]:
    """Forward + backward to the inputs."""
    grad = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def suite_case(case: str, side: str) -> Callable[[], object]:
    inputs, forwards = sides(case, torch.bfloat16, "cpu")
    return both(inputs, forwards[side])


SUITE = {case: functools.partial(suite_case, case) for case in SHAPES}


def main() -> None:
    settings = arguments(__doc__ or "", "bfloat16")
    rows = []
    for case in SHAPES:
        inputs, forwards = sides(case, getattr(torch, settings.dtype), settings.device)
        ours, stock = (both(inputs, forwards[side]) for side in ("ours", "stock"))
        row = compare(case, ours, stock, settings.pairs, settings.device)
        saved, stock_saved = (saved_bytes(forwards[side])[0] for side in ("ours", "stock"))
        rows.append(row | {"memory_ratio": saved / stock_saved})
    publish("elementwise", settings, rows)


if __name__ == "__main__":
    main()
