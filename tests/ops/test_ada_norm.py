"""The operator against its definition in float64, on outputs and gradients."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests import rounding
from tests.rounding import Expected, check
from vlmteacher.errors import InputError
from vlmteacher.ops import ada_norm as operator
from vlmteacher.ops.ada_norm import ada_norm, ada_norm_reference, gated_residual, residual_ada_norm
from vlmteacher.ops.backends import cpp_status

FORMS = ("norm", "residual", "both", "ungated")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CASES = [  # items, tokens, width, first, batches and rows of a table
    (1, 7, 64, 3, 1, 2),
    (2, 5, 37, 2, 2, 2),
    (2, 130, 520, 1, 1, 1),  # more than one thread's share
    (3, 4, 16, 0, 3, 2),
    (2, 3, 6, 3, 1, 2),  # less than a vector; every token is a first one
    (1, 1, 3072, 1, 1, 2),
    (2, 0, 8, 0, 2, 1),
]


def draw(case: tuple, form: str, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The arguments of the operator and its backward; None for those that the form lacks."""
    items, tokens, width, _, batches, rows = case
    generator = torch.Generator().manual_seed(width + tokens)
    wide = torch.promote_types(dtype, torch.float32)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    without = {"norm": ("y", "gate", "grad_out"), "residual": ("weight", "bias", "grad_norm"), "ungated": ("gate",)}
    drawn = {name: randn(items, tokens, width) for name in ("x", "y", "grad_out", "grad_norm")}
    drawn["x"] = (2 * drawn["x"] + 0.5).to(dtype)
    drawn |= {name: randn(batches, rows, width, dtype=wide) for name in ("gate", "weight", "bias")}
    return {name: None if name in without.get(form, ()) else t for name, t in drawn.items()}


