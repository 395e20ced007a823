"""The operator against its definition in float64, on outputs and gradients."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import rounding
from tests.rounding import Expected, check
from vlmteacher.errors import InputError
from vlmteacher.ops import swiglu as operator
from vlmteacher.ops.swiglu import swiglu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [(1,), (7, 33), (3, 5, 1000), (0, 4)]


class Drawn(NamedTuple):
    gate: Tensor
    up: Tensor
    grad: Tensor


def draw(case: tuple[int, ...], dtype: torch.dtype) -> Drawn:
    generator = torch.Generator().manual_seed(sum(case))
    return Drawn(*(3 * torch.randn(3, *case, generator=generator, dtype=torch.float64)).to(dtype))


def stock(gate: Tensor, up: Tensor) -> Tensor:
    """As in transformers' MLPs."""
    return F.silu(gate) * up


def run(function: Any, drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    gate, up = (t.to(dtype).requires_grad_() for t in drawn[:2])
    out = function(gate, up)
    d_gate, d_up = torch.autograd.grad(out, (gate, up), drawn.grad.to(dtype))
    return {"out": out.detach(), "d_gate": d_gate, "d_up": d_up}


def expected(drawn: Drawn) -> dict[str, Expected]:
    return rounding.expected(run, stock, drawn, drawn.gate.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_against_float64(case: tuple[int, ...], dtype: torch.dtype) -> None:
    drawn = draw(case, dtype)
    check(run(swiglu, drawn, dtype), expected(drawn))


def test_registered_operators() -> None:
    """What runs under torch.compile and dispatch modes where Triton does: the same numbers, and valid fakes."""
    gate, up, grad = draw((4, 9), torch.float32)
    for op, args in (
        (torch.ops.vlmteacher.swiglu, (gate, up)),
        (torch.ops.vlmteacher.swiglu_backward, (grad, gate, up)),
    ):
        torch.library.opcheck(op.default, args, test_utils=["test_schema", "test_faketensor"])
    assert torch.equal(operator._forward_operator(gate, up), operator.swiglu_reference(gate, up))
    found = operator._backward_operator(grad, gate, up)
    assert all(map(torch.equal, found, operator.swiglu_backward_reference(grad, gate, up)))


def test_only_the_two_are_kept() -> None:
    saved: list[Tensor] = []
    gate, up, _ = draw((4, 9), torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate.requires_grad_(), up)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize(
    "gate, up, words",
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "got torch.float32 (2, 3) on cpu, torch.float32 (3, 2) on cpu"),
        (torch.zeros(2), torch.zeros(2).double(), "got torch.float32 (2,) on cpu, torch.float64 (2,) on cpu"),
        (torch.zeros(2).int(), torch.zeros(2).int(), "got torch.int32 (2,)"),
    ],
)
def test_what_is_refused(gate: Tensor, up: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        swiglu(gate, up)
