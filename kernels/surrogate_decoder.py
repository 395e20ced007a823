"""The convolutions of a TAEHV-class decoder in Triton, as implicit matrix products. The definition is
vlmteacher/ops/surrogate_decoder.py.

A program owns a rectangle of one frame's pixels and a run of channels, and adds up, place by place of the kernel, what
it reads at the shifted rectangle times that place's weights: nothing is unrolled in memory. "The previous frame" is an
index; bias, residual, activation and its packed signs leave with the output. The backward gathers: a program owns dx,
asks the inverse of `taps` which outputs saw its frame, and reads their gradients with sign and slope applied.

Behind nearest upsampling several of the nine places read the same pixel: their weights are added up once (see `fold`),
so that four products per output pixel remain of nine, forward and backward, on frames that are never upsampled.

The tiles below are chosen by reasoning, not by measurement.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from vlmteacher.kernels.products import add_product


class Tile(NamedTuple):
    """The tile of a program (height x width pixels, columns channels), its depth per step, warps and stages."""

    height: int
    width: int
    columns: int
    depth: int
    warps: int
    stages: int


# The nine shifted reads of a nearly square rectangle hit the caches. Up to 99 KB of shared memory, which the smaller
# GPUs since Ampere have.
WIDE = Tile(8, 16, 128, 64, 8, 3)
SMALL = Tile(8, 8, 64, 64, 4, 3)  # for layers whose larger tiles would leave most of a GPU idle
FLOAT32 = Tile(8, 8, 32, 16, 4, 3)  # plain multiply-adds
UNALIGNED = Tile(4, 8, 32, 16, 4, 2)  # channels are read one by one: more addresses would not fit the registers
PROGRAMS = 256  # tiles in flight that fill a GPU, about two for each multiprocessor of the largest


@triton.jit
def _taps(frames, each: tl.constexpr, TAPS: tl.constexpr):
    """A frame's first and last of its TAPS entries (-1: none), and the range of steps, `each` per tap, that read."""
    frame = tl.load(frames)
    if TAPS == 1:
        return frame, frame, 0, tl.where(frame < 0, 0, each)
    last = tl.load(frames + 1)
    return frame, last, tl.where(frame < 0, each, 0), tl.where(last < 0, each, 2 * each)


