"""The decoder's convolutions against their definition in float64, and the whole decoder's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.processors import reachable, used_as
from tests.rounding import check, expected, rms
from vlmteacher.ops.bits import pack_bits, unpack_bits
from vlmteacher.ops.surrogate_decoder import (
    conv3x3,
    conv3x3_backward,
    conv3x3_backward_reference,
    conv3x3_reference,
    pack_signs,
)

CASES = {  # frames, h, w, C, N, taps, upscale, residual, slope
    "odd": (3, 5, 7, 13, 19, 1, 1, False, 0.0),
    "memory": (4, 6, 12, 8, 24, 2, 1, False, 0.0),
    "odd memory": (4, 3, 29, 5, 33, 2, 1, False, 0.2),
    "block's end": (3, 4, 9, 24, 24, 1, 1, True, 0.0),
    "leaky block's end": (3, 9, 13, 11, 11, 1, 1, True, 0.2),
    "upscale": (2, 5, 11, 9, 21, 1, 2, False, None),
    "upscale, signs": (2, 24, 24, 16, 48, 1, 2, False, 0.0),
    "last": (2, 6, 40, 64, 12, 1, 1, False, None),
    "strips": (2, 130, 10, 64, 16, 2, 1, False, 0.0),
    "one pixel": (2, 1, 1, 4, 4, 2, 1, False, 0.0),
}


def poisoned(size: int) -> None:
    """Fill memory with NaN that the next allocation of this size will likely get."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.full((size,), torch.nan, dtype=dtype)


def inputs(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random, in float64, with the values of `dtype`; the weight on a grid that the sums of an upscale stay on."""
    frames, h, w, c, n, count, upscale, residual, _ = CASES[case]
    g = torch.Generator().manual_seed(len(case))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).double()

    taps = [[f, f - 1] for f in range(frames)][::-1] if count == 2 else [[frames - 1], [0]]
    rows = torch.tensor(taps, dtype=torch.int32)
    out = (len(taps), h * upscale, w * upscale, n)
    found = {
        "x": draw(frames, h, w, c),
        "taps": rows,
        "weight": torch.randint(-16, 17, (n, 3, 3, count * c), generator=g).double() / 64,
        "bias": draw(n),
        "grad": draw(*out),
        "bits": torch.rand(out, generator=g) < 0.5,
        "more": draw(len(taps), h, w, c),
        "more bits": torch.rand((len(taps), h, w, c), generator=g) < 0.5,
    }
    return found | ({"residual": draw(len(taps) + 1, *out[1:])} if residual else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    *_, upscale, _, slope = CASES[case]
    given = inputs(case, dtype)

    def run(function, given, dtype):
        bank = given["residual"].to(dtype) if "residual" in given else None
        rows = torch.arange(len(given["taps"]), dtype=torch.int32) + 1 if "residual" in given else None
        x, weight, bias = (given[name].to(dtype) for name in ("x", "weight", "bias"))
        poisoned(given["grad"].numel())
        return function(x, given["taps"], weight, bias, bank, rows, slope, upscale)

    exact, exact_signs = run(conv3x3_reference, given, torch.float64)
    (wanted,) = expected(lambda *args: [run(conv3x3_reference, *args)[0]], given, dtype)
    for processor in reachable():
        with used_as(processor):
            ours, signs = run(conv3x3, given, dtype)
        assert ours.is_contiguous() and ours.dtype == dtype
        check([ours], [wanted])
        assert signs.shape == exact_signs.shape
        if slope is not None:  # a sign may differ only where rounding takes the value over zero
            n = ours.shape[-1]
            differ = unpack_bits(signs, n) != unpack_bits(exact_signs, n)
            assert (exact.abs()[differ] <= 8 * rms(wanted.spread)).all()
            assert torch.equal(pack_bits(unpack_bits(signs, n)), signs)  # no stray bit behind the last channel


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("through", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("case", CASES)
def test_backward(case, through, dtype):
    frames, *_, upscale, _, slope = CASES[case]
    if through and upscale == 2:
        pytest.skip("a block's first convolution does not upscale")
    given = inputs(case, dtype)

    def run(function, given, dtype):
        signs = torch.empty(0, dtype=torch.uint8) if slope is None else pack_bits(given["bits"])
        more = (given["more"].to(dtype), pack_bits(given["more bits"])) if through else (None, None)
        grad, weight = given["grad"].to(dtype), given["weight"].to(dtype)
        poisoned(given["x"].numel())
        return function(grad, signs, given["taps"], frames, weight, *more, slope, upscale)

    wanted = expected(lambda *args: [run(conv3x3_backward_reference, *args)], given, dtype)
    for processor in reachable():
        with used_as(processor):
            ours = run(conv3x3_backward, given, dtype)
        assert ours.dtype == dtype
        check([ours], wanted)


@pytest.mark.parametrize("case", CASES)
def test_the_backward_is_the_gradient(case):
    frames, *_, upscale, _, slope = CASES[case]
    given = inputs(case, torch.float64)
    x = given["x"].requires_grad_()
    y, signs = conv3x3_reference(x, given["taps"], given["weight"], given["bias"], None, None, slope, upscale)
    (expected,) = torch.autograd.grad(y, x, given["grad"])
    ours = conv3x3_backward_reference(
        given["grad"], signs, given["taps"], frames, given["weight"], None, None, slope, upscale
    )
    torch.testing.assert_close(ours, expected)


def test_bits():
    for n in (1, 7, 8, 12, 19):
        x = torch.randn(3, 5, n)
        signs = pack_signs(x)
        assert signs.shape == (3, 5, -(-n // 8)) and torch.equal(unpack_bits(signs, n), x > 0)
        turned = signs.transpose(0, 2).contiguous().transpose(0, 2)  # its last dimension is not the dense one
        assert torch.equal(unpack_bits(turned, n), x > 0)
    assert pack_signs(torch.tensor([1.0, -1, 0, 2, *[-1] * 4, 3])).tolist() == [0b1001, 1]
