"""The operator against its definition in float64, on outputs and gradients."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests import rounding
from tests.rounding import Expected, check
from vlmteacher.errors import InputError
from vlmteacher.ops import rms_norm as operator
from vlmteacher.ops.rms_norm import rms_norm, rms_norm_backward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [(7, 16), (2, 5, 3, 10), (3, 1000), (1, 2), (0, 8), (65, 128)]  # shapes of x


class Drawn(NamedTuple):
    x: Tensor
    weight: Tensor
    grad: Tensor
    added: Tensor


def draw(case: tuple[int, ...], dtype: torch.dtype) -> Drawn:
    generator = torch.Generator().manual_seed(sum(case))
    x, weight, grad, added = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (case, case[-1:], case, case)
    )
    return Drawn(*(t.to(dtype) for t in (2 * x + 0.3, weight, grad, added)))


def stock(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `Qwen3VLTextRMSNorm` of transformers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def run(function: Any, drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    x, weight, grad, added = drawn
    x = x.to(dtype).requires_grad_()
    norm = function(x, weight.to(dtype), 1e-6)
    (dx,) = torch.autograd.grad(norm, x, grad.to(dtype))
    return {"norm": norm.detach(), "dx": dx, "dx, added": added + dx}


def expected(drawn: Drawn) -> dict[str, Expected]:
    return rounding.expected(run, stock, drawn, drawn.x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_against_float64(case: tuple[int, ...], dtype: torch.dtype) -> None:
    drawn = draw(case, dtype)
    check(run(rms_norm, drawn, dtype), expected(drawn))
    both = rms_norm_backward(drawn.grad, drawn.x, drawn.weight, 1e-6, drawn.added)
    check([both], [expected(drawn)["dx, added"]])


def test_the_definition_is_what_transformers_does() -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

    norm, x = Qwen3VLTextRMSNorm(10, 1e-3), torch.randn(3, 10)
    norm.weight.data.normal_()
    torch.testing.assert_close(stock(x, norm.weight, 1e-3), norm(x), rtol=0, atol=0)


def test_registered_operators() -> None:
    """What runs under torch.compile and dispatch modes where Triton does: the same numbers, and valid fakes."""
    x, weight, grad, added = draw((4, 3, 8), torch.float32)
    args = (x, weight, 1e-6), (grad, x, weight, 1e-6, added)
    torch.library.opcheck(torch.ops.vlmteacher.rms_norm.default, args[0], test_utils=["test_schema", "test_faketensor"])
    torch.library.opcheck(
        torch.ops.vlmteacher.rms_norm_backward.default, args[1], test_utils=["test_schema", "test_faketensor"]
    )
    assert torch.equal(operator._forward_operator(*args[0]), operator.rms_norm_reference(*args[0]))
    assert torch.equal(operator._backward_operator(*args[1]), operator.rms_norm_backward_reference(*args[1]))


def test_only_x_is_kept() -> None:
    saved: list[Tensor] = []
    x, weight, *_ = draw((4, 3, 8), torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x.requires_grad_(), weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize(
    "x, weight, words",
    [
        (torch.zeros(2, 3), torch.zeros(4), "got torch.float32 (2, 3) on cpu and torch.float32 (4,) on cpu"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.bfloat16), "and torch.bfloat16 (3,) on cpu"),
        (torch.zeros(2, 3).int(), torch.zeros(3), "got torch.int32 (2, 3)"),
        (torch.zeros(2, 3), torch.zeros(3, requires_grad=True), "has no gradient for its weight"),
    ],
)
def test_what_is_refused(x: Tensor, weight: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        rms_norm(x, weight)
