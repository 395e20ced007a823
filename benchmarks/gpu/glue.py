"""The parts of a Wan block between its products on a GPU: every backend against float64, then against diffusers' own.

    python -m benchmarks.gpu.glue [--json] [--dtype bfloat16] [--pairs 30]

`fastest` of each case is the backend that vlmteacher/ops/backends.py should prefer.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.glue import SIZES, both, cases
from benchmarks.gpu import backends, forced, gate, parsed_on_gpu, share
from benchmarks.timing import argument_parser, compare
from vlmteacher.ops import ada_norm, qk_norm_rope

GPU_SIZES = [*SIZES, ("Wan 5B, 20240 tokens", (23, 22, 40), 24, 128, 14336, 512)]


def results(function: Any, dtype: torch.dtype, xs: list[Tensor], others: list[Tensor], grads: list[Tensor]) -> Any:
    """Outputs and gradients in float64, of `function` in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    xs = [x.to(dtype).requires_grad_() for x in xs]
    made = function(*xs, *(t.to(wide) for t in others))
    gradients = torch.autograd.grad(made, xs, [g.to(dtype) for g in grads])
    return [t.detach().double() for t in (*made, *gradients)]


def check(dtype: torch.dtype, width: int, device: str = "cuda") -> float:
    """The largest error of the forced backend as a share of the allowed one (see `share`)."""
    torch.manual_seed(0)
    x, y, *grads = torch.randn(4, 2, 333, width, device=device)
    tables, angles = (list(torch.randn(*shape, device=device)) for shape in ((3, 2, 2, width), (2, 333, width // 4)))
    weights = [torch.ones(width, dtype=dtype, device=device)] * 2

    def norm(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return ada_norm.residual_ada_norm(x, y, gate, scale, shift, 77)

    def plain_norm(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return ada_norm.ada_norm_reference(x, y, gate, scale, shift, 77, 1e-6)

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return qk_norm_rope.qk_norm_rope([q, k], weights, (cos, sin), 2)

    def plain_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return qk_norm_rope.qk_norm_rope_reference([q, k], weights, cos, sin, 2, 1e-6)

    xs, grads = [x.to(dtype), y.to(dtype)], [g.to(dtype) for g in grads]

    def part(ours: Any, plain: Any, others: list[Tensor]) -> float:
        computed = results(ours, dtype, xs, others, grads)
        return share(computed, lambda *args: results(plain, dtype, *args), xs, others, grads)

    return max(part(norm, plain_norm, tables), part(turn, plain_turn, angles))


def main() -> None:
    settings = parsed_on_gpu(argument_parser(__doc__ or "", "bfloat16"), "glue")
    dtype, rows = getattr(torch, settings.dtype), []
    namespaces = {"torch": (None, None)} | {
        name: (namespace, backends("qk_norm_rope")[name]) for name, namespace in backends("ada_norm").items()
    }
    for name, (norm, rope) in namespaces.items():
        with forced(ada_norm, norm), forced(qk_norm_rope, rope):
            for width in (5120, 3072, 332):
                gate(f"width {width}", name, check(dtype, width))
    for size in () if settings.check else GPU_SIZES:
        for part, case in cases(size, dtype, "cuda").items():
            row: dict[str, Any] = {"case": f"{size[0]}: {part}", "backends": {}}
            for name, (norm, rope) in namespaces.items():
                with forced(ada_norm, norm), forced(qk_norm_rope, rope):
                    run, stock = both(case.ours, case.wanted), both(case.stock, case.stock_wanted)
                    facts = compare(row["case"], run, stock, settings.pairs, "cuda")
                row["backends"][name] = facts
                print(f"{row['case']:<44} {name:<7} {facts['ours_ms']:8.3f} ms  x{facts['speedup']:.2f}")
            row["fastest"] = min(row["backends"], key=lambda name: row["backends"][name]["ours_ms"])
            rows.append(row | row["backends"][row["fastest"]])
    if settings.json and rows:
        speedups = torch.tensor([row["speedup"] for row in rows]).log().mean().exp()
        facts = {"benchmark": "gpu.glue", "device": torch.cuda.get_device_name(), "dtype": settings.dtype}
        print(json.dumps(facts | {"rows": rows, "summary": {"speedup": float(speedups)}}))


if __name__ == "__main__":
    main()
