"""The operator against its definition in float64, on outputs and gradients."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import rounding
from tests.ops.test_ada_norm import DTYPES
from tests.rounding import Expected, check
from vlmteacher.errors import InputError
from vlmteacher.ops import qk_norm_rope as operator
from vlmteacher.ops.backends import cpp_status
from vlmteacher.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference

CASES = [  # items, tokens of the queries and of the keys, heads, channels of a head; other tokens: no rope
    (2, (7, 7), 2, 16),
    (1, (5, 5), 3, 10),  # heads that begin within a vector
    (1, (130, 130), 8, 64),  # more than one thread's share
    (2, (6, 11), 3, 22),
    (1, (1, 1), 1, 2),
    (1, (2, 2), 24, 128),
    (2, (0, 0), 2, 8),
]


class Drawn(NamedTuple):
    xs: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]
    rope: tuple[Tensor, Tensor] | None
    heads: int


def draw(case: tuple, dtype: torch.dtype) -> Drawn:
    items, tokens, heads, channels = case
    generator = torch.Generator().manual_seed(heads * channels + sum(tokens))
    wide = torch.promote_types(dtype, torch.float32)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = [(items, count, heads * channels) for count in tokens]
    angles = randn(tokens[0], channels // 2) * 3
    return Drawn(
        [(2 * randn(*shape) + 0.3).to(dtype) for shape in shapes],
        [randn(heads * channels).to(dtype) for _ in tokens],
        [randn(*shape).to(dtype) for shape in shapes],
        (angles.cos().to(wide), angles.sin().to(wide)) if tokens[0] == tokens[1] else None,
        heads,
    )


def run(function, drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    xs = [x.to(dtype).requires_grad_() for x in drawn.xs]
    wide = torch.promote_types(dtype, torch.float32)
    rope = drawn.rope and tuple(t.to(wide) for t in drawn.rope)
    ys = function(xs, [w.to(dtype) for w in drawn.weights], rope, drawn.heads)
    grads = torch.autograd.grad(ys, xs, [g.to(dtype) for g in drawn.grads])
    return dict(zip(("q", "k", "dq", "dk"), (*(y.detach() for y in ys), *grads), strict=True))


def reference(xs: list[Tensor], weights: list[Tensor], rope: tuple[Tensor, Tensor] | None, heads: int) -> list[Tensor]:
    return qk_norm_rope_reference(xs, weights, *(rope or (None, None)), heads, 1e-6)


def expected(drawn: Drawn) -> dict[str, Expected]:
    return rounding.expected(run, reference, drawn, drawn.xs[0].dtype)


@pytest.fixture(params=["reference", "cpp"])
def each_backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(operator, "backend", lambda x, name: None)
    elif not cpp_status()[0]:
        pytest.skip(cpp_status()[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_against_float64(case, dtype, each_backend):
    drawn = draw(case, dtype)
    check(run(qk_norm_rope, drawn, dtype), expected(drawn))


def test_the_definition_is_what_diffusers_does(each_backend, monkeypatch):
    """Its norms and rotation, recorded as queries and keys enter its attention."""
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed

    torch.manual_seed(0)
    heads, channels, tokens = 2, 12, 6
    attention = WanAttention(heads * channels, heads, channels, processor=WanAttnProcessor()).double()
    seen: dict[str, Tensor] = {}
    for name in ("q", "k"):
        getattr(attention, f"norm_{name}").weight.data.normal_()
        getattr(attention, f"norm_{name}").register_forward_hook(
            lambda module, given, made, name=name: seen.update(
                {name: given[0].detach(), f"{name}_weight": module.weight}
            )
        )
    cos, sin = WanRotaryPosEmbed(channels, (1, 1, 1), 16)(torch.empty(1, 1, 1, 2, 3))
    x = torch.randn(1, tokens, heads * channels, dtype=torch.float64)
    theirs: list[Tensor] = []
    stock = F.scaled_dot_product_attention

    def look(query: Tensor, key: Tensor, *args: object, **kwargs: object) -> Tensor:
        theirs.extend([query, key])
        return stock(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    attention(x, None, None, (cos, sin))
    rope = cos[0, :, 0, ::2].double(), sin[0, :, 0, ::2].double()
    weights = [seen["q_weight"].detach(), seen["k_weight"].detach()]
    ours = qk_norm_rope([seen["q"], seen["k"]], weights, rope, heads, attention.norm_q.eps)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.unflatten(2, (heads, -1)).transpose(1, 2), other)


def test_gradients_by_finite_differences(each_backend):
    drawn = draw((2, (3, 3), 2, 4), torch.float64)
    xs = [x.requires_grad_() for x in drawn.xs]
    assert torch.autograd.gradcheck(lambda *xs: qk_norm_rope(xs, drawn.weights, drawn.rope, drawn.heads), xs)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_of_them_alone(wanted, each_backend):
    drawn = draw((1, (4, 4), 2, 6), torch.float64)
    x = drawn.xs[wanted].requires_grad_()
    ours, theirs = (f(drawn.xs, drawn.weights, drawn.rope, drawn.heads) for f in (qk_norm_rope, reference))
    for made in (lambda ys: sum(y.square().sum() for y in ys), lambda ys: ys[wanted].sum()):
        torch.testing.assert_close(torch.autograd.grad(made(ours), x, retain_graph=True),
                                   torch.autograd.grad(made(theirs), x, retain_graph=True))  # fmt: skip


def test_a_weight_that_is_trained_gets_its_gradient():
    drawn = draw((1, (4, 4), 2, 6), torch.float64)
    weight = drawn.weights[1].requires_grad_()
    ours, theirs = (f(drawn.xs, drawn.weights, drawn.rope, drawn.heads) for f in (qk_norm_rope, reference))
    torch.testing.assert_close(torch.autograd.grad(ours[1].sum(), weight), torch.autograd.grad(theirs[1].sum(), weight))


def test_the_inputs_alone_are_saved():
    drawn = draw((1, (9, 9), 2, 64), torch.bfloat16)
    xs = [x.requires_grad_() for x in drawn.xs]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qk_norm_rope(xs, drawn.weights, drawn.rope, drawn.heads)
    assert {t.data_ptr() for t in saved if t.shape == xs[0].shape} == {x.data_ptr() for x in xs}


def test_any_strides_and_nothing_left_unwritten(each_backend):
    base = torch.randn(2, 6, 48)
    angles = torch.randn(6, 4)
    for x in (base[..., :24], base[..., ::2], torch.randn(6, 2, 24).transpose(0, 1)):
        args = ([torch.rand(48)[::2]], (angles.cos(), angles.sin()), 3)
        expected = reference([x.contiguous()], *args)
        poison = torch.full_like(expected[0], float("nan"))
        del poison
        torch.testing.assert_close(qk_norm_rope([x], *args), expected)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_dispatcher_rules_and_fake_tensors(case):
    drawn = draw(case, torch.float32)
    args = (drawn.xs, drawn.weights, *(drawn.rope or (None, None)), drawn.heads, 1e-6)
    torch.library.opcheck(operator._forward_operator, args)
    torch.library.opcheck(operator._backward_operator, (drawn.grads, *args))


def test_compiled():
    drawn = draw((1, (5, 5), 2, 8), torch.float32)
    xs = [x.requires_grad_() for x in drawn.xs]

    def function(*xs: Tensor) -> Tensor:
        return torch.cat(qk_norm_rope(xs, drawn.weights, drawn.rope, drawn.heads)).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*xs), xs), torch.autograd.grad(function(*xs), xs))


def test_cpp_is_used_when_built():
    available, why = cpp_status()
    if not available:
        pytest.skip(f"no C++ operators: {why}")
    x = torch.randn(1, 3, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        qk_norm_rope([x], [torch.rand(8)], None, 2)[0].sum().backward()
    calls = {event.key for event in profile.key_averages()}
    assert {"vlmteacher_cpp::qk_norm_rope", "vlmteacher_cpp::qk_norm_rope_backward"} <= calls


@pytest.mark.parametrize(
    "change, word",
    [
        ({"xs": [torch.zeros(3, 8)]}, "(B, N, C)"),
        ({"xs": [torch.zeros(2, 3, 8, dtype=torch.int32)]}, "torch.int32"),
        ({"weights": []}, "not 0"),
        ({"weights": [torch.zeros(7)]}, "(7,)"),
        ({"heads": 3}, "8 channels make no 3 heads"),
        ({"heads": 8}, "8 channels make no 8 heads"),
        ({"rope": (torch.zeros(3, 4), torch.zeros(3, 4))}, "(3, 4)"),
        ({"rope": (torch.zeros(3, 2).double(), torch.zeros(3, 2).double())}, "torch.float64"),
    ],
    ids=str,
)
def test_bad_input(change, word):
    rope = torch.zeros(3, 2), torch.zeros(3, 2)
    given = {"xs": [torch.zeros(2, 3, 8)], "weights": [torch.zeros(8)], "rope": rope, "heads": 2} | change
    with pytest.raises(InputError, match=re.escape(word)):
        qk_norm_rope(**given)
