"""Resize + normalise + patchify + cast in Triton.

Every kernel gathers: a program owns a run of outputs, so that nothing is written twice, and neither the repeated last
frame nor the gradient of a resize needs atomics. A resize is two kernels: rows are added up on their own, columns where
the patches are written (or, backward, read); what lies between is float32. Without one there is one kernel, which reads
and writes the pixels once. From and to a decoder's last convolution (`shuffle_to_rows`) a program owns all lines that
stem from neighbours in it. Arithmetic is in float32 and rounded once. The definition is vlmteacher/ops/patchify.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, RESIZED_BLOCK = 1024, 512  # elements per program; resizing needs more registers per element
COLUMNS = 512  # of a row, in the kernel that sums rows


@triton.jit
def _channel(c, r, g, b):
    return tl.where(c == 0, r, tl.where(c == 1, g, b))


@triton.jit
def resize_rows_kernel(
    x, out, start, weight, taps, height, width, segments, stride_t, stride_c, stride_y, stride_x, COLUMNS: tl.constexpr
):
    """out (T, 3, height, width), contiguous: rows are weighted sums of `taps` rows of x. One segment per program."""
    program = tl.program_id(0)
    column = program % segments * COLUMNS + tl.arange(0, COLUMNS)
    y, plane = program // segments % height, (program // segments // height).to(tl.int64)
    inside = column < width
    first = tl.load(start + y).to(tl.int64)
    at = x + plane // 3 * stride_t + plane % 3 * stride_c + first * stride_y + column.to(tl.int64) * stride_x
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for k in range(taps):
        total += tl.load(weight + y * taps + k) * tl.load(at + k * stride_y, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (plane * height + y) * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def patchify_kernel(
    frames, out, start, weight, taps, numel, num_frames, grid_h, grid_w, stride_t, stride_c, stride_y, stride_x,
    mean_r, mean_g, mean_b, std_r, std_g, std_b,
    PATCH: tl.constexpr, TEMPORAL: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of the output; grid_h and grid_w count merge x merge blocks.

    start, weight: of the horizontal band, or None where a pixel is one of `frames` as it stands.
    """
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
    line = frames + frame * stride_t + c * stride_c + y * stride_y
    if start is None:
        pixel = tl.load(line + x * stride_x, mask=inside, other=0.0).to(tl.float32)
    else:
        pixel = tl.zeros([BLOCK], dtype=tl.float32)
        at = line + tl.load(start + x, mask=inside, other=0) * stride_x
        for tap in range(taps):
            w = tl.load(weight + x * taps + tap, mask=inside, other=0.0)
            pixel += w * tl.load(at + tap * stride_x, mask=inside, other=0.0).to(tl.float32)
    value = (pixel - _channel(c, mean_r, mean_g, mean_b)) / _channel(c, std_r, std_g, std_b)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    grad, row_of_blocks, slot, last, c, y, x, inside,
    PATCH: tl.constexpr, TEMPORAL: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows' gradient at pixel (y, x) of a frame; for the last frame the sum over its repetitions.

    row_of_blocks: the first patch row of the frame's row of blocks."""
    my, mx, bx = y // PATCH % MERGE, x // PATCH % MERGE, x // (PATCH * MERGE)
    row = row_of_blocks + (bx * MERGE + my) * MERGE + mx
    at = grad + ((row * 3 + c) * TEMPORAL * PATCH + y % PATCH) * PATCH + x % PATCH
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(TEMPORAL):
        mine = (k == slot) | (last & (k > slot))
        total += tl.load(at + k * PATCH * PATCH, mask=inside & mine, other=0.0).to(tl.float32)
    return total


