"""The operator against its definition in float64: outputs, all gradients, every kind of mask and of head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.rounding import check, expected
from vlmteacher.errors import InputError, MissingExtra
from vlmteacher.ops.attention import Spans, attention, attention_reference, is_native

CASES = {  # batch, queries, keys, heads, key heads, channels
    "one": (1, 1, 1, 1, 1, 2),
    "blocks": (1, 192, 192, 2, 2, 64),
    "odd": (2, 37, 61, 4, 2, 48),
    "grouped": (1, 131, 131, 6, 2, 72),
    "few queries": (1, 3, 301, 2, 1, 128),
    "few keys": (2, 101, 5, 3, 3, 34),
    "chunks": (1, 97, 613, 1, 1, 80),
}
MASKS = ("all", "causal", "segments", "window", "prefix", "any")


def spans_of(mask: str, queries: int, keys: int) -> Spans | None:
    place = (torch.arange(queries) + max(0, keys - queries)).clamp(max=keys - 1)  # the queries are the last tokens
    causal = int(queries == keys)
    none = torch.zeros_like(place)
    if mask == "all":
        return None
    if mask == "segments":
        return Spans(torch.stack([none, place // 13 * 13, (place // 13 * 13 + 13).clamp(max=keys)], 1).int(), keys)
    if mask == "window":
        return Spans(torch.stack([none, (place - 9).clamp(min=0), place + 1], 1).int(), keys)
    if mask == "causal":
        return Spans(torch.stack([place + 1, none, none], 1).int(), keys, causal=causal * keys)
    if mask == "prefix":  # half of it is shared, questions of 11 tokens follow
        half = (keys + 1) // 2
        start = half + (place - half).clamp(min=0) // 11 * 11
        return Spans(torch.stack([(place + 1).clamp(max=half), start, place + 1], 1).int(), keys, causal=causal * half)
    low, high = torch.rand(queries, 2, generator=torch.Generator().manual_seed(keys)).mul(keys + 1).int().sort(1)[0].T
    return Spans(torch.stack([torch.where(low < high, low // 2, 1), low, high], 1).int(), keys)


def draw(case: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and the gradient, in float64, with the values of `dtype`."""
    batch, queries, keys, heads, key_heads, dim = CASES[case]
    g = torch.Generator().manual_seed(queries * keys)
    shapes = ((queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads))
    return tuple(
        torch.randn(batch, n, h, dim, generator=g, dtype=torch.float64).mul(1.5).to(dtype).double() for n, h in shapes
    )


def run(function, given: tuple[Tensor, ...], spans: Spans | None, dtype: torch.dtype, *how) -> list[Tensor]:
    """The output and the gradients of q, k and v, in float64."""
    *inputs, grad = (x.to(dtype) for x in given)
    inputs = [x.requires_grad_() for x in inputs]
    output = function(*inputs, spans, *how)
    found = [output.detach(), *torch.autograd.grad(output, inputs, grad)]
    assert all(x.dtype == dtype for x in found)
    return [x.double() for x in found]


native = pytest.mark.skipif(not is_native(torch.zeros(1, 1, 1, 2)), reason="no AVX-512, or no C++ operators")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_error(case, mask, dtype):
    if not is_native(torch.zeros(1, 1, 1, 2, dtype=dtype)):
        pytest.skip(f"no kernel of ours for {dtype} here")
    given, spans = draw(case, dtype), spans_of(mask, *CASES[case][1:3])
    torch.full((2, *given[0].shape), torch.nan, dtype=dtype)  # where the next allocations of this size will likely be
    ours = run(attention, given, spans, dtype, "native")
    check(ours, expected(run, attention_reference, given, spans, dtype))


@native
def test_large_scores_do_not_overflow():
    q, k, v, grad = draw("odd", torch.float32)
    ours, exact = (
        run(f, (1e4 * q, k, v, grad), None, dtype)
        for f, dtype in ((attention, torch.float32), (attention_reference, torch.float64))
    )
    torch.testing.assert_close(ours[0], exact[0])  # one key has all of the weight
    assert all(x.isfinite().all() for x in ours)


@native
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_output(poison):
    q, k, v, _ = (x.float() for x in draw("odd", torch.float32))
    q[0, 5, 1, 3] = poison
    output = attention(q, k, v)
    assert output[0, 5, 1].isnan().all() and output.isnan().sum() == 48


@native
def test_strided_heads_and_expanded_gradients():
    x = torch.randn(2, 3, 7, 5, 8).permute(1, 0, 3, 2, 4).requires_grad_()  # (3, batch 2, 5 tokens, 7 heads, 8)
    ours, plain = (torch.autograd.grad(f(*x.unbind(0)).sum(), x)[0] for f in (attention, attention_reference))
    torch.testing.assert_close(ours, plain)
    q, k, v = (torch.randn(1, 8, 2, 9).transpose(1, 3) for _ in range(3))  # channels are not contiguous
    torch.testing.assert_close(attention(q, k, v), attention_reference(q, k, v))


