"""Normalise + patchify in Triton: one read and one write of the pixels in either direction.

Both kernels gather: every program owns a run of outputs, so nothing is written twice and the repeated last frame needs
no atomics. Arithmetic is in float32 and rounded once. The definition is vlmteacher/ops/patchify.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _channel(c, r, g, b):
    return tl.where(c == 0, r, tl.where(c == 1, g, b))


@triton.jit
def patchify_kernel(
    frames, out, numel, num_frames, grid_h, grid_w, stride_t, stride_c, stride_y, stride_x,
    mean_r, mean_g, mean_b, std_r, std_g, std_b,
    PATCH: tl.constexpr, TEMPORAL: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of the output; grid_h and grid_w count merge x merge blocks."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    px, rest = i % PATCH, i // PATCH
    py, rest = rest % PATCH, rest // PATCH
    k, rest = rest % TEMPORAL, rest // TEMPORAL
    c, row = rest % 3, rest // 3
    mx, rest = row % MERGE, row // MERGE
    my, rest = rest % MERGE, rest // MERGE
    bx, rest = rest % grid_w, rest // grid_w
    by, t = rest % grid_h, rest // grid_h
    frame = tl.minimum(t * TEMPORAL + k, num_frames - 1)
    y, x = (by * MERGE + my) * PATCH + py, (bx * MERGE + mx) * PATCH + px
    offset = frame * stride_t + c * stride_c + y * stride_y + x * stride_x
    pixel = tl.load(frames + offset, mask=inside, other=0.0).to(tl.float32)
    value = (pixel - _channel(c, mean_r, mean_g, mean_b)) / _channel(c, std_r, std_g, std_b)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def patchify_backward_kernel(
    grad, out, numel, num_frames, height, width, std_r, std_g, std_b,
    PATCH: tl.constexpr, TEMPORAL: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK pixels of the contiguous (T, 3, H, W) gradient."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    x, rest = i % width, i // width
    y, rest = rest % height, rest // height
    c, frame = rest % 3, rest // 3
    grid_h, grid_w = height // (PATCH * MERGE), width // (PATCH * MERGE)
    my, by = y // PATCH % MERGE, y // (PATCH * MERGE)
    mx, bx = x // PATCH % MERGE, x // (PATCH * MERGE)
    row = (((frame // TEMPORAL * grid_h + by) * grid_w + bx) * MERGE + my) * MERGE + mx
    first = (row * 3 + c) * TEMPORAL
    within = y % PATCH * PATCH + x % PATCH
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(TEMPORAL):
        # the slot of this frame; of the last frame also the slots that it was repeated into
        slot = frame % TEMPORAL
        mine = (k == slot) | ((frame == num_frames - 1) & (k > slot))
        at = (first + k) * PATCH * PATCH + within
        total += tl.load(grad + at, mask=inside & mine, other=0.0).to(tl.float32)
    value = total / _channel(c, std_r, std_g, std_b)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


def patchify(
    frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """(T, 3, H, W) of any strides -> (N, 3 * temporal_patch * patch**2)."""
    num_frames, _, height, width = frames.shape
    temporal_patches = -(-num_frames // temporal_patch)
    rows = temporal_patches * (height // patch) * (width // patch)
    out = torch.empty(rows, 3 * temporal_patch * patch * patch, dtype=frames.dtype, device=frames.device)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    with torch.cuda.device_of(frames):
        patchify_kernel[grid](
            frames, out, out.numel(), num_frames, height // (patch * merge), width // (patch * merge),
            *frames.stride(), *mean, *std, PATCH=patch, TEMPORAL=temporal_patch, MERGE=merge, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def patchify_backward(
    grad: Tensor, num_frames: int, height: int, width: int, patch: int, temporal_patch: int, merge: int,
    std: Sequence[float],
) -> Tensor:  # fmt: skip
    """The gradient of the rows (N, columns) -> that of the frames (T, 3, H, W)."""
    out = torch.empty(num_frames, 3, height, width, dtype=grad.dtype, device=grad.device)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    with torch.cuda.device_of(grad):
        patchify_backward_kernel[grid](
            grad.contiguous(), out, out.numel(), num_frames, height, width, *std,
            PATCH=patch, TEMPORAL=temporal_patch, MERGE=merge, BLOCK=BLOCK,
        )  # fmt: skip
    return out
