"""The GPU backends of surrogate_decoder's convolutions against their definition in float64: the Triton kernels in their
interpreter, the CUDA source executed on the CPU."""

from __future__ import annotations

import copy
import ctypes
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.kernels import simt
from tests.kernels.interpreter import interpreted, with_triton
from tests.rounding import DEVIATIONS, excess, expected, rms
from vlmteacher.decoders import SurrogateDecoder
from vlmteacher.ops import surrogate_decoder
from vlmteacher.ops.bits import unpack_bits
from vlmteacher.ops.surrogate_decoder import conv3x3_backward_reference, conv3x3_reference, pack_signs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FRAMES = 5  # in the bank; no case uses them all


class Case(NamedTuple):
    height: int
    width: int
    channels: int
    n: int
    taps: list[tuple[int, ...]]
    slope: float | None = 0.0
    bias: bool = True
    residual: bool = False
    upscale: int = 1


ONE = [(3,), (0,), (1,)]
TWO = [(0, -1), (1, 0), (3, 4), (-1, 1)]  # with frames of zeros
CASES = [
    Case(5, 7, 5, 12, TWO, slope=0.2),  # nothing is aligned
    Case(5, 17, 12, 5, ONE[:2], slope=0.2, bias=False),
    Case(3, 5, 48, 64, [(2, -1)]),
    Case(3, 9, 64, 64, [(2,)], residual=True),
    Case(9, 3, 12, 12, [(2, 3), (0, 2)], slope=0.2, residual=True),
    Case(3, 5, 64, 12, ONE[:1], slope=None, upscale=2),
    Case(5, 3, 12, 48, [(0, -1), (2, 0)], residual=True, upscale=2),
    Case(5, 9, 8, 16, [(4,)], slope=None, bias=False),
    Case(4, 4, 5, 16, [(1,), (2,)], slope=None, residual=True),
    Case(2, 2, 80, 16, [(1, 4)]),
    Case(3, 3, 12, 12, [], upscale=2),
]
INTERPRETED = {torch.bfloat16: CASES, torch.float16: CASES[::4], torch.float32: CASES}  # Triton's interpreter is slow
LARGER = [  # several tiles of pixels and of channels
    Case(17, 35, 8, 136, ONE[:1]),
    Case(2, 2, 80, 72, [(1, 4), (3, -1)]),
    Case(9, 18, 136, 16, TWO[:2], slope=0.2, upscale=2),
]


def identity(case: Case) -> str:
    return f"{case.height}x{case.width} {case.channels}-{case.n} T={len((case.taps or ONE)[0])} x{case.upscale}"


