"""The operators against their definitions in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.rounding import check, expected
from vlmteacher.ops import elementwise
from vlmteacher.ops.elementwise import gelu, rotate, rotate_reference
from vlmteacher.ops.processors import is_own


@pytest.fixture(params=["fast", "torch"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(elementwise, "_is_fast", lambda x: False)
    elif not is_own("elementwise", torch.bfloat16):
        pytest.skip("no AVX-512 here")


def run(function, x: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    x = x.to(dtype).requires_grad_()
    y = function(x)
    return [y.detach(), torch.autograd.grad(y, x, grad.to(dtype))[0]]


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * torch.cat([cos, cos], -1) + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)


def rotation(cos: Tensor, sin: Tensor, x: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return run(lambda t: plain_rotation(t, cos.to(dtype), sin.to(dtype)), x, grad, dtype)


def drawn_rotation(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and its result's gradient, numbers of `dtype` in float64, and the angles' cos and sin."""
    g = torch.Generator().manual_seed(len(shape))
    x, grad = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).double() for _ in range(2))
    angle = torch.randn(shape[-3], 1, shape[-1] // 2, generator=g).mul(9)
    return x, grad, angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 8), (2, 7, 4, 72), (1, 3, 1, 66)], ids=str)
def test_rotate(shape, dtype):
    x, grad, cos, sin = drawn_rotation(shape, dtype)
    ours = run(lambda t: rotate(t, cos, sin), x, grad, dtype)
    check(ours, expected(rotation, cos, sin, x, grad, dtype))


def test_bfloat16_is_rounded_to_the_nearest():
    """Ties to even, as torch rounds, whichever instructions do it."""
    values = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.3e38])
    factors = torch.tensor([1 + 1 / 256, 1 + 3 / 256, 1.1, 3.0])[:, None].expand(4, 33)  # the first two make ties
    x = torch.cat([values, torch.zeros(4, 33)], 1).bfloat16()[None, :, None]
    rotated = rotate(x, factors[:, None].contiguous(), torch.zeros(4, 1, 33))[0, :, 0, :33]
    torch.testing.assert_close(rotated, (values.float() * factors).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 33), (3, 5, 1000)], ids=str)
def test_gelu(shape, dtype):
    g = torch.Generator().manual_seed(len(shape))
    x, grad = (torch.randn(shape, generator=g, dtype=torch.float64).mul(3).to(dtype).double() for _ in range(2))
    wanted = expected(run, lambda t: F.gelu(t, approximate="tanh"), x, grad, dtype)
    check(run(gelu, x, grad, dtype), wanted)


def test_gelu_at_the_ends():
    x = torch.tensor([-1e30, -300.0, -10.0, 0.0, 10.0, 300.0, 1e30, torch.inf, torch.nan]).requires_grad_()
    y = gelu(x)
    torch.testing.assert_close(y[:-1].detach(), x[:-1].detach().relu(), atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(y[1:6].sum(), x)
    torch.testing.assert_close(slope[1:6], torch.tensor([0.0, 0, 0.5, 1, 1]), atol=1e-6, rtol=0)
    assert y[-1].isnan()


def test_strided_rows_and_expanded_gradients():
    x = torch.randn(2, 7, 3, 4, 8).unbind(2)[1].requires_grad_()
    angle = torch.randn(7, 1, 4)
    y = rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(y, rotate_reference(x, angle.cos(), angle.sin()))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, rotate_reference(torch.ones_like(x), angle.cos(), -angle.sin()))
    torch.testing.assert_close(gelu(x.mT), F.gelu(x.mT, approximate="tanh"))