def run(function, drawn: dict[str, Tensor | None], first: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The existing ones of out, norm, dx and dy of `function`; dy is left out if it equals dx."""
    wide = torch.promote_types(dtype, torch.float32)
    own = {
        name: None if t is None else t.to(wide if name in ("gate", "weight", "bias") else dtype)
        for name, t in drawn.items()
    }
    leaves = {name: own[name].requires_grad_() for name in ("x", "y") if own[name] is not None}
    made = function(*(own[name] for name in ("x", "y", "gate", "weight", "bias")), first, 1e-6)
    grads = [own[name] for name in ("grad_out", "grad_norm") if own[name] is not None]
    found = torch.autograd.grad(made, list(leaves.values()), grads)
    names = [name for name, of in (("out", "y"), ("norm", "weight")) if own[of] is not None]
    gradients = dict(zip((f"d{name}" for name in leaves), found, strict=True))
    if own["gate"] is None:
        gradients.pop("dy", None)
    return dict(zip(names, (t.detach() for t in made), strict=True)) | gradients


def definition(drawn: dict[str, Tensor | None], first: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return run(ada_norm_reference, {n: None if t is None else t.detach() for n, t in drawn.items()}, first, dtype)


def expected(drawn: dict[str, Tensor | None], first: int) -> dict[str, Expected]:
    return rounding.expected(definition, drawn, first, drawn["x"].dtype)


@pytest.fixture(params=["reference", "cpp"])
def each_backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(operator, "backend", lambda x, name: None)
    elif not cpp_status()[0]:
        pytest.skip(cpp_status()[1])


def by_token(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The definition written out token by token."""
    out, norm = torch.empty_like(x), torch.empty_like(x)
    for item in range(x.shape[0]):
        for token in range(x.shape[1]):
            row = 0 if token < first else gate.shape[1] - 1
            tables = [t[min(item, len(t) - 1), row] for t in (gate, weight, bias)]
            value = x[item, token] + y[item, token] * tables[0]
            deviation = (value - value.mean()).square().mean().add(1e-6).sqrt()
            out[item, token], norm[item, token] = value, (value - value.mean()) / deviation * tables[1] + tables[2]
    return out, norm


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_the_definition_token_by_token(case):
    drawn, first = draw(case, "both", torch.float64), case[3]
    tensors = [drawn[name] for name in ("x", "y", "gate", "weight", "bias")]
    torch.testing.assert_close(ada_norm_reference(*tensors, first, 1e-6), list(by_token(*tensors, first)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_against_float64(case, form, dtype, each_backend):
    drawn, first = draw(case, form, dtype), case[3]
    check(run(operator._run, drawn, first, dtype), expected(drawn, first))


def test_without_a_gate_both_gradients_are_one(each_backend):
    drawn = draw(CASES[0], "ungated", torch.bfloat16)
    x, y = drawn["x"].requires_grad_(), drawn["y"].requires_grad_()
    made = residual_ada_norm(x, y, None, drawn["weight"], drawn["bias"], 3)
    dx, dy = torch.autograd.grad(made, (x, y), (drawn["grad_out"], drawn["grad_norm"]))
    assert torch.equal(dx, dy)


def test_gradients_by_finite_differences(each_backend):
    drawn = draw((2, 3, 6, 1, 2, 2), "both", torch.float64)
    x, y = drawn["x"].requires_grad_(), drawn["y"].requires_grad_()
    tables = drawn["gate"], drawn["weight"], drawn["bias"]
    assert torch.autograd.gradcheck(lambda x, y: residual_ada_norm(x, y, *tables, 1), (x, y))


@pytest.mark.parametrize("wanted", ["x", "y", "out", "norm"])
@pytest.mark.parametrize("gated", [True, False])
def test_one_gradient_or_one_result_alone(wanted, gated, each_backend):
    drawn = draw((2, 5, 12, 2, 1, 2), "both" if gated else "ungated", torch.float64)
    inputs = [drawn[name] for name in ("x", "y", "gate", "weight", "bias")]
    leaves = [t.requires_grad_() for t, name in zip(inputs, "xy", strict=False) if wanted in (name, "out", "norm")]
    results = []
    for function in (residual_ada_norm, lambda *args: ada_norm_reference(*args, 1e-6)):
        made = dict(zip(("out", "norm"), function(*inputs, 2), strict=True))
        used = [t for name, t in made.items() if wanted in (name, "x", "y")]
        results.append(torch.autograd.grad(sum(t.square().sum() for t in used), leaves))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["gate", "weight", "bias"])
def test_a_table_that_is_trained_gets_its_gradient(name):
    drawn = draw((2, 5, 12, 2, 2, 2), "both", torch.float64)
    drawn[name].requires_grad_()
    inputs = [drawn[each] for each in ("x", "y", "gate", "weight", "bias")]
    ours, theirs = (
        torch.autograd.grad(sum(t.square().sum() for t in made), drawn[name])
        for made in (residual_ada_norm(*inputs, 2), ada_norm_reference(*inputs, 2, 1e-6))
    )
    torch.testing.assert_close(ours, theirs)


def test_one_tensor_is_saved():
    drawn = draw((1, 6, 32, 2, 1, 2), "both", torch.bfloat16)
    x, y = drawn["x"].requires_grad_(), drawn["y"].requires_grad_()
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        out, _ = residual_ada_norm(x, y, drawn["gate"], drawn["weight"], drawn["bias"], 2)
        assert {ptr for ptr, t in saved.items() if t.shape == x.shape} == {out.data_ptr()}
        saved.clear()
        gated_residual(x, y, drawn["gate"], 2)
    assert not [t for t in saved.values() if t.shape == x.shape]


def test_any_strides_and_nothing_left_unwritten(each_backend):
    base = torch.randn(2, 6, 40, dtype=torch.float32)
    table = torch.rand(1, 2, 40)
    for view in (base.transpose(0, 1), base[:, ::2], base[..., :17], base[:1].expand(3, -1, -1)):
        tables = [table[..., : view.shape[2]]] * 3
        y = view.flip(0)
        expected = ada_norm_reference(view.contiguous(), y, *tables, 1, 1e-6)
        poison = [torch.full_like(each, float("nan")) for each in expected]
        del poison
        torch.testing.assert_close(list(residual_ada_norm(view, y, *tables, 1)), expected)


def test_the_stock_expression_of_a_wan_block():
    """diffusers' expression, with a copy of the tables for every token."""
    x, y = torch.randn(1, 10, 24).bfloat16(), torch.randn(1, 10, 24).bfloat16()
    gate, scale, shift = torch.randn(3, 1, 2, 24)
    each = [torch.cat([t[:, :1].expand(-1, 4, -1), t[:, 1:].expand(-1, 6, -1)], 1) for t in (gate, scale, shift)]
    out = (x.float() + y * each[0]).type_as(x)
    norm = (F.layer_norm(out.float(), (24,), eps=1e-6) * (1 + each[1]) + each[2]).type_as(x)
    ours = residual_ada_norm(x, y, gate, 1 + scale, shift, 4)
    torch.testing.assert_close(ours[0], out, rtol=0, atol=0)
    torch.testing.assert_close(ours[1], norm)


@pytest.mark.parametrize("form", FORMS)
def test_dispatcher_rules_and_fake_tensors(form):
    drawn = draw((2, 5, 12, 2, 1, 2), form, torch.float32)
    inputs = [drawn[name] for name in ("x", "y", "gate", "weight", "bias")]
    torch.library.opcheck(operator._forward_operator, (*inputs, 2, 1e-6))
    grads = drawn["grad_out"], drawn["grad_norm"]
    need_y = drawn["gate"] is not None
    args = (*grads, drawn["x"], drawn["gate"], drawn["weight"], 2, 1e-6, True, need_y)
    torch.library.opcheck(operator._backward_operator, args)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(1, 20240, 3072, dtype=torch.bfloat16)
        out, norm = residual_ada_norm(x, x, *[torch.empty(1, 2, 3072)] * 3, 880)
    assert out.shape == norm.shape == x.shape and norm.dtype == torch.bfloat16


def test_compiled_and_checkpointed():
    drawn = draw((1, 5, 12, 2, 1, 2), "both", torch.float32)
    x, y, tables = drawn["x"].requires_grad_(), drawn["y"], (drawn["gate"], drawn["weight"], drawn["bias"])

    def function(x: Tensor) -> Tensor:
        return torch.cat(residual_ada_norm(x, y, *tables, 2)).square().sum()

    (expected,) = torch.autograd.grad(function(x), x)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda x: checkpoint(function, x, use_reentrant=False)):
        torch.testing.assert_close(torch.autograd.grad(other(x), x)[0], expected)


def test_cpp_is_used_when_built():
    available, why = cpp_status()
    if not available:
        pytest.skip(f"no C++ operators: {why}")
    x = torch.randn(1, 3, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        ada_norm(x, torch.rand(1, 1, 8), torch.rand(1, 1, 8)).sum().backward()
    calls = {event.key for event in profile.key_averages()}
    assert {"vlmteacher_cpp::ada_norm", "vlmteacher_cpp::ada_norm_backward"} <= calls


@pytest.mark.parametrize(
    "change, word",
    [
        ({"x": torch.zeros(3, 8)}, "(B, N, D)"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int32)}, "torch.int32"),
        ({"y": torch.zeros(2, 3, 8).half()}, "torch.float16"),
        ({"y": torch.zeros(2, 4, 8)}, "(2, 4, 8)"),
        ({"gate": torch.zeros(2, 1, 7)}, "(2, 1, 7)"),
        ({"gate": torch.zeros(3, 1, 8)}, "(3, 1, 8)"),
        ({"weight": torch.zeros(2, 1, 8)}, "(2, 1, 8)"),
        ({"bias": torch.zeros(2, 2, 8).double()}, "torch.float64"),
        ({"first": 4}, "not 4"),
        ({"first": -1}, "not -1"),
    ],
    ids=str,
)
def test_bad_input(change, word):
    tables = {name: torch.zeros(2, 2, 8) for name in ("gate", "weight", "bias")}
    given = {"x": torch.zeros(2, 3, 8), "y": torch.zeros(2, 3, 8), **tables, "first": 1} | change
    with pytest.raises(InputError, match=re.escape(word)):
        residual_ada_norm(**given)


def test_three_rows_are_refused():
    with pytest.raises(InputError, match="1 or 2 rows"):
        ada_norm(torch.zeros(2, 3, 8), torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))