def draw(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The forward arguments; grad, and the signs by the definition in float64; the gradient through a residual, and its
    signs."""
    generator = torch.Generator().manual_seed(case.channels + case.n)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    taps = torch.tensor(case.taps, dtype=torch.int32) if case.taps else torch.empty(0, 1, dtype=torch.int32)
    depth = taps.shape[1] * case.channels
    drawn: dict[str, Any] = {"x": randn(FRAMES, case.height, case.width, case.channels), "taps": taps}
    drawn["weight"] = randn(case.n, 3, 3, depth) / (9 * depth) ** 0.5
    drawn["bias"] = randn(case.n) if case.bias else None
    size = (case.height * case.upscale, case.width * case.upscale, case.n)
    drawn["residual"] = randn(3, *size) if case.residual else None
    drawn["rows"] = torch.arange(len(taps), dtype=torch.int32).sub(2).abs() if case.residual else None
    before = forward(case, drawn, torch.float64, slope=None)[0]
    drawn["grad"], drawn["signs"] = randn(*before.shape), pack_signs(before)
    through = randn(len(taps), *drawn["x"].shape[1:])
    returns = case.residual and case.upscale == 1
    drawn["through"] = through if returns else None
    drawn["through_signs"] = pack_signs(randn(*through.shape)) if returns else None
    return drawn


def forward(case: Case, drawn: dict[str, Any], dtype: torch.dtype, slope: float | None) -> tuple[Tensor, Tensor]:
    if not case.taps:
        size = (0, case.height * case.upscale, case.width * case.upscale)
        return torch.empty(*size, case.n, dtype=dtype), torch.empty(*size, (case.n + 7) // 8, dtype=torch.uint8)
    names = ("x", "weight", "bias", "residual")
    x, weight, bias, residual = (None if drawn[name] is None else drawn[name].to(dtype) for name in names)
    return conv3x3_reference(x, drawn["taps"], weight, bias, residual, drawn["rows"], slope, case.upscale)


def backward(case: Case, drawn: dict[str, Any], dtype: torch.dtype) -> Tensor:
    if not case.taps:
        return torch.zeros_like(drawn["x"], dtype=dtype)
    through = None if drawn["through"] is None else drawn["through"].to(dtype)
    rest = (FRAMES, drawn["weight"].to(dtype), through, drawn["through_signs"], case.slope, case.upscale)
    return conv3x3_backward_reference(drawn["grad"].to(dtype), drawn["signs"], drawn["taps"], *rest)


def errors(
    case: Case, drawn: dict[str, Any], y: Tensor, signs: Tensor, dx: Tensor, units: float = 1
) -> dict[str, float]:
    """The errors of y and dx as shares of the allowed ones; how many signs are wrong beyond rounding; and how much of
    dx is not zero in frames that no output reads."""
    dtype = drawn["x"].dtype

    def definition(drawn: dict[str, Any]) -> list[Tensor]:
        return [forward(case, drawn, dtype, case.slope)[0], backward(case, drawn, dtype)]

    wanted = expected(definition, drawn)
    assert y.dtype == dx.dtype == dtype
    found = {what: excess(t, each, units) for what, t, each in zip(("y", "dx"), (y, dx), wanted, strict=True)}
    used = {frame for taps in case.taps for frame in taps}
    unused = dx[[frame not in used for frame in range(FRAMES)]]
    assert unused.numel()
    found["dx of unused frames"] = float((unused != 0).sum())
    if case.slope is None:
        assert signs.shape == (0,) and signs.dtype == torch.uint8
    elif case.taps:
        before = forward(case, drawn, torch.float64, None)[0]
        ours = unpack_bits(signs, case.n)
        sure = before.abs() > DEVIATIONS * units * rms(wanted[0].spread)
        found["signs"] = float((sure & (ours != (before > 0))).sum())
        found["bits beyond N"] = float((pack_signs(ours) != signs).sum())
    else:
        assert signs.shape[0] == 0
    return found


def fits(found: dict[str, float]) -> bool:
    return all(value <= (what in ("y", "dx")) for what, value in found.items())  # a NaN does not


def execute(library: ctypes.CDLL, case: Case, drawn: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """y, signs and dx of the CUDA source."""
    with simt.Memory(library) as memory:
        held = {name: None if t is None else memory.put(t) for name, t in drawn.items()}
        x, grad = held["x"], held["grad"]
        y, dx = memory.empty(*grad.shape, dtype=x.dtype), memory.empty(*x.shape, dtype=x.dtype)
        signs = memory.empty(*held["signs"].shape, dtype=torch.uint8)
        kind = (x.dtype.itemsize, x.dtype == torch.bfloat16)
        how = ([FRAMES, *held["taps"].shape, *x.shape[1:], case.n, case.upscale], ctypes.c_float(case.slope or 0.0))
        active = case.slope is not None
        simt.call(
            library.run_forward, *kind, x, held["taps"], held["weight"], held["bias"], held["residual"], held["rows"],
            *how, y, signs if active else None,
        )  # fmt: skip
        simt.call(
            library.run_backward, *kind, grad, held["signs"] if active else None, held["taps"], held["weight"],
            held["through"], held["through_signs"] if active else None, *how, dx,
        )  # fmt: skip
        return y.clone(), signs.clone() if active else torch.empty(0, dtype=torch.uint8), dx.clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGER], ids=identity)
def test_cuda(library, case, dtype):
    library.simt_seed(case.n)
    drawn = draw(case, dtype)
    found = errors(case, drawn, *execute(library, case, drawn))
    assert fits(found), found


def test_cuda_in_the_decoder(library):
    """A whole small decoder in float32, in chunks: every kind of layer and its neighbours."""

    class Namespace:
        @staticmethod
        def conv3x3(x, taps, weight, bias, residual, rows, slope, upscale):
            with simt.Memory(library) as memory:
                held = [None if t is None else memory.put(t) for t in (x, taps, weight, bias, residual, rows)]
                size = (len(taps), x.shape[1] * upscale, x.shape[2] * upscale)
                y = memory.empty(*size, len(weight), dtype=x.dtype)
                signs = None if slope is None else memory.empty(*size, (len(weight) + 7) // 8, dtype=torch.uint8)
                shape = [len(x), *taps.shape, *x.shape[1:], len(weight), upscale]
                simt.call(library.run_forward, 4, False, *held, shape, ctypes.c_float(slope or 0.0), y, signs)
                return y.clone(), torch.empty(0, dtype=torch.uint8) if signs is None else signs.clone()

        @staticmethod
        def conv3x3_backward(grad, signs, taps, frames, weight, residual, residual_signs, slope, upscale):
            with simt.Memory(library) as memory:
                tensors = (grad, None if slope is None else signs, taps, weight, residual, residual_signs)
                held = [None if t is None else memory.put(t) for t in tensors]
                shape = [frames, *taps.shape, grad.shape[1] // upscale, grad.shape[2] // upscale]
                shape += [weight.shape[-1] // taps.shape[1], len(weight), upscale]
                dx = memory.empty(frames, *shape[3:6], dtype=grad.dtype)
                simt.call(library.run_backward, 4, False, *held, shape, ctypes.c_float(slope or 0.0), dx)
                return dx.clone()

    torch.manual_seed(0)
    exact = SurrogateDecoder(3, widths=(8, 8, 8, 8), patch=2, slope=0.1).requires_grad_(False)
    exact.decoder[22].bias.fill_(0.5)  # the middle of the range: gradients pass the clamp
    decoder = copy.deepcopy(exact)
    exact.double()
    wanted, z = [0, 1, 6, 4], torch.randn(1, 3, 3, 1, 1)
    grad = torch.randn(4, 3, 16, 16)
    x = z.double().requires_grad_()
    frames = exact.decode_batch(x)[0][wanted]
    (back,) = torch.autograd.grad(frames, x, grad.double())
    with mock.patch.object(surrogate_decoder, "_fast", lambda *work: Namespace):
        ours = decoder.decode(z.requires_grad_(), wanted, chunk=2)
        (mine,) = torch.autograd.grad(ours, z, grad)
    assert (ours - frames).abs().max() <= 1e-5
    assert rms(mine - back) <= 1e-4 * rms(back)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_of_the_warps_gives_the_same_bits(library, dtype):
    case = CASES[6]
    drawn = draw(case, dtype)
    found = []
    for seed in range(2):
        library.simt_seed(seed)
        found.append(execute(library, case, drawn))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@with_triton
@pytest.mark.parametrize(
    "dtype",
    [pytest.param("bfloat16", marks=pytest.mark.slow), "float16", pytest.param("float32", marks=pytest.mark.slow)],
)
def test_triton_in_its_interpreter(dtype, tmp_path):
    rows = interpreted("surrogate_decoder_process", tmp_path, dtype)
    assert len(rows) == len(INTERPRETED[getattr(torch, dtype)])
    assert not [row for row in rows if not fits(row["found"])]
