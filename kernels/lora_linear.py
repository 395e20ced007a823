"""The LoRA linear in Triton: every step is one tiled matrix product. The definition is vlmteacher/ops/lora_linear.py.

A program adds up a list of products left . right in one float32 accumulator, so that the low-rank product is a few more
steps of the wide one and y and dx are written once:
y = s (S B^T) + x W^T + b and dx = dS A + the sum over the layers of dy W. The skinny S = x A^T and dS = s dy B serve
all layers of a group. dA = dS^T x and dB = s dy^T S sum over the rows: their results alone have too few tiles to occupy
a GPU, so the rows are split and the parts are added afterwards, in a fixed order and without atomics.

The tiles below are chosen by reasoning, not by measurement: see benchmarks/NEGATIVE.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmteacher.kernels.products import add_product


class Tile(NamedTuple):
    """The tile of a program (rows x columns), the depth that it reads per step, and its warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# 16-bit products run on tensor cores, whose operands should be read seldom: the wide ones (y, dx) have large tiles,
# within the 99 KB of shared memory that the smaller GPUs since Ampere have, and larger ones where Hopper's wgmma keeps
# operands out of the registers. The skinny ones (S, dS) and the sums over rows (dA, dB) have as many columns as the
# ranks need, up to these.
HOPPER = Tile(128, 256, 64, 8, 3)
WIDE = Tile(128, 128, 64, 8, 4)
SKINNY = Tile(64, 128, 64, 4, 4)
SUM = Tile(128, 128, 64, 8, 3)
SMALL = Tile(64, 64, 64, 4, 3)  # where the tiles above would leave most of a GPU idle
FLOAT32 = Tile(32, 32, 16, 4, 3)  # plain multiply-adds
# For rows that are not aligned to 16 bytes: their elements are loaded one by one, and the addresses of a large tile's
# would not fit the registers.
UNALIGNED = Tile(32, 32, 16, 4, 2)

# Tiles in flight that fill a GPU: about two for each multiprocessor of the largest. A constant and not the device's
# own number, so that sums are split alike, and give the same bits, everywhere.
PROGRAMS = 256
ADD_BLOCK = 1024


@triton.jit
def _accumulate(
    total, left, right, stride_left, stride_left_depth, stride_right_depth, stride_right, depth, begin, end,
    row, column, num_rows, num_columns, DEPTH: tl.constexpr,
):  # fmt: skip
    """total + left[row:, begin:end] . right[begin:end, column:], in steps of DEPTH."""
    # 64-bit offsets of the tile and 32-bit ones within it take half the registers of one pointer per element
    rows, columns, steps = tl.arange(0, total.shape[0]), tl.arange(0, total.shape[1]), tl.arange(0, DEPTH)
    left += row.to(tl.int64) * stride_left + begin.to(tl.int64) * stride_left_depth
    right += begin.to(tl.int64) * stride_right_depth + column.to(tl.int64) * stride_right
    left_offsets = rows[:, None] * stride_left + steps[None, :] * stride_left_depth
    right_offsets = steps[:, None] * stride_right_depth + columns[None, :] * stride_right
    inside_rows, inside_columns = row + rows < num_rows, column + columns < num_columns
    for at in range(begin, end, DEPTH):
        inside = at + steps < depth
        a = tl.load(left + left_offsets, mask=inside_rows[:, None] & inside[None, :], other=0.0)
        b = tl.load(right + right_offsets, mask=inside[:, None] & inside_columns[None, :], other=0.0)
        total = add_product(total, a, b)
        left += DEPTH * stride_left_depth
        right += DEPTH * stride_right_depth
    return total


