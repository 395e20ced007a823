"""patchify: every backend against the definition in float64, on outputs and gradients."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.rounding import check, expected, resized_exactly
from vlmteacher.errors import InputError
from vlmteacher.ops import patchify as operator
from vlmteacher.ops.backends import cpp_status
from vlmteacher.ops.patchify import (
    PatchLayout,
    PatchRows,
    Rows,
    _patchify,
    patchify,
    patchify_backward_reference,
    patchify_reference,
    shuffle_to_rows,
    shuffle_to_rows_backward,
)
from vlmteacher.ops.resize import Band, _bands, resize_matrix

MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
# frames, height, width, patch, temporal patch, merge: odd T, one frame, other temporal patches, no merging
SIZES = [(4, 32, 64, 8, 2, 2), (5, 16, 8, 2, 2, 2), (1, 28, 14, 14, 2, 1), (7, 12, 24, 2, 4, 3), (3, 32, 32, 16, 1, 2)]

# the same, then the size that the frames are resized to
RESIZES = [
    (3, 33, 47, 4, 2, 2, (16, 24)),  # smaller, odd
    (5, 16, 8, 2, 2, 2, (36, 20)),  # larger
    (4, 50, 16, 4, 2, 2, (24, 16)),  # one axis alone
    (4, 16, 50, 4, 2, 2, (16, 72)),
    (2, 9, 200, 8, 2, 2, (64, 16)),  # larger and much smaller
    (1, 300, 7, 2, 2, 1, (6, 34)),
    (1, 1, 1, 2, 2, 2, (4, 8)),  # one pixel
    (16, 13, 21, 1, 1, 1, (1, 2)),  # to almost none
    (5, 20, 20, 2, 4, 3, (42, 12)),  # more than a part of rows
    (3, 40, 72, 28, 1, 1, (28, 28)),  # the patch is the frame: InternVL's layout
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TO = [*zip(DTYPES, DTYPES, strict=True), *itertools.permutations(DTYPES[1:], 2)]


@pytest.fixture(params=["reference", "cpp"])
def each_backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(operator, "backend", lambda x, name: None)
    elif not cpp_status()[0]:
        pytest.skip(cpp_status()[1])


def by_hand(frames: Tensor, patch: int, temporal_patch: int, merge: int) -> Tensor:
    """The layout written out element by element, independently of the reshapes of the definition."""
    t, _, h, w = frames.shape
    rows = []
    for t0 in range(0, t, temporal_patch):
        for block_y in range(0, h, patch * merge):
            for block_x in range(0, w, patch * merge):
                for y in range(block_y, block_y + patch * merge, patch):
                    for x in range(block_x, block_x + patch * merge, patch):
                        row = [
                            (frames[min(t0 + k, t - 1), c, y : y + patch, x : x + patch] - MEAN[c]) / STD[c]
                            for c in range(3)
                            for k in range(temporal_patch)
                        ]
                        rows.append(torch.stack(row).flatten())
    return torch.stack(rows)


def frames_of(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.rand(size[0], 3, *size[1:3], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def gradient(function, frames, args, grad, *resize):
    leaf = frames.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(function(leaf, *args, MEAN, STD, *resize), leaf, grad)
    return result


def resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The definition with dense matrices in place of torch.nn.functional.interpolate."""
    y, x = (resize_matrix(a, b) for a, b in zip(frames.shape[2:], size, strict=True))
    return y @ frames.double() @ x.T


def by_matrices(
    frames: Tensor, grad: Tensor, args: tuple[int, ...], size: tuple[int, int] | None, out: torch.dtype
) -> list[Tensor]:
    """The rows and the gradient of the frames by the definition, its resize by exact matrices."""
    frames = frames.detach().requires_grad_()
    with mock.patch.object(F, "interpolate", resized_exactly):
        rows = patchify_reference(frames, *args, MEAN, STD, size, out)
    return [rows.detach(), *torch.autograd.grad(rows, frames, grad)]


