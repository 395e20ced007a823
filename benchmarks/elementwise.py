"""Element-wise operators of the Teacher's blocks, forward + backward, against torch's expressions.

python -m benchmarks.elementwise [--json] [--dtype float32]
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import saved_bytes
from benchmarks.timing import arguments, compare, publish
from vlmteacher.ops.elementwise import gelu, rotate, rotate_reference

# operator and shape: tokens, heads, channels of a head; or tokens, hidden channels
SHAPES: dict[str, tuple[int, ...]] = {
    "rotate, microworld": (384, 3, 64),
    "rotate, Qwen3-VL-4B, a frame pair": (3520, 16, 64),
    "gelu, microworld": (384, 768),
    "gelu, Qwen3-VL-4B, a frame pair": (3520, 4096),
}


def sides(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, dict[str, Callable[[], Tensor]]]:
    """The input of a case, and its forward by each side."""
    shape = SHAPES[case]
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    if case.startswith("gelu"):
        return x, {"ours": lambda: gelu(x), "stock": lambda: F.gelu(x, approximate="tanh")}
    cos, sin = torch.randn(2, shape[0], 1, shape[2] // 2, device=device)
    return x, {"ours": lambda: rotate(x, cos, sin), "stock": lambda: rotate_reference(x, cos, sin)}


def both(x: Tensor, forward: Callable[[], Tensor]) -> Callable[[], object]:
    """Forward + backward to x."""
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(forward(), x, grad)


def suite_case(case: str, side: str) -> Callable[[], object]:
    x, forwards = sides(case, torch.bfloat16, "cpu")
    return both(x, forwards[side])


SUITE = {case: functools.partial(suite_case, case) for case in SHAPES}


def main() -> None:
    settings = arguments(__doc__ or "", "bfloat16")
    rows = []
    for case in SHAPES:
        x, forwards = sides(case, getattr(torch, settings.dtype), settings.device)
        ours, stock = (both(x, forwards[side]) for side in ("ours", "stock"))
        row = compare(case, ours, stock, settings.pairs, settings.device)
        saved, stock_saved = (saved_bytes(forwards[side])[0] for side in ("ours", "stock"))
        rows.append(row | {"memory_ratio": saved / stock_saved})
    publish("elementwise", settings, rows)


if __name__ == "__main__":
    main()
