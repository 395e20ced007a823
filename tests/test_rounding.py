"""The bound of tests/rounding.py: no order of a sum passes it, what is wrong does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.rounding import Expected, check, excess, expected

LOW = [torch.float32, torch.bfloat16, torch.float16]


def add_up(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the last dimension from left to right, each partial sum rounded to `dtype`."""
    total = torch.zeros(terms.shape[:-1], dtype=torch.float64)
    for term in terms.unbind(-1):
        total = (total + term).to(dtype).double()
    return total


def in_blocks(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """As a vector unit does: 8 sums side by side, added up at the end."""
    return add_up(torch.stack([add_up(part, dtype) for part in terms.chunk(8, -1)], -1), dtype)


def in_pairs(terms: Tensor, dtype: torch.dtype) -> Tensor:
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = F.pad(terms, (0, 1))
        terms = (terms[..., ::2] + terms[..., 1::2]).to(dtype).double()
    return terms[..., 0]


ORDERS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "sequential": add_up,
    "reversed": lambda terms, dtype: add_up(terms.flip(-1), dtype),
    "shuffled": lambda terms, dtype: add_up(terms[..., torch.randperm(terms.shape[-1])], dtype),
    "largest first": lambda terms, dtype: add_up(terms.gather(-1, terms.abs().argsort(-1, descending=True)), dtype),
    "positive first": lambda terms, dtype: add_up(terms.sort(-1, descending=True)[0], dtype),
    "blocks": in_blocks,
    "pairs": in_pairs,
}
KINDS = {
    "random": lambda x: x,
    "positive": lambda x: x.abs(),
    "an offset": lambda x: x + 3,
    "of many sizes": lambda x: x * torch.logspace(-3, 3, x.shape[-1]),
}


def draw(kind: str, dtype: torch.dtype, rows: int, length: int, columns: int) -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(rows, length), torch.randn(columns, length) / length**0.5
    return KINDS[kind](x).to(dtype), weight.to(dtype)


def product(x: Tensor, weight: Tensor, order: str, accumulator: torch.dtype, fma: bool = True) -> Tensor:
    """F.linear by such a sum, with or without a rounding of each product."""
    terms = x.double()[:, None] * weight.double()
    return ORDERS[order](terms if fma else terms.to(accumulator).double(), accumulator).to(x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("length", [1, 7, 300, 3072])
@pytest.mark.parametrize("kind", KINDS)
def test_no_order_of_a_sum_exceeds_it(kind: str, length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(length)
    x, weight = draw(kind, dtype, 4, length, 4)
    wanted = expected(F.linear, x, weight)
    accumulator = torch.promote_types(dtype, torch.float32)
    for order in ORDERS:
        for fma in (False, True):
            part = excess(product(x, weight, order, accumulator, fma), wanted)
            assert part < 0.8, (order, fma)
    assert excess(F.linear(x, weight), wanted) < 0.8


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_single_value_does_not_exceed_it_by_chance(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = []
    for length in (1, 3, 20, 100) * 10:
        x, weight = draw("random", dtype, 1, length, 1)
        wanted = expected(F.linear, x, weight)
        parts += [excess(product(x, weight, order, torch.float32), wanted) for order in ORDERS]
    assert max(parts) < 0.8


MISTAKES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bfloat16 sums": lambda x, w: product(x, w, "sequential", torch.bfloat16),
    "bfloat16 partial sums": lambda x, w: product(x, w, "blocks", torch.bfloat16),
    "a term left out": lambda x, w: F.linear(x[:, 1:].double(), w[:, 1:].double()),
    "a term twice": lambda x, w: F.linear(x.double(), w.double()) + x[:, :1].double() * w[:, 0].double(),
    "one percent": lambda x, w: 1.02 * F.linear(x.double(), w.double()),
    "a value of another row": lambda x, w: F.linear(x.double(), w.double()).index_put(
        (torch.tensor(0), torch.tensor(1)), torch.tensor(0.1).double()
    ),
    "NaN": lambda x, w: F.linear(x, w).index_fill(0, torch.tensor(3), torch.nan),
}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_exceed_it(mistake: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = draw("random", dtype, 32, 2048, 32)
    found = MISTAKES[mistake](x, weight).to(dtype)
    assert not excess(found, expected(F.linear, x, weight)) <= 1


def test_narrow_arithmetic_exceeds_it() -> None:
    """float32 where float64 was asked for, and the 10 bits of TensorFloat-32 where float32 was."""
    torch.manual_seed(0)
    x, weight = draw("random", torch.float64, 16, 1000, 16)
    assert excess(F.linear(x.float(), weight.float()), expected(F.linear, x, weight)) > 100
    x, weight = draw("random", torch.float32, 16, 1000, 16)
    short = [(t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for t in (x, weight)]
    assert excess(F.linear(*short), expected(F.linear, x, weight)) > 1


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_through_many_operations_and_their_gradients(dtype: torch.dtype) -> None:
    """A small network: what it gives in `dtype` with its channels in any order is within, without a scale it is not."""
    torch.manual_seed(1)
    x, first, second = (torch.randn(size).to(dtype) for size in ((5, 24), (64, 24), (16, 64)))

    def network(x: Tensor, first: Tensor, second: Tensor, scale: float = 64**-0.5) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = F.relu(F.linear(F.layer_norm(x, (24,)), first))
        y = F.softmax(F.linear(F.gelu(y, approximate="tanh"), second) * scale, -1)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x])]

    wanted = expected(network, x, first, second)
    for _ in range(8):
        order = torch.randperm(64)
        check(network(x, first[order], second[:, order]), wanted)
    for i, wrong in enumerate(network(x, first, second, 63**-0.5 if dtype == torch.float32 else 32**-0.5)):
        assert excess(wrong, wanted[i]) > 1


def test_what_is_exact_stays_exact() -> None:
    x = torch.randn(4, 6).bfloat16()
    (wanted,) = expected(lambda x: [x.T.float().reshape(2, -1).neg()], x)
    assert isinstance(wanted, Expected) and not wanted.spread.any()
    assert excess(-x.T.float().reshape(2, -1), wanted) == 0
    assert excess(-x.T.float().reshape(2, -1) * (1 + 1e-7), wanted) == float("inf")


def test_a_relu_at_zero_may_fall_on_either_side() -> None:
    """The sum of these is zero but for rounding: a gradient of 1 or 0 is right for either."""
    x, weight = torch.tensor([[1.0, 1.0, -2.0]]), torch.tensor([[0.1, 0.1, 0.1]])

    def slope(x: Tensor, weight: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        return list(torch.autograd.grad(F.relu(F.linear(x, weight)).sum(), x))

    wanted = expected(slope, x, weight)
    for found in (torch.zeros(1, 3), weight):
        check([found], wanted)