@pytest.mark.parametrize("size", SIZES)
def test_the_definition_is_the_layout(size):
    frames = frames_of(size, torch.float64)
    torch.testing.assert_close(patchify_reference(frames, *size[3:], MEAN, STD), by_hand(frames, *size[3:]))


@pytest.mark.parametrize(
    "size_in, size_out",
    [
        (7, 7),
        (1, 5),
        (5, 1),
        (2, 1),
        (64, 128),
        (384, 256),
        (704, 352),
        (13, 29),
        (29, 13),
        (100, 3),
        (3, 100),
        (33, 32),
    ],
)
def test_the_matrix_is_torchs_map(size_in, size_out):
    eye = torch.eye(size_in, dtype=torch.float64)[None, None]
    found = F.interpolate(eye, size=(size_out, max(2, size_in)), mode="bicubic", antialias=True)[0, 0]
    if size_in > 1:  # at width 1 torch 2.13 gives something else than at any other width
        torch.testing.assert_close(resize_matrix(size_in, size_out), found, atol=1e-14, rtol=0)
    for matrix in (resize_matrix(size_in, size_out), resize_matrix(size_in, size_out).T):
        start, weight = Band.of(matrix)
        assert (start >= 0).all() and (start + weight.shape[1] <= matrix.shape[1]).all()
        assert (start.diff() >= 0).all()
        dense = torch.zeros_like(matrix).scatter_(1, start[:, None] + torch.arange(weight.shape[1]), weight)
        assert torch.equal(dense, matrix)


