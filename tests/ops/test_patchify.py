"""patchify: every backend against the definition in float64, on outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.backends import cpp_status
from vlmteacher.ops.patchify import _patchify, patchify, patchify_backward_reference, patchify_reference

MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
# frames, height, width, patch, temporal patch, merge: odd T, one frame, other temporal patches, no merging
SIZES = [(4, 32, 64, 8, 2, 2), (5, 16, 8, 2, 2, 2), (1, 28, 14, 14, 2, 1), (7, 12, 24, 2, 4, 3), (3, 32, 32, 16, 1, 2)]


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


def gradient(function, frames, args, grad):
    leaf = frames.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(function(leaf, *args, MEAN, STD), leaf, grad)
    return result


@pytest.mark.parametrize("size", SIZES)
def test_the_definition_is_the_layout(size):
    frames = frames_of(size, torch.float64)
    torch.testing.assert_close(patchify_reference(frames, *size[3:], MEAN, STD), by_hand(frames, *size[3:]))


@pytest.mark.parametrize("temporal_patch, merge", [(1, 1), (2, 2), (4, 3)])
def test_both_derivatives(temporal_patch, merge):
    frames = torch.rand(3, 3, 2 * merge, 4 * merge, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return patchify(x, 2, temporal_patch, merge, MEAN, STD)

    assert torch.autograd.gradcheck(run, frames)
    assert torch.autograd.gradgradcheck(run, frames)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_error_against_float64(size, dtype):
    """At most 1.5 times the error of the plain expression in the same dtype, outputs and gradients."""
    args = size[3:]
    frames = frames_of(size, dtype)
    exact = patchify_reference(frames.double(), *args, MEAN, STD)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    exact_grad = gradient(patchify_reference, frames.double(), args, grad.double())
    floor = torch.finfo(dtype).eps
    for ours, plain, truth in [
        (patchify(frames, *args, MEAN, STD), patchify_reference(frames, *args, MEAN, STD), exact),
        (gradient(patchify, frames, args, grad), gradient(patchify_reference, frames, args, grad), exact_grad),
    ]:
        assert ours.dtype == dtype and ours.shape == truth.shape
        error, allowed = (ours.double() - truth).abs().max(), (plain.double() - truth).abs().max()
        assert error <= 1.5 * allowed + floor * truth.abs().max()


def test_reference_backward_is_the_gradient_of_the_definition():
    for size in SIZES:
        frames = frames_of(size, torch.float64)
        grad = torch.randn_like(patchify_reference(frames, *size[3:], MEAN, STD))
        expected = gradient(patchify_reference, frames, size[3:], grad)
        torch.testing.assert_close(patchify_backward_reference(grad, *size[:3], *size[3:], STD), expected)


def test_any_strides_and_nothing_left_unwritten():
    """Channels-last, transposed and cropped views give what their copies give; poisoned memory is fully overwritten."""
    base = frames_of((5, 32, 32), torch.float32)
    views = {
        "channels last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(2, 3),
        "cropped": torch.rand(5, 3, 40, 40)[:, :, 4:36, 4:36],
        "time second": torch.rand(3, 5, 32, 32).transpose(0, 1),
        "expanded": base[:1].expand(5, -1, -1, -1),
    }
    for name, view in views.items():
        expected = patchify_reference(view.contiguous(), 8, 2, 2, MEAN, STD)
        poison = torch.full_like(expected, float("nan"))  # the freed block is what the allocator hands out next
        del poison
        torch.testing.assert_close(patchify(view, 8, 2, 2, MEAN, STD), expected, msg=name)
    rows = patchify_reference(base, 8, 2, 2, MEAN, STD)
    poison = torch.full_like(base, float("nan"))
    del poison
    expanded = torch.ones(1).expand_as(rows)  # the gradient of a sum comes with zero strides
    expected = gradient(patchify_reference, base, (8, 2, 2), expanded)
    torch.testing.assert_close(gradient(patchify, base, (8, 2, 2), expanded), expected)


def test_fake_tensors_and_dispatcher_rules():
    for requires_grad in (False, True):
        frames = frames_of((5, 16, 16), torch.float32).requires_grad_(requires_grad)
        torch.library.opcheck(_patchify, (frames, 4, 2, 2, MEAN, STD))
    with torch._subclasses.FakeTensorMode():
        out = patchify(torch.empty(89, 3, 704, 1280, dtype=torch.bfloat16), 16, 2, 2, MEAN, STD)
    assert out.shape == (45 * 44 * 80, 1536) and out.dtype == torch.bfloat16


def test_cpp_is_used_when_built():
    available, why = cpp_status()
    if not available:
        pytest.skip(f"no C++ operators: {why}")
    with torch.profiler.profile() as profile:
        gradient(patchify, frames_of((2, 16, 16), torch.float32), (4, 2, 2), torch.ones(16, 96))
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
    with pytest.raises(InputError, match=word.replace("(", r"\(").replace(")", r"\)")):
        patchify(frames, 4, 2, 2, MEAN, STD)
