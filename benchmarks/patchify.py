"""Resize + normalise + patchify + cast, forward and backward to the pixels, against the plain torch expression.

    python -m benchmarks.patchify [--json] [--dtype bfloat16]

The stock side is what the video processor does: interpolate (bicubic, antialias), normalise, permute, copy. torch
resizes no 16-bit frames on the CPU: it gets float32 in between. `memory_ratio` is of the most bytes that tensors take
at one time; what is saved for the backward is next to nothing on either side and is given too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.memory import saved_bytes
from benchmarks.timing import arguments, compare, publish
from vlmteacher.ops.patchify import patchify, patchify_reference

MEAN = STD = [0.5, 0.5, 0.5]
# frames, height, width, patch, and the size they are resized to, where they are
SIZES: list[tuple[int, int, int, int, tuple[int, int] | None]] = [
    (12, 64, 64, 8, None),  # the packaged world, a mid-size video, the paper's Teacher input
    (12, 352, 640, 16, None),
    (24, 704, 1280, 16, None),
    (12, 64, 64, 16, (128, 128)),
    (12, 384, 384, 16, (256, 256)),
    (24, 704, 1280, 16, (352, 640)),
]


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


def suite_case(shape: tuple[int, int, int, int, tuple[int, int] | None], side: str) -> Callable[[], object]:
    """Forward + backward to the pixels, by the operator or the plain expression."""
    count, height, width, patch, size = shape
    frames = torch.rand(count, 3, height, width, requires_grad=True)
    function = patchify if side == "ours" else patchify_reference
    grad = torch.randn_like(function(frames.detach(), patch, 2, 2, MEAN, STD, size))
    return lambda: torch.autograd.grad(function(frames, patch, 2, 2, MEAN, STD, size), frames, grad)


SUITE = {"cut": functools.partial(suite_case, SIZES[0]), "resize": functools.partial(suite_case, SIZES[3])}


def main() -> None:
    settings = arguments(__doc__ or "")
    dtype = getattr(torch, settings.dtype)
    rows = []
    for t, height, width, patch, size in SIZES:
        frames = torch.rand(t, 3, height, width, device=settings.device).to(dtype).requires_grad_()
        grad = torch.randn_like(patchify(frames.detach(), patch, 2, 2, MEAN, STD, size))
        case = f"{t}x{height}x{width}" + (f" to {size[0]}x{size[1]}" if size else f" patch {patch}")

        def forward(function: Callable[..., Tensor], frames=frames, patch=patch, size=size) -> Tensor:  # type: ignore[no-untyped-def]
            return function(frames, patch, 2, 2, MEAN, STD, size)

        def both(function: Callable[..., Tensor], frames: Tensor = frames, grad: Tensor = grad) -> Tensor:
            return torch.autograd.grad(forward(function), frames, grad)[0]

        for what, run in (("forward", forward), ("forward+backward", both)):
            ours, stock = (lambda run=run: run(patchify)), (lambda run=run: run(patchify_reference))
            row = compare(f"{case} {what}", ours, stock, settings.pairs, settings.device)
            row["memory_ratio"] = peak_bytes(ours) / peak_bytes(stock)
            row["saved_bytes"], row["stock_saved_bytes"] = saved_bytes(ours)[0], saved_bytes(stock)[0]
            rows.append(row)
    publish("patchify", settings, rows)


if __name__ == "__main__":
    main()