@triton.jit
def patchify_backward_kernel(
    grad, out, start, weight, taps, numel, num_frames, height, width, columns, std_r, std_g, std_b,
    PATCH: tl.constexpr, TEMPORAL: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK pixels of out (T, 3, height, columns), contiguous, from the patches of height x width.

    start, weight: of the transposed horizontal band, or None where `columns` is `width`.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    x, rest = i % columns, i // columns
    y, rest = rest % height, rest // height
    c, frame = rest % 3, rest // 3
    grid_h, grid_w = height // (PATCH * MERGE), width // (PATCH * MERGE)
    row_of_blocks = (frame // TEMPORAL * grid_h + y // (PATCH * MERGE)) * grid_w * MERGE * MERGE
    slot, last = frame % TEMPORAL, frame == num_frames - 1
    if start is None:
        total = _gradient(grad, row_of_blocks, slot, last, c, y, x, inside, PATCH, TEMPORAL, MERGE, BLOCK)
    else:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        first = tl.load(start + x, mask=inside, other=0)
        for tap in range(taps):
            w = tl.load(weight + x * taps + tap, mask=inside, other=0.0)
            at = first + tap
            total += w * _gradient(grad, row_of_blocks, slot, last, c, y, at, inside, PATCH, TEMPORAL, MERGE, BLOCK)
    value = total / _channel(c, std_r, std_g, std_b)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _line(row, g, height, width, first, UPSCALE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of the lines, `upscale` per channel, that row `row` of frame g of y becomes: channel (LINES), line
    in the frame, x (COLUMNS), the mask of valid elements, their offsets in y, and the offsets and mask of the bits."""
    line, x = tl.arange(0, LINES), first + tl.arange(0, COLUMNS)
    channel, y = line // UPSCALE, row * UPSCALE + line % UPSCALE
    real = (line < 3 * UPSCALE)[:, None] & (x < width * UPSCALE)[None, :]
    pixel = (g * height + row) * width + x // UPSCALE
    at = (pixel[None, :] * (3 * UPSCALE) + line[:, None]) * UPSCALE + (x % UPSCALE)[None, :]
    bytes_of_line = (width * UPSCALE + 7) // 8
    byte = first // 8 + tl.arange(0, COLUMNS // 8)
    bits = ((g * 3 + channel) * height * UPSCALE + y)[:, None] * bytes_of_line + byte[None, :]
    return channel, y, x, real, at, bits, (line < 3 * UPSCALE)[:, None] & (byte < bytes_of_line)[None, :]


@triton.jit
def _place(
    slot, channel, y, x, height, width,
    HIGH: tl.constexpr, WIDE: tl.constexpr, TEMPORAL: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Offsets (lines, columns) in the rows of pixels of the frame at `slot` of a video of height x width."""
    down, right = y // HIGH, x // WIDE
    block_row = (slot // TEMPORAL * (height // (HIGH * MERGE)) + down // MERGE) * (width // (WIDE * MERGE))
    block = block_row[:, None] + (right // MERGE)[None, :]
    row = (block * MERGE + (down % MERGE)[:, None]) * MERGE + (right % MERGE)[None, :]
    area = (row * 3 + channel[:, None]) * TEMPORAL + slot % TEMPORAL
    return (area * HIGH + (y % HIGH)[:, None]) * WIDE + (x % WIDE)[None, :]


@triton.jit
def shuffle_to_rows_kernel(
    y, slots, rows, inside, height, width, mean_r, mean_g, mean_b, std_r, std_g, std_b,
    REPEATS: tl.constexpr, UPSCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TEMPORAL: tl.constexpr,
    MERGE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (rows of y x tiles of columns, frames of y); height and width are those of y."""
    tiles, g = tl.cdiv(width * UPSCALE, COLUMNS), tl.program_id(1).to(tl.int64)
    row, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * COLUMNS
    channel, line, x, real, at, byte, stored = _line(row, g, height, width, first, UPSCALE, LINES, COLUMNS)
    value = tl.load(y + at, mask=real, other=-1.0).to(tl.float32)
    bits = tl.reshape(((value >= 0) & (value <= 1)).to(tl.int32), [LINES, COLUMNS // 8, 8]) << tl.arange(0, 8)
    tl.store(inside + byte, tl.sum(bits, 2).to(tl.uint8), mask=stored)
    value = tl.where(value < 0, 0.0, tl.where(value > 1, 1.0, value))  # a NaN stays NaN
    mean, std = _channel(channel, mean_r, mean_g, mean_b), _channel(channel, std_r, std_g, std_b)
    value = ((value - mean[:, None]) / std[:, None]).to(rows.dtype.element_ty)
    for r in tl.static_range(REPEATS):
        slot = tl.load(slots + g * REPEATS + r).to(tl.int64)
        to = _place(slot, channel, line, x, height * UPSCALE, width * UPSCALE, HIGH, WIDE, TEMPORAL, MERGE)
        tl.store(rows + to, value, mask=real & (x < tl.where(slot < 0, 0, width * UPSCALE))[None, :])


@triton.jit
def shuffle_to_rows_backward_kernel(
    grad, slots, inside, dy, height, width, std_r, std_g, std_b,
    REPEATS: tl.constexpr, UPSCALE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TEMPORAL: tl.constexpr,
    MERGE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: as of the forward kernel."""
    tiles, g = tl.cdiv(width * UPSCALE, COLUMNS), tl.program_id(1).to(tl.int64)
    row, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * COLUMNS
    channel, line, x, real, at, byte, stored = _line(row, g, height, width, first, UPSCALE, LINES, COLUMNS)
    packed = tl.load(inside + byte, mask=stored, other=0)
    passes = tl.reshape((packed[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint8)) & 1, [LINES, COLUMNS]) != 0
    total = tl.zeros([LINES, COLUMNS], dtype=tl.float32)
    for r in tl.static_range(REPEATS):
        slot = tl.load(slots + g * REPEATS + r).to(tl.int64)
        of = _place(slot, channel, line, x, height * UPSCALE, width * UPSCALE, HIGH, WIDE, TEMPORAL, MERGE)
        here = (x < tl.where(slot < 0, 0, width * UPSCALE))[None, :]
        total += tl.load(grad + of, mask=real & passes & here, other=0.0).to(tl.float32)
    total = total / _channel(channel, std_r, std_g, std_b)[:, None]
    tl.store(dy + at, total.to(dy.dtype.element_ty), mask=real)


def _resize_rows(x: Tensor, start: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    height, taps = weight.shape
    num_frames, channels, _, width = x.shape
    out = torch.empty(num_frames, channels, height, width, dtype=dtype, device=x.device)
    segments = triton.cdiv(width, COLUMNS)
    resize_rows_kernel[(num_frames * channels * height * segments,)](
        x, out, start, weight, taps, height, width, segments, *x.stride(), COLUMNS=COLUMNS
    )
    return out


def patchify(
    frames: Tensor, patch: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float],
    dtype: torch.dtype, bands: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The rows (N, 3 * temporal_patch * patch**2) of frames (T, 3, H, W) of any strides, resized if there are bands."""
    with torch.cuda.device_of(frames):
        start = weight = None
        height, width = frames.shape[2:]
        if bands:
            start_y, weight_y, start, weight = bands
            height, width = len(start_y), len(start)
            frames = _resize_rows(frames, start_y, weight_y, torch.float32)
        num_frames = len(frames)
        rows = triton.cdiv(num_frames, temporal_patch) * (height // patch) * (width // patch)
        out = torch.empty(rows, 3 * temporal_patch * patch * patch, dtype=dtype, device=frames.device)
        block = RESIZED_BLOCK if bands else BLOCK
        patchify_kernel[(triton.cdiv(out.numel(), block),)](
            frames, out, start, weight, 0 if weight is None else weight.shape[1], out.numel(), num_frames,
            height // (patch * merge), width // (patch * merge), *frames.stride(), *mean, *std,
            PATCH=patch, TEMPORAL=temporal_patch, MERGE=merge, BLOCK=block,
        )  # fmt: skip
    return out


def patchify_backward(
    grad: Tensor, num_frames: int, height: int, width: int, patch: int, temporal_patch: int, merge: int,
    std: Sequence[float], resized_height: int, resized_width: int, dtype: torch.dtype, bands: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The gradient of the frames (T, 3, H, W) from that of the rows (N, columns); bands: of the transposed matrices."""
    with torch.cuda.device_of(grad):
        start_y, weight_y, start, weight = bands or (None,) * 4
        out = torch.empty(
            num_frames, 3, resized_height, width, dtype=torch.float32 if bands else dtype, device=grad.device
        )
        block = RESIZED_BLOCK if bands else BLOCK
        patchify_backward_kernel[(triton.cdiv(out.numel(), block),)](
            grad.contiguous(), out, start, weight, 0 if weight is None else weight.shape[1], out.numel(), num_frames,
            resized_height, resized_width, width, *std,
            PATCH=patch, TEMPORAL=temporal_patch, MERGE=merge, BLOCK=block,
        )  # fmt: skip
        return _resize_rows(out, start_y, weight_y, dtype) if bands else out


def _shuffle_launch(frames: int, height: int, width: int, upscale: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the kernels' constants."""
    lines = triton.next_power_of_2(3 * upscale)
    columns = max(8, min(BLOCK // lines, triton.next_power_of_2(width * upscale)))
    return (triton.cdiv(width * upscale, columns) * height, frames), {"LINES": lines, "COLUMNS": columns}


def shuffle_to_rows(
    y: Tensor, slots: Tensor, rows: Tensor, upscale: int, patch_height: int, patch_width: int, temporal_patch: int,
    merge: int, mean: Sequence[float], std: Sequence[float],
) -> Tensor:  # fmt: skip
    """Write `rows`; returns the bits (G, 3, upscale h, ceil(upscale w / 8)) uint8."""
    g, height, width, _ = y.shape
    size = (g, 3, height * upscale, (width * upscale + 7) // 8)
    inside = torch.empty(size, dtype=torch.uint8, device=y.device)
    if g:
        grid, tile = _shuffle_launch(g, height, width, upscale)
        with torch.cuda.device_of(y):
            shuffle_to_rows_kernel[grid](
                y.contiguous(), slots.contiguous(), rows, inside, height, width, *mean, *std,
                REPEATS=slots.shape[1], UPSCALE=upscale,
                HIGH=patch_height, WIDE=patch_width, TEMPORAL=temporal_patch, MERGE=merge, **tile,
            )  # fmt: skip
    return inside


def shuffle_to_rows_backward(
    grad: Tensor, slots: Tensor, inside: Tensor, height: int, width: int, upscale: int, patch_height: int,
    patch_width: int, temporal_patch: int, merge: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The gradient of y, (G, height, width, 3 upscale^2) of `dtype`."""
    dy = torch.empty(len(slots), height, width, 3 * upscale**2, dtype=dtype, device=grad.device)
    if len(slots):
        grid, tile = _shuffle_launch(len(slots), height, width, upscale)
        with torch.cuda.device_of(grad):
            shuffle_to_rows_backward_kernel[grid](
                grad.contiguous(), slots.contiguous(), inside.contiguous(), dy, height, width, *std,
                REPEATS=slots.shape[1], UPSCALE=upscale,
                HIGH=patch_height, WIDE=patch_width, TEMPORAL=temporal_patch, MERGE=merge, **tile,
            )  # fmt: skip
    return dy


def examples() -> None:
    """Launch every kernel on tensors without data, for the compile table.

    Frames at their own size and resized, in every dtype; patch rows and frames from a decoder's last layer.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype, sizes in ((torch.bfloat16, (64, 96)), (torch.float16, (96,)), (torch.float32, (96,))):
        for size in sizes:
            # the numbers of taps do not change what is compiled
            bands = 2 * [empty(size, dtype=torch.int32), empty(size, 4)] if size != 64 else []
            back = 2 * [empty(64, dtype=torch.int32), empty(64, 6)] if size != 64 else []
            frames = empty(4, 3, 64, 64, dtype=dtype)
            rows = patchify(frames, 16, 2, 2, [0.5] * 3, [0.5] * 3, dtype, bands)
            patchify_backward(rows, 4, 64, 64, 16, 2, 2, [0.5] * 3, size, size, dtype, back)
        y, slots = empty(4, 352, 640, 12, dtype=dtype), empty(4, 1, dtype=torch.int32)
        for high, wide, pair, merge in ((16, 16, 2, 2), (704, 1280, 1, 1)):
            rows = empty(4 * 704 * 1280 // (pair * high * wide), 3 * pair * high * wide, dtype=dtype)
            layout = (2, high, wide, pair, merge, [0.5] * 3, [0.5] * 3)
            inside = shuffle_to_rows(y, slots, rows, *layout)
            shuffle_to_rows_backward(rows, slots, inside, 352, 640, *layout, dtype)