@triton.jit
def conv3x3_kernel(
    x, taps, weight, bias, residual, rows, y, signs, height, width, slope,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr, UPSCALE: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of a frame's pixels x tiles of N, output frames x UPSCALE^2); height and width are those of x.

    weight: (N, S, S, TAPS CHANNELS) with S = 3, or 4 where folded for UPSCALE 2: then a program owns every second row
    and column of y, from (a, b) on, and its four places are rows a and a + 2 of the weights, columns alike.
    Channels are constants: a decoder has few different ones, and the compiler knows how many lie together.
    """
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    steps: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    side: tl.constexpr = 4 - UPSCALE
    stored: tl.constexpr = 2 + UPSCALE
    tile, g = tl.program_id(0) // across, (tl.program_id(1) // (UPSCALE * UPSCALE)).to(tl.int64)
    a, b = tl.program_id(1) // UPSCALE % UPSCALE, tl.program_id(1) % UPSCALE
    pixels, channels = tl.arange(0, HEIGHT * WIDTH), tl.arange(0, DEPTH)
    row = tile // tl.cdiv(width, WIDTH) * HEIGHT + pixels // WIDTH
    column = tile % tl.cdiv(width, WIDTH) * WIDTH + pixels % WIDTH
    n = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    frame_size = height.to(tl.int64) * width

    total = tl.zeros([HEIGHT * WIDTH, COLUMNS], dtype=tl.float32)
    each: tl.constexpr = side * side * steps
    frame, last, begin, end = _taps(taps + g * TAPS, each, TAPS)
    for step in range(begin, end):
        tap, place = step // each, step % each // steps
        down, right = place // side, place % side
        c = step % steps * DEPTH + channels
        at_row, at_column = row + down - 1 + a, column + right - 1 + b
        inside = (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
        seen = x + tl.where(tap == 0, frame, last) * frame_size * CHANNELS
        offset = (at_row * width + at_column) * CHANNELS
        mask = inside[:, None] & (c < CHANNELS)[None, :]
        pixel_values = tl.load(seen + (offset[:, None] + c[None, :]), mask=mask, other=0.0)
        place = (a + UPSCALE * down) * stored + b + UPSCALE * right
        weights = weight + (
            n[None, :] * (stored * stored * TAPS * CHANNELS) + (place * TAPS + tap) * CHANNELS + c[:, None]
        )
        weights = tl.load(weights, mask=(c < CHANNELS)[:, None] & (n < N)[None, :], other=0.0)
        total = add_product(total, pixel_values, weights)

    inside_frame = (row < height) & (column < width)
    inside = inside_frame[:, None] & (n < N)[None, :]
    pixel = (row * UPSCALE + a) * (width * UPSCALE) + column * UPSCALE + b
    frame_size *= UPSCALE * UPSCALE
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        residual += tl.load(rows + g) * frame_size * N
        total += tl.load(residual + (pixel[:, None] * N + n[None, :]), mask=inside, other=0.0).to(tl.float32)
    if signs is not None:
        size: tl.constexpr = (N + 7) // 8
        bits = tl.reshape((total > 0).to(tl.int32), [HEIGHT * WIDTH, COLUMNS // 8, 8]) << tl.arange(0, 8)
        byte = tl.program_id(0) % across * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
        real = inside_frame[:, None] & (byte < size)[None, :]
        signs += g * frame_size * size
        tl.store(signs + (pixel[:, None] * size + byte[None, :]), tl.sum(bits, 2).to(tl.uint8), mask=real)
        total = tl.where(total > 0, total, slope * total)
    y += g * frame_size * N
    tl.store(y + (pixel[:, None] * N + n[None, :]), total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _with_slope(grad, signs, pixel, inside, first, slope, N: tl.constexpr, DEPTH: tl.constexpr):
    """The gradient at `pixel`, channels [first, first + DEPTH), times the slope if the sign bit is not set."""
    n = first + tl.arange(0, DEPTH)
    value = tl.load(grad + (pixel[:, None] * N + n[None, :]), mask=inside[:, None] & (n < N)[None, :], other=0.0)
    if signs is not None:
        size: tl.constexpr = (N + 7) // 8
        byte = first // 8 + tl.arange(0, DEPTH // 8)
        packed = tl.load(
            signs + (pixel[:, None] * size + byte[None, :]), mask=inside[:, None] & (byte < size)[None, :], other=0
        )
        positive = tl.reshape((packed[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint8)) & 1, value.shape)
        value = tl.where(positive != 0, value, (slope * value.to(tl.float32)).to(value.dtype))
    return value


@triton.jit
def conv3x3_backward_kernel(
    grad, signs, users, weight, residual, residual_signs, dx, height, width, slope,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr, UPSCALE: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of a frame's pixels x tiles of CHANNELS, frames of dx); height and width are those of dx.

    users (frames, TAPS): the output frame that sees frame f as its tap, or -1. weight: (N, S, S, TAPS CHANNELS) with
    S = 3, or 4 where folded for UPSCALE 2: the gradient at row UPSCALE i + S - 2 - q meets the weights' row q.
    """
    across: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    steps: tl.constexpr = (N + DEPTH - 1) // DEPTH
    side: tl.constexpr = 2 + UPSCALE
    tile, f = tl.program_id(0) // across, tl.program_id(1).to(tl.int64)
    pixels = tl.arange(0, HEIGHT * WIDTH)
    row = tile // tl.cdiv(width, WIDTH) * HEIGHT + pixels // WIDTH
    column = tile % tl.cdiv(width, WIDTH) * WIDTH + pixels % WIDTH
    c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    grad_height, grad_width = height * UPSCALE, width * UPSCALE
    frame_size = grad_height.to(tl.int64) * grad_width

    total = tl.zeros([HEIGHT * WIDTH, COLUMNS], dtype=tl.float32)
    each: tl.constexpr = side * side * steps
    user, last, begin, end = _taps(users + f * TAPS, each, TAPS)
    for step in range(begin, end):
        tap, place, first = step // each, step % each // steps, step % steps * DEPTH
        at_row = row * UPSCALE + side - 2 - place // side
        at_column = column * UPSCALE + side - 2 - place % side
        inside = (at_row >= 0) & (at_row < grad_height) & (at_column >= 0) & (at_column < grad_width)
        begins = tl.where(tap == 0, user, last) * frame_size
        bits = None if signs is None else signs + begins * ((N + 7) // 8)
        at = at_row * grad_width + at_column
        values = _with_slope(grad + begins * N, bits, at, inside, first, slope, N, DEPTH)
        n = first + tl.arange(0, DEPTH)
        weights = weight + (((n[:, None] * (side * side) + place) * TAPS + tap) * CHANNELS + c[None, :])
        weights = tl.load(weights, mask=(n < N)[:, None] & (c < CHANNELS)[None, :], other=0.0)
        total = add_product(total, values, weights)

    inside, pixel = (row < height) & (column < width), row * width + column
    if residual is not None:
        bits = None if residual_signs is None else residual_signs + user * frame_size * ((CHANNELS + 7) // 8)
        used = (row < tl.where(user < 0, 0, height)) & (column < width)
        first = tl.program_id(0) % across * COLUMNS
        back = _with_slope(residual + user * frame_size * CHANNELS, bits, pixel, used, first, slope, CHANNELS, COLUMNS)
        total += back.to(tl.float32)
    dx += f * frame_size // (UPSCALE * UPSCALE) * CHANNELS
    at = dx + (pixel[:, None] * CHANNELS + c[None, :])
    tl.store(at, total.to(dx.dtype.element_ty), mask=inside[:, None] & (c < CHANNELS)[None, :])


def fold(weight: Tensor) -> Tensor:
    """(N, 3, 3, C) -> (N, 4, 4, C): a convolution after nearest x2 upsampling as a transposed one of stride 2.

    Rows 2 i and 2 i + 1 of what it reads are row i of the input. So input row i meets output row 2 i + 2 - q with the
    sum of the weights' rows q and q - 1, of those that exist; columns alike. Rounded once, to the weights' dtype.
    """
    wide = F.pad(weight.float(), (0, 0, 1, 1, 1, 1))
    wide = wide[:, 1:] + wide[:, :-1]
    return (wide[:, :, 1:] + wide[:, :, :-1]).to(weight.dtype)


def users_of(taps: Tensor, frames: int) -> Tensor:
    """The inverse of taps (G, T): (frames, T), the output frame that reads frame f as its tap, or -1."""
    users = taps.new_full((frames + 1, taps.shape[1]), -1)  # the last row collects the taps of -1
    output_frames = torch.arange(len(taps), dtype=taps.dtype, device=taps.device)
    return users.scatter_(0, torch.where(taps < 0, frames, taps).long(), output_frames[:, None].expand_as(taps))[:-1]


def _launch(
    frames: int, height: int, width: int, columns: int, depth: int, itemsize: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the kernel's constants. Raises ValueError for frames that 32 bits cannot address."""
    if 4 * height * width * max(columns, depth) >= 2**31 or frames >= 2**16:
        wide = max(columns, depth)
        raise ValueError(f"{frames} frames of {height}x{width} pixels and {wide} channels are too many or too large")
    tile = WIDE if frames * triton.cdiv(height, 8) * triton.cdiv(width, 16) >= PROGRAMS // 2 else SMALL
    if itemsize == 4:
        tile = FLOAT32
    if columns % 4 or depth % 4:
        tile = UNALIGNED
    across, deep = (
        min(most, max(16, triton.next_power_of_2(size)))
        for most, size in ((tile.columns, columns), (tile.depth, depth))
    )
    tiles = triton.cdiv(height, tile.height) * triton.cdiv(width, tile.width) * triton.cdiv(columns, across)
    constants = {"HEIGHT": tile.height, "WIDTH": tile.width, "COLUMNS": across, "DEPTH": deep}
    return (tiles, frames), constants | {"num_warps": tile.warps, "num_stages": tile.stages}


def _dense(*tensors: Any) -> Any:
    """The tensors made contiguous, as the kernels read them; a None stays None."""
    return (None if t is None else t.contiguous() for t in tensors)


def conv3x3(
    x: Tensor,
    taps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: Tensor | None,
    slope: float | None,
    upscale: int,
) -> tuple[Tensor, Tensor]:
    """y (G, upscale H, upscale W, N) and the packed signs, or an empty tensor without an activation."""
    x, taps, weight, bias, residual, rows = _dense(x, taps, weight, bias, residual, rows)
    _, height, width, channels = x.shape
    size = (len(taps), height * upscale, width * upscale)
    n = len(weight)
    y = torch.empty(*size, n, dtype=x.dtype, device=x.device)
    signs = torch.empty(*(size if slope is not None else (0,)), (n + 7) // 8, dtype=torch.uint8, device=x.device)
    if y.numel():
        grid, tile = _launch(len(taps) * upscale**2, height, width, n, channels, x.element_size())
        with torch.cuda.device_of(x):
            conv3x3_kernel[grid](
                x, taps, fold(weight) if upscale > 1 else weight, bias, residual, rows,
                y, None if slope is None else signs, height, width, slope or 0.0,
                TAPS=taps.shape[1], CHANNELS=channels, N=n, UPSCALE=upscale, **tile,
            )  # fmt: skip
    return y, signs if slope is not None else signs.view(-1)


def conv3x3_backward(
    grad: Tensor,
    signs: Tensor,
    taps: Tensor,
    frames: int,
    weight: Tensor,
    residual: Tensor | None,
    residual_signs: Tensor | None,
    slope: float | None,
    upscale: int,
) -> Tensor:
    """dx (frames, H, W, C)."""
    grad, signs, taps, weight, residual, residual_signs = _dense(grad, signs, taps, weight, residual, residual_signs)
    _, height, width, n = grad.shape
    count = taps.shape[1]
    channels = weight.shape[-1] // count
    size = (frames, height // upscale, width // upscale)
    dx = torch.empty(*size, channels, dtype=grad.dtype, device=grad.device)
    if dx.numel():
        grid, tile = _launch(*size, channels, n, grad.element_size())
        signs_of_both = (None, None) if slope is None else (signs, residual_signs)
        with torch.cuda.device_of(grad):
            conv3x3_backward_kernel[grid](
                grad, signs_of_both[0], users_of(taps, frames), fold(weight) if upscale > 1 else weight,
                residual, signs_of_both[1], dx, *size[1:], slope or 0.0,
                TAPS=count, CHANNELS=channels, N=n, UPSCALE=upscale, **tile,
            )  # fmt: skip
    return dx


def examples() -> None:
    """Launch every kernel on tensors without data, for the compile table.

    The layers of taew2_2 that differ, in bfloat16, one of them in float32, and channels that are not aligned.
    """
    layers = [  # height, width, channels, n, taps, slope, bias, residual, upscale
        (44, 80, 48, 256, 1, 0.0, True, False, 1),
        (44, 80, 256, 256, 2, 0.0, True, True, 1),
        (44, 80, 256, 256, 1, 0.0, True, True, 1),
        (44, 80, 256, 128, 1, None, False, False, 2),
        (88, 160, 128, 128, 1, 0.0, True, True, 1),
        (176, 320, 64, 64, 1, 0.0, True, True, 1),
        (352, 640, 64, 12, 1, None, True, False, 1),
    ]
    cases = [(torch.bfloat16, *layer) for layer in layers] + [(torch.float32, *layers[2])]
    cases += [(dtype, 7, 9, 5, 12, 2, 0.2, True, False, 2) for dtype in (torch.bfloat16, torch.float32)]
    for dtype, height, width, channels, n, count, slope, bias, residual, upscale in cases:
        x = torch.empty(24, height, width, channels, dtype=dtype, device="meta")
        taps = torch.empty(24, count, dtype=torch.int32, device="meta")
        weight = torch.empty(n, 3, 3, count * channels, dtype=dtype, device="meta")
        b = torch.empty(n, dtype=dtype, device="meta") if bias else None
        banks = [None, None]  # a memory block's third convolution adds one forward, its first one backward
        if residual:
            banks[count - 1] = torch.empty(24, height, width, n, dtype=dtype, device="meta")
        y, signs = conv3x3(x, taps, weight, b, banks[0], taps, slope, upscale)
        conv3x3_backward(y, signs, taps, 24, weight, banks[1], signs, slope, upscale)
