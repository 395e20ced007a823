"""The Teacher's operators between its products on a GPU: Triton against float64, then against torch's expressions.

    python -m benchmarks.gpu.elementwise [--json] [--dtype bfloat16] [--pairs 30]

`fastest` of each case is the backend that vlmteacher/ops/gpus.py should prefer: triton or torch.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.elementwise import SHAPES, both, sides, stock_rms_norm
from benchmarks.gpu import gate, parsed_on_gpu, share
from benchmarks.timing import argument_parser, compare
from vlmteacher.ops import elementwise, rms_norm, swiglu
from vlmteacher.ops.backends import triton_status

OPERATORS = (elementwise, rms_norm, swiglu)
GPU_SHAPES = {
    "rms_norm, Qwen3-VL-4B, 6,000 tokens": (6000, 2560),
    "rms_norm, Qwen3-VL-4B, queries of 6,000 tokens": (6000, 32, 128),
    "rotate, Qwen3-VL-4B, queries of 6,000 tokens": (6000, 32, 128),
    "swiglu, Qwen3-VL-4B, 6,000 tokens": (6000, 9728),
}


def by_torch() -> ExitStack:
    """While it is open, the operators are torch's expressions."""
    stack = ExitStack()
    for operator in OPERATORS:
        stack.enter_context(mock.patch.object(operator, "runs_triton", lambda x: False))
    return stack


def check(dtype: torch.dtype, width: int, device: str = "cuda") -> float:
    """The largest error of the backends in use as a share of the allowed one (see `share`)."""
    torch.manual_seed(0)
    x, up, grad = torch.randn(3, 333, 3, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    cos, sin = torch.randn(2, 333, 1, width // 2, device=device)

    def results(function: Any, *inputs: Tensor) -> list[Tensor]:
        inputs = tuple(t.to(dtype).requires_grad_() for t in inputs[:-1]) + inputs[-1:]
        made = function(*inputs[:-1])
        grads = torch.autograd.grad(made, inputs[:-1], inputs[-1].to(dtype))
        return [t.detach() for t in (made, *grads)]

    def turned(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(dtype)

    pairs: list[tuple[Any, Any, tuple[Tensor, ...]]] = [
        (lambda x: rms_norm.rms_norm(x, weight), lambda x: stock_rms_norm(x, weight), (x,)),
        (lambda x: elementwise.rotate(x, cos, sin), turned, (x,)),
        (swiglu.swiglu, swiglu.swiglu_reference, (x, up)),
    ]
    return max(
        share(results(ours, *inputs, grad), lambda *args, plain=plain: results(plain, *args), *inputs, grad)
        for ours, plain, inputs in pairs
    )


def main() -> None:
    settings = parsed_on_gpu(argument_parser(__doc__ or "", "bfloat16"), "elementwise")
    dtype, rows = getattr(torch, settings.dtype), []
    usable, why = triton_status()
    if not usable:
        raise SystemExit(f"benchmarks.gpu.elementwise: {why}")
    SHAPES.update(GPU_SHAPES)
    for width in (128, 2560, 334):
        gate(f"width {width}", "triton", check(dtype, width))
    for case in () if settings.check else SHAPES:
        row: dict[str, Any] = {"case": case, "backends": {}}
        inputs, forwards = sides(case, dtype, "cuda")
        ours, stock = (both(inputs, forwards[side]) for side in ("ours", "stock"))
        row["backends"]["triton"] = compare(case, ours, stock, settings.pairs, "cuda")
        with by_torch():
            row["backends"]["torch"] = compare(case, ours, stock, settings.pairs, "cuda")
        for name, facts in row["backends"].items():
            print(f"{case:<44} {name:<7} {facts['ours_ms']:8.3f} ms  x{facts['speedup']:.2f}")
        row["fastest"] = min(row["backends"], key=lambda name: row["backends"][name]["ours_ms"])
        rows.append(row | row["backends"][row["fastest"]])
    if settings.json and rows:
        speedups = torch.tensor([row["speedup"] for row in rows]).log().mean().exp()
        facts = {"benchmark": "gpu.elementwise", "device": torch.cuda.get_device_name(), "dtype": settings.dtype}
        print(json.dumps(facts | {"rows": rows, "summary": {"speedup": float(speedups)}}))


if __name__ == "__main__":
    main()