@pytest.mark.parametrize("size", RESIZES)
def test_a_resize_by_its_matrices(size, each_backend):
    frames = frames_of(size, torch.float64)
    expected = by_hand(resized(frames, size[-1]), *size[3:6])
    ours = patchify(frames, *size[3:6], MEAN, STD, size[-1])
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    grad = torch.randn_like(expected)
    leaf = frames.clone().requires_grad_()
    (exact,) = torch.autograd.grad(by_hand(resized(leaf, size[-1]), *size[3:6]), leaf, grad)
    found = gradient(patchify, frames, size[3:6], grad, size[-1])
    torch.testing.assert_close(found, exact, atol=1e-11, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("temporal_patch, merge", [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("resize", [None, (0.5, 2), (1, 1.5)], ids=str)
def test_both_derivatives(temporal_patch, merge, resize):
    height, width = 2 * merge, 4 * merge
    size = resize and (height, width)
    scale = resize or (1, 1)
    frames = torch.rand(3, 3, int(height * scale[0]), int(width * scale[1]), dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return patchify(x, 2, temporal_patch, merge, MEAN, STD, size)

    assert torch.autograd.gradcheck(run, frames)
    assert torch.autograd.gradgradcheck(run, frames)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "out"), TO, ids=str)
@pytest.mark.parametrize("size", [*SIZES, *RESIZES])
def test_error_against_float64(size, dtype, out):
    args, resize = size[3:6], size[6] if len(size) > 6 else None
    if resize and not cpp_status()[0]:
        pytest.skip(f"torch's own resize has weights of positions that it rounds: {cpp_status()[1]}")
    frames = frames_of(size, dtype)
    ours = patchify(frames, *args, MEAN, STD, resize, out)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    found = [ours, gradient(patchify, frames, args, grad, resize, out)]
    assert [t.dtype for t in found] == [out, dtype]
    check(found, expected(by_matrices, frames, grad, args, resize, out))


def test_the_frames_own_size_is_no_resize():
    frames = frames_of((3, 16, 24), torch.float32)
    assert torch.equal(patchify(frames, 4, 2, 2, MEAN, STD, (16, 24)), patchify(frames, 4, 2, 2, MEAN, STD))
    with mock.patch("vlmteacher.ops.resize._bands", side_effect=AssertionError):
        patchify(frames, 4, 2, 2, MEAN, STD, (16, 24))


def test_nothing_is_clamped_and_the_tables_are_made_once():
    available, why = cpp_status()
    if not available:
        pytest.skip(f"no C++ operators, and the plain ones have no tables: {why}")
    frames = torch.zeros(2, 3, 20, 24)
    frames[..., 10:] = 1.0
    _bands.cache_clear()
    for _ in range(3):
        rows = patchify(frames.requires_grad_(), 4, 2, 2, [0.0] * 3, [1.0] * 3, (32, 40))
        rows.sum().backward()
    assert rows.min() < -0.01 and rows.max() > 1.01
    assert _bands.cache_info().misses == 4  # two axes, two directions


def test_reference_backward_is_the_gradient_of_the_definition():
    for size in (*SIZES, *RESIZES):
        frames, resize = frames_of(size, torch.float64), size[6:]
        grad = torch.randn_like(patchify_reference(frames, *size[3:6], MEAN, STD, *resize))
        expected = gradient(patchify_reference, frames, size[3:6], grad, *resize)
        torch.testing.assert_close(patchify_backward_reference(grad, *size[:6], STD, *resize), expected)


@pytest.mark.parametrize("resize", [None, (48, 16)])
def test_any_strides_and_nothing_left_unwritten(resize):
    """Channels-last, transposed and cropped views give the results of their copies; poisoned memory is overwritten."""
    base = frames_of((5, 32, 32), torch.float32)
    views = {
        "channels last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(2, 3),
        "cropped": torch.rand(5, 3, 40, 40)[:, :, 4:36, 4:36],
        "time second": torch.rand(3, 5, 32, 32).transpose(0, 1),
        "expanded": base[:1].expand(5, -1, -1, -1),
    }
    for name, view in views.items():
        expected = patchify_reference(view.contiguous(), 8, 2, 2, MEAN, STD, resize)
        poison = torch.full_like(expected, float("nan"))  # the freed block is what the allocator hands out next
        del poison
        torch.testing.assert_close(patchify(view, 8, 2, 2, MEAN, STD, resize), expected, msg=name)
    rows = patchify_reference(base, 8, 2, 2, MEAN, STD, resize)
    poison = torch.full_like(base, float("nan"))
    del poison
    expanded = torch.ones(1).expand_as(rows)  # the gradient of a sum comes with zero strides
    expected = gradient(patchify_reference, base, (8, 2, 2), expanded, resize)
    torch.testing.assert_close(gradient(patchify, base, (8, 2, 2), expanded, resize), expected)


def test_fake_tensors_and_dispatcher_rules():
    for requires_grad in (False, True):
        frames = frames_of((5, 16, 16), torch.float32).requires_grad_(requires_grad)
        for size, dtype in (([16, 16], torch.float32), ([24, 8], torch.bfloat16)):
            torch.library.opcheck(_patchify, (frames, 4, 2, 2, MEAN, STD, size, dtype))
    with torch._subclasses.FakeTensorMode():
        out = patchify(torch.empty(89, 3, 704, 1280, dtype=torch.bfloat16), 16, 2, 2, MEAN, STD)
        small = patchify(torch.empty(24, 3, 704, 1280), 16, 2, 2, MEAN, STD, (352, 640), torch.bfloat16)
    assert out.shape == (45 * 44 * 80, 1536) and out.dtype == torch.bfloat16
    assert small.shape == (12 * 22 * 40, 1536) and small.dtype == torch.bfloat16


def test_cpp_is_used_when_built():
    available, why = cpp_status()
    if not available:
        pytest.skip(f"no C++ operators: {why}")
    with torch.profiler.profile() as profile:
        gradient(patchify, frames_of((2, 20, 12), torch.float32), (4, 2, 2), torch.ones(16, 96), (16, 16))
    calls = {event.key for event in profile.key_averages()}
    assert {"vlmteacher_cpp::patchify", "vlmteacher_cpp::patchify_backward"} <= calls


@pytest.mark.parametrize(
    "frames, word",
    [
        (torch.zeros(3, 16, 16), "(T, 3, H, W)"),
        (torch.zeros(2, 4, 16, 16), "(T, 3, H, W)"),
        (torch.zeros(0, 3, 16, 16), "(T, 3, H, W)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 3, 16, 20), "16x20"),
        (torch.zeros(2, 3, 12, 16), "12x16"),
    ],
)
def test_bad_frames(frames, word):
    with pytest.raises(InputError, match=re.escape(word)):
        patchify(frames, 4, 2, 2, MEAN, STD)


@pytest.mark.parametrize(
    "size, dtype, word",
    [
        ((16, 20), None, "16x20"),
        ((0, 16), None, "(0, 16)"),
        ((-8, 16), None, "(-8, 16)"),
        ((16,), None, "(16,)"),
        (None, torch.int32, "torch.int32"),
        (None, torch.float64, "torch.float64"),
    ],
)
def test_bad_requests(size, dtype, word):
    with pytest.raises(InputError, match=re.escape(word)):
        patchify(torch.zeros(2, 3, 16, 16), 4, 2, 2, MEAN, STD, size, dtype)
    with pytest.raises(InputError, match=re.escape("(2, 3, 0, 16)")):
        patchify(torch.zeros(2, 3, 0, 16), 4, 2, 2, MEAN, STD, (8, 8))


LAYOUTS = [(4, 2, 2), (8, 1, 1), (2, 4, 3), (14, 2, 1)]


def decoded(dtype: torch.dtype, upscale: int, height: int, width: int) -> Tensor:
    """Five frames before their pixel shuffle: below, on, within and above [0, 1]."""
    generator = torch.Generator().manual_seed(upscale)
    y = torch.randn(5, height // upscale, width // upscale, 3 * upscale**2, generator=generator).add(0.5).to(dtype)
    y.view(-1)[::7], y.view(-1)[1::7] = 0.0, 1.0
    return y


@pytest.mark.parametrize(("dtype", "out"), TO, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("upscale", [1, 2, 4])
def test_from_a_decoder_s_last_layer_as_in_two_steps(layout, upscale, dtype, out, each_backend):
    """Pixel shuffle and clamp, then patchify: the same bits, also of the gradient; frames in another order, in parts,
    one of them twice."""
    block = layout[0] * layout[2]
    height, width = 2 * block // upscale * upscale, 4 * block
    if height % block:
        pytest.skip("the pixel shuffle gives no such height")
    order, t = [2, 0, 4, 1, 3, 0], layout[1]
    y = decoded(dtype, upscale, height, width).requires_grad_()
    frames = F.pixel_shuffle(y.permute(0, 3, 1, 2), upscale).clamp(0, 1)[order]
    expected = patchify(frames, *layout, MEAN, STD, dtype=out)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (expected_grad,) = torch.autograd.grad(expected, y, grad)

    slots = [[i for i, f in enumerate(order + order[-1:] * (-len(order) % t)) if f == frame] for frame in range(5)]
    most = max(map(len, slots))
    table = torch.tensor([s + [-1] * (most - len(s)) for s in slots], dtype=torch.int32)
    rows, found = torch.full_like(expected, torch.nan), []
    how = Rows(layout[0], layout[0], *layout[1:], MEAN, STD)
    with torch.no_grad():
        for part in (slice(0, 3), slice(3, 5)):
            inside = shuffle_to_rows(y[part], table[part], rows, upscale, how)
            found.append(
                shuffle_to_rows_backward(grad, table[part], inside, y.shape[1:3], upscale, how, dtype).double()
            )
    assert torch.equal(rows, expected)
    apart = torch.tensor([f for f in range(5) if order.count(f) == 1 and (f != order[-1] or len(order) % t == 0)])
    assert torch.equal(torch.cat(found)[apart], expected_grad.double()[apart])
    # the gradients of a frame that stands twice are added up before they are rounded
    assert (torch.cat(found) - expected_grad).abs().max() <= 4 * torch.finfo(dtype).eps * expected_grad.abs().max()


def test_a_decoder_in_float64_gives_float32_rows():
    y = decoded(torch.float64, 2, 8, 16)
    slots, how, found = torch.arange(5, dtype=torch.int32)[:, None], Rows(4, 4, 1, 2, MEAN, STD), []
    for out in (torch.float64, torch.float32):
        rows = torch.empty(5 * 8, 48, dtype=out)
        inside = shuffle_to_rows(y, slots, rows, 2, how)
        found.append((rows, shuffle_to_rows_backward(rows, slots, inside, (4, 8), 2, how, torch.float64)))
    for wide, narrow in zip(*found, strict=True):
        torch.testing.assert_close(narrow.double(), wide, atol=1e-6, rtol=1e-6)


def test_the_operators_are_registered_as_torch_asks():
    y, slots, how = decoded(torch.float32, 2, 8, 16), torch.arange(5, dtype=torch.int32)[:, None], (4, 4, 1, 2)
    rows = torch.zeros(5 * 8, 48)
    torch.library.opcheck(torch.ops.vlmteacher.shuffle_to_rows.default, (y, slots, rows, 2, *how, MEAN, STD))
    inside = shuffle_to_rows(y, slots, rows, 2, Rows(*how, MEAN, STD))
    args = (rows, slots, inside, 4, 8, 2, *how, MEAN, STD, torch.float32)
    torch.library.opcheck(torch.ops.vlmteacher.shuffle_to_rows_backward.default, args)


def test_what_a_decoder_breaks_stays_broken(each_backend):
    y = torch.tensor([torch.nan, -torch.inf, torch.inf]).expand(1, 2, 2, 3).contiguous()
    rows = torch.empty(1, 12)
    inside = shuffle_to_rows(y, torch.tensor([[0]], dtype=torch.int32), rows, 1, Rows(2, 2, 1, 1, [0.0] * 3, [1.0] * 3))
    torch.testing.assert_close(rows.view(3, 4)[:, 0], torch.tensor([torch.nan, 0.0, 1.0]), equal_nan=True)
    assert not inside.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_of_patch_rows(layout):
    how = PatchLayout(*layout, tuple(MEAN), tuple(STD), torch.float32)
    frames = frames_of((5, 2 * layout[0] * layout[2], 4 * layout[0] * layout[2]), torch.float32)
    rows = PatchRows(how.of(frames), how, *frames.shape[::2], frames.shape[3])
    assert rows.shape == frames.shape and len(rows) == 5
    for stride in (1, 3):
        torch.testing.assert_close(rows.pixels(stride), frames[..., ::stride, ::stride])
    torch.testing.assert_close(torch.stack(rows.aminmax()), torch.stack(frames.aminmax()))
    half = PatchRows(rows.rows.bfloat16(), replace(how, dtype=torch.bfloat16), *frames.shape[::2], frames.shape[3])
    low, high = half.aminmax()  # no rounding may put them outside of what the frames had
    assert frames.min() <= low < frames.min() + 0.02 and frames.max() - 0.02 < high <= frames.max()


def test_patch_rows_of_another_shape_are_refused():
    layout = PatchLayout(4, 2, 2, tuple(MEAN), tuple(STD), torch.float32)
    with pytest.raises(InputError, match=r"patch rows of torch.float32 \(8, 96\) for 3 frames of 16x16: they must be"):
        PatchRows(torch.zeros(8, 96), layout, 3, 16, 16)
    with pytest.raises(InputError, match=r"torch.float16 .* they must be torch.float32"):
        PatchRows(torch.zeros(16, 96).half(), layout, 2, 16, 16)
    with pytest.raises(InputError, match="2 frames of 16x20 do not split into blocks of 8x8"):
        PatchRows(torch.zeros(20, 96), layout, 2, 16, 20)