@triton.jit
def product_kernel(
    products, scale, bias, out, num_rows, num_columns, stride_part, stride_row, stride_column, chunk,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FIRST_DEPTH: tl.constexpr,
):  # fmt: skip
    """out = scale * (the first product) + the other products + bias; a product is (left, right, its strides, depth).

    Grid: (tiles of `out`, parts of the sum). A part sums over `chunk` of the depth and has an `out` of its own.
    """
    # Bands of eight tile rows, each walked column by column: programs that run together share operands in L2.
    down, across = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    band = tl.program_id(0) // (8 * across) * 8
    height = tl.minimum(down - band, 8)
    within = tl.program_id(0) % (8 * across)
    row, column = (band + within % height) * ROWS, within // height * COLUMNS

    begin = tl.program_id(1) * chunk
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for i in tl.static_range(len(products)):
        left, right, stride_left, stride_left_depth, stride_right_depth, stride_right, depth = products[i]
        total = _accumulate(
            total, left, right, stride_left, stride_left_depth, stride_right_depth, stride_right, depth,
            begin, tl.minimum(begin + chunk, depth), row, column, num_rows, num_columns,
            FIRST_DEPTH if i == 0 else DEPTH,
        )  # fmt: skip
        if i == 0:
            total *= scale
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    out += tl.program_id(1).to(tl.int64) * stride_part
    out += rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_parts_kernel(parts, out, size, stride_part, count, BLOCK: tl.constexpr):
    """out[i] = the sum of the parts at i, always in the same order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    parts += i
    for _ in range(count):
        total += tl.load(parts, mask=i < size, other=0.0)
        parts += stride_part
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type != "cpu" and triton.runtime.driver.active.get_current_target().arch == 90


def _usable(tile: Tile, left: Tensor, right: Tensor) -> Tile:
    vector = 16 // left.element_size()
    if not all(stride == 1 or stride % vector == 0 for stride in (*left.stride(), *right.stride())):
        return UNALIGNED
    return FLOAT32 if left.dtype == torch.float32 else tile


def _wide_tile(out: Tensor, left: Tensor, right: Tensor) -> Tile:
    tile = HOPPER if _is_hopper(out.device) else WIDE
    tiles = triton.cdiv(out.shape[0], tile.rows) * triton.cdiv(out.shape[1], tile.columns)
    return _usable(tile if tiles >= PROGRAMS // 2 else SMALL, left, right)


def _product(
    out: Tensor, products: Sequence[tuple[Tensor, Tensor]], tile: Tile, scale: float = 1.0, bias: Tensor | None = None
) -> None:
    """out (parts, rows, columns) = scale * left . right of the first product + the others + bias; any strides."""
    parts, rows, columns = out.shape
    chunk = triton.cdiv(max(left.shape[1] for left, _ in products), parts)
    width, first_depth = (
        min(most, max(16, triton.next_power_of_2(size)))
        for most, size in ((tile.columns, columns), (tile.depth, products[0][0].shape[1]))
    )
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, width)
    if tiles:
        product_kernel[tiles, parts](
            tuple((left, right, *left.stride(), *right.stride(), left.shape[1]) for left, right in products),
            scale, bias, out, rows, columns, *out.stride(), triton.cdiv(chunk, tile.depth) * tile.depth,
            ROWS=tile.rows, COLUMNS=width, DEPTH=tile.depth, FIRST_DEPTH=first_depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _sum_over_rows(wide: Tensor, low: Tensor, out: Sequence[Tensor], scale: float = 1.0, *, transposed: bool) -> None:
    """wide^T (K, M) . low (M, R), or the transpose of that, cut along R into the contiguous tensors `out`."""
    (num_rows, size), rank = wide.shape, low.shape[1]
    tile = _usable(SUM, wide.T, low)
    tiles = triton.cdiv(size, tile.rows) * triton.cdiv(rank, tile.columns)
    parts = max(1, min(PROGRAMS // max(1, tiles), triton.cdiv(num_rows, 4 * tile.depth)))
    shape = (parts, rank, size) if transposed else (parts, size, rank)
    sums = torch.empty(shape, dtype=torch.float32, device=wide.device)
    _product(sums.transpose(1, 2) if transposed else sums, [(wide.T, low)], tile, scale)
    start = 0
    for each in out:
        if count := each.numel():
            add_parts_kernel[triton.cdiv(count, ADD_BLOCK),](
                sums.view(parts, -1)[:, start:], each, count, sums.stride(0), parts, BLOCK=ADD_BLOCK
            )
        start += count


def _stack(lora_a: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(lora_a)) if len(lora_a) > 1 else lora_a[0]


def lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
) -> list[Tensor]:
    """Each layer's y (M, N), then S (M, sum of the ranks), from x (M, K)."""
    ranks = [b.shape[1] for b in lora_b]
    s = torch.empty(len(x), sum(ranks), dtype=x.dtype, device=x.device)
    ys = [torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device) for weight in weights]
    with torch.cuda.device_of(x):
        a = _stack(lora_a).T
        _product(s[None], [(x, a)], _usable(SKINNY, x, a))
        layers = zip(ys, weights, lora_b, s.split(ranks, 1), scaling, strict=True)
        for i, (y, weight, b, low, factor) in enumerate(layers):
            tile = _wide_tile(y, x, weight)
            _product(y[None], [(low, b.T), (x, weight.T)], tile, factor, biases[i].contiguous() if biases else None)
    return [*ys, s]


def lora_linear_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> list[Tensor]:
    """dx (M, K), then every dA, then every dB, each of them if it is needed."""
    grad = grads[0]
    ranks = [b.shape[1] for b in lora_b]
    dx = [torch.empty(len(grad), weights[0].shape[1], dtype=grad.dtype, device=grad.device)] if need_x else []
    da = [torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in lora_a] if need_a else []
    db = [torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in lora_b] if need_b else []
    with torch.cuda.device_of(grad):
        if need_x or need_a:
            ds = torch.empty(len(grad), sum(ranks), dtype=grad.dtype, device=grad.device)
            for grad, b, low, factor in zip(grads, lora_b, ds.split(ranks, 1), scaling, strict=True):
                _product(low[None], [(grad, b)], _usable(SKINNY, grad, b), factor)
        for out in dx:
            products = [(ds, _stack(lora_a)), *zip(grads, weights, strict=True)]
            _product(out[None], products, _wide_tile(out, *products[-1]))
        if need_a:
            _sum_over_rows(x, ds, da, transposed=True)
        for grad, out, low, factor in zip(grads, db, s.split(ranks, 1), scaling, strict=False):
            _sum_over_rows(grad, low, [out], factor, transposed=False)
    return [*dx, *da, *db]


def examples() -> None:
    """Launch every kernel on tensors without data, for the compile table.

    Groups and single layers, large and small, and rows that are not aligned, in every dtype.
    """
    shapes = [(4096, 3072, (3072,) * 3, 16), (4096, 3072, (3072,), 128), (257, 1001, (1003,), 5)]
    for dtype, cases in ((torch.bfloat16, shapes), (torch.float16, shapes[:1]), (torch.float32, shapes)):
        for m, k, sizes, rank in cases:

            def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.empty(shape, dtype=dtype, device="meta")

            x, weights, biases = empty(m, k), [empty(n, k) for n in sizes], [empty(n) for n in sizes]
            layers = ([empty(rank, k) for _ in sizes], [empty(n, rank) for n in sizes], [0.5] * len(sizes))
            *ys, s = lora_linear(x, weights, biases, *layers)
            lora_linear(x, weights, [], *layers)
            lora_linear_backward(ys, x, s, weights, *layers, True, True, True)
