"""Normalise + patchify, forward and backward to the pixels, against the plain torch expression.

python -m benchmarks.patchify [--json] [--dtype bfloat16]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import arguments, compare, publish
from vlmteacher.ops.patchify import patchify, patchify_reference

MEAN = STD = [0.5, 0.5, 0.5]
# The packaged world, a mid-size video, the paper's Teacher input (24 frames of 704x1280).
SIZES = [(12, 64, 64, 8), (12, 352, 640, 16), (24, 704, 1280, 16)]


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that tensors allocated inside `function` took at one time, from the profiler's own records."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    level = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def main() -> None:
    settings = arguments(__doc__ or "")
    dtype = getattr(torch, settings.dtype)
    rows = []
    for t, height, width, patch in SIZES:
        frames = torch.rand(t, 3, height, width, device=settings.device).to(dtype).requires_grad_()
        grad = torch.randn_like(patchify_reference(frames.detach(), patch, 2, 2, MEAN, STD))

        def forward(function: Callable[..., Tensor], frames: Tensor = frames, patch: int = patch) -> Tensor:
            return function(frames, patch, 2, 2, MEAN, STD)

        def both(function: Callable[..., Tensor], frames: Tensor = frames, grad: Tensor = grad) -> Tensor:
            return torch.autograd.grad(forward(function, frames, patch), frames, grad)[0]  # noqa: B023

        for what, run in (("forward", forward), ("forward+backward", both)):
            ours, stock = (lambda run=run: run(patchify)), (lambda run=run: run(patchify_reference))
            row = compare(f"{t}x{height}x{width} patch {patch} {what}", ours, stock, settings.pairs, settings.device)
            row["memory_ratio"] = peak_bytes(ours) / peak_bytes(stock)
            rows.append(row)
    publish("patchify", settings, rows)


if __name__ == "__main__":
    main()