@native
def test_checkpointing_and_compiling_change_nothing():
    q, k, v, grad = (x.float() for x in draw("odd", torch.float32))
    q.requires_grad_()
    results = []
    for function in (
        attention,
        lambda *a: checkpoint(attention, *a, use_reentrant=False),
        torch.compile(attention, fullgraph=True, backend="aot_eager"),
    ):
        output = function(q, k, v)
        results.append((output.detach(), torch.autograd.grad(output, q, grad)[0]))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v), results[0][0])


@native
def test_the_operators_are_registered_as_torch_asks():
    q, k, v, grad = (x.float() for x in draw("odd", torch.float32))
    table = spans_of("window", 37, 61).table
    for spans in (None, table):
        torch.library.opcheck(torch.ops.vlmteacher.attention.default, (q, k, v, spans))
        rest = torch.ops.vlmteacher.attention(q, k, v, spans)
        torch.library.opcheck(torch.ops.vlmteacher.attention_backward.default, (grad, q, k, v, *rest, spans))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", ["odd", "grouped"])
def test_torch_computes_the_same(case, mask):
    given, spans = draw(case, torch.float64), spans_of(mask, *CASES[case][1:3])
    exact = run(attention_reference, given, spans, torch.float64)
    for ours in (run(attention, given, spans, torch.float64, how) for how in ("sdpa", None)):
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mask", MASKS)
def test_flex_attention_computes_the_same(mask):
    q, k, v, _ = (x.float() for x in draw("grouped", torch.float32))
    spans = spans_of(mask, 131, 131)
    torch.testing.assert_close(attention(q, k, v, spans, "flex"), attention_reference(q, k, v, spans))
    with pytest.raises(InputError, match="no backward on CPUs"):
        attention(q.requires_grad_(), k, v, spans, "flex")


def test_segments():
    spans = Spans.segments([2, 1, 3])
    assert spans.table.tolist() == [[0, 0, 2], [0, 0, 2], [0, 2, 3], [0, 3, 6], [0, 3, 6], [0, 3, 6]]
    assert torch.equal(spans.mask(), torch.block_diag(*(torch.ones(n, n) for n in (2, 1, 3))).bool())
    assert spans.at(torch.tensor([4, 2])).mask().int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("backend", ["xformers", "flash"])
def test_a_missing_package_is_named(backend):
    q = torch.zeros(1, 2, 1, 8)
    try:
        attention(q, q, q, backend=backend)
    except MissingExtra as error:
        assert f"vlmteacher[{backend}]" in str(error)
    else:
        pytest.skip(f"{backend} is installed")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, r"got q \(2, 3, 8\)"),
        ({"q": torch.zeros(1, 5, 3, 8)}, "G a divisor of H"),
        ({"v": torch.zeros(1, 6, 2, 8)}, r"v \(1, 6, 2, 8\)"),
        ({"k": torch.zeros(1, 7, 2, 6), "v": torch.zeros(1, 7, 2, 6)}, r"k \(1, 7, 2, 6\)"),
        ({"k": torch.zeros(1, 0, 2, 8), "v": torch.zeros(1, 0, 2, 8)}, r"k \(1, 0, 2, 8\)"),
        ({"k": torch.zeros(1, 7, 2, 8).bfloat16()}, "torch.bfloat16 on cpu"),
        ({"v": torch.zeros(1, 7, 2, 8, device="meta")}, "on meta"),
        ({"spans": spans_of("causal", 5, 6)}, "spans of 5 queries and 6 keys"),
        ({"backend": "fast"}, "unknown attention backend 'fast': choose from native, sdpa"),
        (
            {"backend": "native", **{name: torch.zeros(1, 7, 2, 8).double() for name in "qkv"}},
            "run on torch.float64",
        ),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    given = {"q": torch.zeros(1, 5, 4, 8), "k": torch.zeros(1, 7, 2, 8), "v": torch.zeros(1, 7, 2, 8)} | changed
    with pytest.raises(InputError, match=message):
        attention(**given)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[1, 0, 8]], "within the 7 keys"),
        ([[-1, 0, 3]], "within the 7 keys"),
        ([[0, 3, 3]], "every query at least one key"),
        ([[1, 0]], r"not \(1, 2\)"),
    ],
)
def test_spans_that_are_none_are_refused(table, message):
    with pytest.raises(InputError, match=message):
        Spans(torch.tensor(table, dtype=torch.int32), 7)
