"""Resize + normalise + patchify + cast on a GPU: every backend against float64, then against the plain expression.

    python -m benchmarks.gpu.patchify [--json] [--dtype bfloat16] [--pairs 30]

`fastest` of each case is what the order of backends in vlmteacher/ops/backends.py should say; `gb_per_s` is of the
bytes that frames, rows and their gradients have, each moved once.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import backends, forced, gate, parsed_on_gpu, share
from benchmarks.patchify import MEAN, SIZES, STD
from benchmarks.timing import argument_parser, compare
from tests.rounding import resized_exactly
from vlmteacher.ops import patchify as operator
from vlmteacher.ops.patchify import patchify, patchify_reference

# the last is there for its odd sizes
CASES = [*SIZES, (24, 704, 1280, 448, (448, 448)), (5, 333, 517, 14, (252, 392))]


def both(function: Callable[..., Tensor], frames: Tensor, grad: Tensor, args: tuple[Any, ...]) -> list[Tensor]:
    """The rows, and the gradient of the frames."""
    leaf = frames.detach().requires_grad_()
    rows = function(leaf, *args)
    return [rows.detach(), *torch.autograd.grad(rows, leaf, grad)]


def check(frames: Tensor, grad: Tensor, args: tuple[Any, ...]) -> float:
    """The forced backend's largest error as a share of the allowed one (see `share`)."""
    computed = both(patchify, frames, grad, args)
    with mock.patch.object(F, "interpolate", resized_exactly):
        return share(computed, lambda frames, grad: both(patchify_reference, frames, grad, args), frames, grad)


def main() -> None:
    settings = parsed_on_gpu(argument_parser(__doc__ or ""), "patchify")
    dtype, rows, device = getattr(torch, settings.dtype), [], "cuda"
    for t, height, width, patch, size in CASES:
        temporal, merge = (1, 1) if patch == 448 else (2, 2)  # the patch is the frame: InternVL's layout
        args = (patch, temporal, merge, MEAN, STD, size)
        frames = torch.rand(t, 3, height, width, device=device).to(dtype)
        grad = torch.randn_like(patchify_reference(frames, *args))
        case = f"{t}x{height}x{width}" + (f" to {size[0]}x{size[1]}" if size else "")
        row: dict[str, Any] = {"case": case, "backends": {}}
        for name, namespace in ({"torch": None} | backends("patchify")).items():
            with forced(operator, namespace):
                error = check(frames[:4], grad[: len(grad) // -(-t // temporal) * (-(-4 // temporal))], args)
                gate(case, name, error)
                if settings.check:
                    continue

                def ours(frames: Tensor = frames, grad: Tensor = grad, args: tuple[Any, ...] = args) -> object:
                    return both(patchify, frames, grad, args)

                def stock(frames: Tensor = frames, grad: Tensor = grad, args: tuple[Any, ...] = args) -> object:
                    return both(patchify_reference, frames, grad, args)

                facts = compare(case, ours, stock, settings.pairs, device) | {"error": error}
            moved = 2 * (frames.numel() + grad.numel()) * dtype.itemsize
            facts["gb_per_s"] = moved / facts["ours_ms"] / 1e6
            row["backends"][name] = facts
            print(
                f"{case:<28} {name:<7} {facts['ours_ms']:8.3f} ms  {facts['gb_per_s']:7.1f} GB/s  "
                f"x{facts['speedup']:.2f} of the plain expression's speed"
            )
        if settings.check:
            continue
        row["fastest"] = min(row["backends"], key=lambda name: row["backends"][name]["ours_ms"])
        rows.append(row | row["backends"][row["fastest"]])
    if settings.json and rows:
        summary = {"speedup": statistics.geometric_mean(row["speedup"] for row in rows)}
        facts = {"benchmark": "gpu.patchify", "device": torch.cuda.get_device_name(), "dtype": settings.dtype}
        print(json.dumps(facts | {"rows": rows, "summary": summary}))


if __name__ == "__main__":
    main()
