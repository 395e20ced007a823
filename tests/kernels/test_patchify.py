"""The GPU kernels of patchify against the definition in float64: Triton's in its interpreter,
the CUDA source executed on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.kernels import simt
from tests.kernels.interpreter import interpreted, with_triton
from tests.ops.test_patchify import by_matrices
from tests.rounding import check, expected
from vlmteacher.ops.patchify import (
    Rows,
    patchify_reference,
    shuffle_to_rows_backward_reference,
    shuffle_to_rows_reference,
)
from vlmteacher.ops.resize import Band, resize_bands, resize_matrix

MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
DTYPES = [(d, d) for d in (torch.float32, torch.float16, torch.bfloat16)]
DTYPES += [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
CASES = [  # frames, height, width, patch, temporal patch, merge, and the size they are resized to
    (4, 16, 32, 4, 2, 2, (16, 32)),  # none: the frames' own
    (5, 16, 8, 2, 2, 2, (16, 8)),
    (1, 28, 14, 14, 2, 1, (28, 14)),
    (7, 12, 24, 2, 4, 3, (12, 24)),
    (3, 16, 32, 8, 1, 2, (16, 32)),
    (3, 33, 47, 4, 2, 1, (16, 24)),  # smaller, odd
    (3, 10, 8, 2, 2, 2, (20, 12)),  # larger
    (2, 9, 100, 4, 2, 2, (16, 8)),
    (1, 1, 1, 2, 2, 2, (4, 8)),
    (2, 13, 21, 1, 1, 1, (1, 2)),
    (2, 20, 36, 14, 1, 1, (14, 14)),  # the patch is the frame
    (1, 30, 600, 5, 1, 1, (20, 70)),  # more than one block of a kernel in every direction
]
PARTS = 3  # of both, in Triton's interpreter, which is slow
SHUFFLES = [  # slots by frame, height, width of y, upscale, patch height and width, temporal patch, merge
    ([[0], [2], [1]], 4, 6, 1, 2, 6, 1, 1),
    ([[1], [3, 5], [0], [2], [4]], 8, 4, 2, 4, 4, 2, 2),  # an odd number of frames, whose last is the second here
    ([[3], [0, 1, 2]], 3, 5, 4, 4, 4, 4, 1),
    ([[0], [1]], 7, 37, 2, 14, 74, 1, 1),  # frames, of more than a block of columns, in bits with a rest
    ([[4, 5]], 6, 12, 1, 1, 2, 2, 3),  # the second chunk of a video whose first is elsewhere
    ([], 4, 4, 1, 4, 4, 1, 1),
]


def draw_shuffle(case: tuple, dtype: torch.dtype, out: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Rows]:
    """y of `dtype`, below, on, within and above [0, 1]; the slots; the rows' gradient of `out`; how they lie."""
    slots, height, width, upscale, *sizes = case
    most = max(map(len, slots), default=1)
    table = torch.tensor([[*s, *[-1] * (most - len(s))] for s in slots], dtype=torch.int32).view(len(slots), most)
    generator = torch.Generator().manual_seed(height * width)
    y = torch.randn(len(slots), height, width, 3 * upscale**2, generator=generator).add(0.5).to(dtype)
    y.view(-1)[::7], y.view(-1)[1::7] = 0.0, 1.0
    last = max((slot for each in slots for slot in each), default=0)
    pixels = (last // sizes[2] + 1) * sizes[2] * height * width * upscale**2
    columns = 3 * sizes[0] * sizes[1] * sizes[2]
    grad = torch.randn(3 * pixels // columns, columns, generator=generator).to(out)
    return y, table, grad, Rows(*sizes, MEAN, STD)


def shuffle_errors(
    case: tuple, drawn: tuple[Tensor, Tensor, Tensor, Rows], rows: Tensor, inside: Tensor, dy: Tensor, slack: int = 1
) -> list[tuple[str, float, float]]:
    """(what, error, allowed) of rows, which held NaN where nothing is written, of the bits and of dy."""
    y, slots, grad, layout = drawn
    (size, upscale), exact = ((case[1], case[2]), case[3]), torch.full_like(grad, torch.nan, dtype=torch.float64)
    plain = torch.full_like(grad, torch.nan)
    shuffle_to_rows_reference(y.double(), slots, exact, upscale, layout)
    bits = shuffle_to_rows_reference(y, slots, plain, upscale, layout)
    exact_dy = shuffle_to_rows_backward_reference(grad.double(), slots, bits, size, upscale, layout, torch.float64)
    assert inside.shape == bits.shape and torch.equal(rows.isnan(), exact.isnan())
    found = [("bits", float((inside != bits).sum()), 0.0)]
    for what, ours, truth, dtype in (("rows", rows, exact, grad.dtype), ("dy", dy, exact_dy, y.dtype)):
        assert ours.shape == truth.shape and ours.dtype == dtype
        error = (ours.double() - truth).abs().nan_to_num().max() if truth.numel() else 0.0
        # a difference, a quotient, a sum of two and a cast: four roundings of half an eps of what is largest
        size = float(truth.abs().nan_to_num().max()) if truth.numel() else 0.0
        found.append((what, float(error), 2 * slack * torch.finfo(dtype).eps * size))
    return found


def draw(case: tuple, dtype: torch.dtype, out: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, int, int], list[int]]:
    """Strided frames of `dtype`, the gradient of their rows of `out`, the patch sizes, the size after the resize."""
    t, height, width, *args, size = case
    generator = torch.Generator().manual_seed(t * height + width)
    frames = torch.rand(t, 3, width, height, generator=generator).to(dtype).transpose(2, 3)
    shape = patchify_reference(frames.double(), *args, MEAN, STD, size).shape
    return frames, torch.randn(shape, generator=generator).to(out), tuple(args), list(size)


def execute(
    library: ctypes.CDLL, frames: Tensor, grad: Tensor, args: tuple[int, int, int], size: list[int]
) -> tuple[Tensor, Tensor]:
    """The rows in the dtype of their gradient, and the frames' gradient in the dtype of the frames."""
    kinds = [(x.dtype.itemsize, x.dtype == torch.bfloat16) for x in (frames, grad)]
    shape, sizes = list(frames.shape[2:]), [len(frames), *size, *args]
    mean, std = ([ctypes.c_double(v) for v in values] for values in (MEAN, STD))
    with simt.Memory(library) as memory:

        def bands(backward: bool) -> list[object]:
            found: list[object] = []
            for i, table in enumerate(resize_bands(frames, shape, size, backward)):
                found += [memory.put(table)] if i % 2 == 0 else [memory.put(table), table.shape[1]]
            return found or [None, None, 0] * 2

        stored = memory.put(frames.transpose(2, 3))  # as `draw` made them
        stride = [stored.stride(i) for i in (0, 1, 3, 2)]
        out, out_grad = memory.empty(*grad.shape, dtype=grad.dtype), memory.empty(*frames.shape, dtype=frames.dtype)
        simt.call(
            library.run_forward, *kinds[0], *kinds[1], stored, stride, sizes, *shape, *bands(False), mean, std, out
        )
        simt.call(
            library.run_backward, *kinds[1], *kinds[0], memory.put(grad), sizes, *shape, *bands(True), std, out_grad
        )
        return out.clone(), out_grad.clone()


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda(library, case, dtype, out_dtype):
    library.simt_seed(case[1])
    frames, grad, args, size = draw(case, dtype, out_dtype)
    check(execute(library, frames, grad, args, size), expected(by_matrices, frames, grad, args, size, out_dtype))


def test_every_order_of_the_warps_gives_the_same_bits(library):
    found = []
    for seed in range(2):
        library.simt_seed(seed)
        found.append(execute(library, *draw(CASES[-1], torch.float32, torch.float32)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("case", SHUFFLES, ids=str)
def test_cuda_from_a_decoder_s_last_layer(library, case, dtype, out_dtype):
    library.simt_seed(case[1])
    drawn = draw_shuffle(case, dtype, out_dtype)
    y, slots, grad, layout = drawn
    kinds = [(x.dtype.itemsize, x.dtype == torch.bfloat16) for x in (y, grad)]
    sizes = [*y.shape[:3], case[3], *layout[:4], slots.shape[1]]
    mean, std = ([ctypes.c_double(v) for v in values] for values in (MEAN, STD))
    with simt.Memory(library) as memory:
        rows, dy = memory.empty(*grad.shape, dtype=out_dtype), memory.empty(*y.shape, dtype=dtype)
        bits = (len(y), 3, y.shape[1] * case[3], (y.shape[2] * case[3] + 7) // 8)
        inside, table = memory.empty(*bits, dtype=torch.uint8), memory.put(slots)
        simt.call(library.run_shuffle, *kinds[0], *kinds[1], memory.put(y), table, sizes, mean, std, rows, inside)
        simt.call(
            library.run_shuffle_backward, *kinds[1], *kinds[0], memory.put(grad), table, inside, sizes, mean, std, dy
        )
        for what, error, allowed in shuffle_errors(case, drawn, rows.clone(), inside.clone(), dy.clone()):
            assert error <= allowed, what


@pytest.mark.parametrize("width", [4_000, 200_000])
def test_long_rows_get_smaller_tiles_and_longer_ones_are_refused(library, width):
    """To two pixels: 48 KiB of shared memory hold the columns of a smaller tile, then of none."""
    frames, args, size = torch.rand(1, 3, width, 1).transpose(2, 3), (1, 1, 1), [1, 2]
    if width > 100_000:
        with pytest.raises(simt.Fault, match="a row of 200000 pixels is too long to become 2"):
            execute(library, frames, torch.rand(2, 3), args, size)
        return
    exact = patchify_reference(frames.double(), *args, MEAN, STD, size)
    out, _ = execute(library, frames, torch.rand(2, 3), args, size)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)


def test_the_plan_allots_what_a_tile_reads(library):
    sizes = [1, 2, 3, 5, 13, 16, 29, 64, 97, 128, 384, 641, 1280]
    for size_in, size_out in [(a, b) for a in sizes for b in sizes if a != b]:
        matrix = resize_matrix(size_in, size_out)
        for start, weight in (Band.of(matrix), Band.of(matrix.T)):
            columns, all_rows, taps = size_in + size_out - len(start), len(start), weight.shape[1]
            for rows in (1, 2, 16, 64):
                read = taps + max(int(start[min(i + rows, all_rows) - 1] - start[i]) for i in range(0, all_rows, rows))
                assert read <= library.most_columns(columns, taps, all_rows, rows) <= columns


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_triton_in_its_interpreter(part, tmp_path):
    rows = interpreted("patchify_process", tmp_path, str(part))
    assert len(rows) == 4 * len(CASES[part::PARTS]) + 6 * len(SHUFFLES[part::PARTS]) > 0
    # written so that a NaN, left by an element that no program wrote, fails too
    assert not [row for row in rows if not row["error"] <= row["allowed"]]
