"""The convolutions of a TAEHV-class decoder in Triton, as implicit matrix products. The definition is
vlmteacher/ops/tiny_decoder.py.

A program owns a rectangle of one frame's pixels and a run of channels, and adds up, place by place of the kernel, what
it reads at the shifted rectangle times that place's weights: nothing is unrolled in memory. "The previous frame" is an
index, upsampling a way of reading; bias, residual, activation and its packed signs leave with the output.

The backward gathers: a program owns dx, asks the inverse of `taps` which outputs saw its frame, and reads their gradients
with sign and slope applied. Through an upsampling the gradient is a convolution of its own: the pixels of a 2x2 block read
the same input, so that the 36 products of a pixel are 16, with weights that are added up once (see `fold`).

These kernels are compiled for GPUs (sm_80, sm_90) and executed in Triton's interpreter; they never ran on a GPU, and
the tiles below are chosen by reasoning, not by measurement.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


class Tile(NamedTuple):
    """What a program computes (height x width pixels, columns channels), how deep it reads, its warps and stages."""

    height: int
    width: int
    columns: int
    depth: int
    warps: int
    stages: int


# Nine shifted reads of a rectangle meet in the caches: near to square, and a row of 16 pixels is long enough. Up to 99 KB
# of shared memory, which the smaller GPUs since Ampere have.
WIDE = Tile(8, 16, 128, 64, 8, 3)
SMALL = Tile(8, 8, 64, 64, 4, 3)  # where the tile above would leave most of a GPU idle
FLOAT32 = Tile(8, 8, 32, 16, 4, 3)  # plain multiply-adds
UNALIGNED = Tile(4, 8, 32, 16, 4, 2)  # channels that are read one by one: their addresses would not fit the registers
PROGRAMS = 256  # tiles in flight that fill a GPU, about two for each multiprocessor of the largest


@triton.jit
def conv3x3_kernel(
    x, taps, weight, bias, y, signs, height, width, slope,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr, UPSCALE: tl.constexpr, RESIDUAL: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of a frame's pixels x tiles of N, output frames); height and width are the output's.

    Channels are constants: a decoder has few different ones, and the compiler knows how many lie together.
    """
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    steps: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    tile, g = tl.program_id(0) // across, tl.program_id(1).to(tl.int64)
    pixels, channels = tl.arange(0, HEIGHT * WIDTH), tl.arange(0, DEPTH)
    row = tile // tl.cdiv(width, WIDTH) * HEIGHT + pixels // WIDTH
    column = tile % tl.cdiv(width, WIDTH) * WIDTH + pixels % WIDTH
    n = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    frame_size = (height // UPSCALE).to(tl.int64) * (width // UPSCALE) * CHANNELS

    total = tl.zeros([HEIGHT * WIDTH, COLUMNS], dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        frame = tl.load(taps + g * TAPS + tap)
        seen = x + frame * frame_size
        for step in range(tl.where(frame < 0, 0, 9 * steps)):
            place, c = step // steps, step % steps * DEPTH + channels
            at_row, at_column = row + place // 3 - 1, column + place % 3 - 1
            inside = (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
            offset = (at_row // UPSCALE * (width // UPSCALE) + at_column // UPSCALE) * CHANNELS
            mask = inside[:, None] & (c < CHANNELS)[None, :]
            left = tl.load(seen + (offset[:, None] + c[None, :]), mask=mask, other=0.0)
            right = weight + (n[None, :] * (9 * TAPS * CHANNELS) + (place * TAPS + tap) * CHANNELS + c[:, None])
            right = tl.load(right, mask=(c < CHANNELS)[:, None] & (n < N)[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")  # float32 is not rounded to TF32

    inside = ((row < height) & (column < width))[:, None] & (n < N)[None, :]
    pixel = row * width + column
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        same = x + tl.load(taps + g * TAPS) * frame_size + (pixel[:, None] * N + n[None, :])
        total += tl.load(same, mask=inside, other=0.0).to(tl.float32)
    if signs is not None:
        size: tl.constexpr = (N + 7) // 8
        bits = tl.reshape((total > 0).to(tl.int32), [HEIGHT * WIDTH, COLUMNS // 8, 8]) << tl.arange(0, 8)
        byte = tl.program_id(0) % across * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
        signs += g * height * width * size
        real = ((row < height) & (column < width))[:, None] & (byte < size)[None, :]
        tl.store(signs + (pixel[:, None] * size + byte[None, :]), tl.sum(bits, 2).to(tl.uint8), mask=real)
        total = tl.where(total > 0, total, slope * total)
    y += g * height * width * N
    tl.store(y + (pixel[:, None] * N + n[None, :]), total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _with_slope(
    grad, signs, pixel, inside, first, slope, N: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """The gradient at `pixel`, channels [first, first + DEPTH), times the slope where the sign is not set."""
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
    grad, signs, users, weight, dx, height, width, slope,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr, UPSCALE: tl.constexpr, RESIDUAL: tl.constexpr,
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
    for tap in tl.static_range(TAPS):
        g = tl.load(users + f * TAPS + tap)
        user = grad + g * frame_size * N
        bits = None if signs is None else signs + g * frame_size * ((N + 7) // 8)
        for step in range(tl.where(g < 0, 0, side * side * steps)):
            place, first = step // steps, step % steps * DEPTH
            at_row = row * UPSCALE + side - 2 - place // side
            at_column = column * UPSCALE + side - 2 - place % side
            inside = (at_row >= 0) & (at_row < grad_height) & (at_column >= 0) & (at_column < grad_width)
            left = _with_slope(user, bits, at_row * grad_width + at_column, inside, first, slope, N, DEPTH)
            n = first + tl.arange(0, DEPTH)
            right = weight + (((n[:, None] * (side * side) + place) * TAPS + tap) * CHANNELS + c[None, :])
            right = tl.load(right, mask=(n < N)[:, None] & (c < CHANNELS)[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")

    inside, pixel = (row < height) & (column < width), row * width + column
    if RESIDUAL:
        g = tl.load(users + f * TAPS)
        bits = None if signs is None else signs + g * frame_size * ((N + 7) // 8)
        first = tl.program_id(0) % across * COLUMNS
        used = (row < tl.where(g < 0, 0, height)) & (column < width)
        total += _with_slope(grad + g * frame_size * N, bits, pixel, used, first, slope, N, COLUMNS).to(tl.float32)
    dx += f * frame_size // (UPSCALE * UPSCALE) * CHANNELS
    at = dx + (pixel[:, None] * CHANNELS + c[None, :])
    tl.store(at, total.to(dx.dtype.element_ty), mask=inside[:, None] & (c < CHANNELS)[None, :])


def fold(weight: Tensor) -> Tensor:
    """(N, 3, 3, C) -> (N, 4, 4, C), of a convolution behind nearest x2 upsampling, for its gradient.

    Rows 2 i and 2 i + 1 read row i of the input. So the gradient at row 2 i + 2 - q meets, in dx at row i, the weights'
    rows q and q - 1, of those that exist; columns alike. Sums are rounded once, to the weights' dtype.
    """
    wide = F.pad(weight.float(), (0, 0, 1, 1, 1, 1))
    wide = wide[:, 1:] + wide[:, :-1]
    return (wide[:, :, 1:] + wide[:, :, :-1]).to(weight.dtype)


def users_of(taps: Tensor, frames: int) -> Tensor:
    """The inverse of taps (G, T): (frames, T), the output frame that sees frame f as its tap, or -1."""
    users = taps.new_full((frames + 1, taps.shape[1]), -1)  # the last row is for the taps that are no frame
    output_frames = torch.arange(len(taps), dtype=taps.dtype, device=taps.device)
    return users.scatter_(0, torch.where(taps < 0, frames, taps).long(), output_frames[:, None].expand_as(taps))[:-1]


def _launch(
    frames: int, height: int, width: int, columns: int, depth: int, itemsize: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the tile as the kernel's constants. A frame is addressed with 32 bits."""
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


def conv3x3(
    x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, slope: float | None, upscale: int
) -> tuple[Tensor, Tensor]:
    """y (G, upscale H, upscale W, N) and the packed signs, or an empty tensor without an activation."""
    _, height, width, channels = x.shape
    size = (len(taps), height * upscale, width * upscale)
    n = len(weight)
    y = torch.empty(*size, n, dtype=x.dtype, device=x.device)
    signs = torch.empty(*(size if slope is not None else (0,)), (n + 7) // 8, dtype=torch.uint8, device=x.device)
    if y.numel():
        grid, tile = _launch(*size, n, channels, x.element_size())
        with torch.cuda.device_of(x):
            conv3x3_kernel[grid](
                x, taps, weight, bias, y, None if slope is None else signs, *size[1:], 0.0 if slope is None else slope,
                TAPS=taps.shape[1], CHANNELS=channels, N=n, UPSCALE=upscale, RESIDUAL=residual, **tile,
            )  # fmt: skip
    return y, signs if slope is not None else signs.view(-1)


def conv3x3_backward(
    grad: Tensor, signs: Tensor, taps: Tensor, frames: int, weight: Tensor, residual: bool, slope: float | None,
    upscale: int,
) -> Tensor:  # fmt: skip
    """dx (frames, H, W, C)."""
    _, height, width, n = grad.shape
    count = taps.shape[1]
    channels = weight.shape[-1] // count
    size = (frames, height // upscale, width // upscale)
    dx = torch.empty(*size, channels, dtype=grad.dtype, device=grad.device)
    if dx.numel():
        grid, tile = _launch(*size, channels, n, grad.element_size())
        with torch.cuda.device_of(grad):
            conv3x3_backward_kernel[grid](
                grad, None if slope is None else signs, users_of(taps, frames), fold(weight) if upscale > 1 else weight,
                dx, *size[1:], 0.0 if slope is None else slope, TAPS=count, CHANNELS=channels, N=n, UPSCALE=upscale,
                RESIDUAL=residual, **tile,
            )  # fmt: skip
    return dx
