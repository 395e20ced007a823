"""Frozen linear layers on every class of processor, against their definition in float64."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import rounding
from tests.processors import reachable, used_as
from tests.rounding import check
from vlmteacher.ops.linear import FrozenLinear, frozen, is_plain, linear_backward
from vlmteacher.ops.processors import VENDOR, serving


class Drawn(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor


def draw(rows: int, k: int, n: int, dtype: torch.dtype) -> Drawn:
    generator = torch.Generator().manual_seed(rows + k + n)
    shapes = (2, rows, k), (n, k), (n,), (2, rows, n)
    return Drawn(*(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes))


def layer_of(drawn: Drawn, bias: bool = True) -> FrozenLinear:
    layer = nn.Linear(drawn.weight.shape[1], drawn.weight.shape[0], bias, dtype=drawn.weight.dtype)
    layer.load_state_dict({"weight": drawn.weight} | ({"bias": drawn.bias} if bias else {}))
    found = frozen(nn.Sequential(layer))[0]
    assert isinstance(found, FrozenLinear)
    return found


def run(function: Any, drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    x, weight, bias, grad = (t.to(dtype) for t in drawn)
    x.requires_grad_()
    y = function(x, weight, bias)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, grad)[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (7, 33, 20), (40, 300, 130), (0, 4, 5)])
@pytest.mark.parametrize("processor", reachable())
def test_error_against_float64(processor: str, rows: int, k: int, n: int, dtype: torch.dtype) -> None:
    drawn = draw(rows, k, n, dtype)
    expected = rounding.expected(run, F.linear, drawn, dtype)
    layer = layer_of(drawn)
    with used_as(processor):
        found = run(lambda x, weight, bias: layer(x), drawn, dtype)
        check(found, expected)
        check({"dx": linear_backward(drawn.grad, drawn.weight)}, {"dx": expected["dx"]})


def test_without_a_bias() -> None:
    drawn = draw(5, 6, 7, torch.bfloat16)
    layer = layer_of(drawn, bias=False)
    with used_as(reachable()[0]):
        torch.testing.assert_close(layer(drawn.x), F.linear(drawn.x.float(), drawn.weight.float()).bfloat16())


def is_widened(y: Tensor) -> bool:
    return "Widened" in type(y.grad_fn).__name__


@pytest.mark.parametrize("processor", reachable())
def test_dispatch_follows_the_table_and_only_the_weight_is_kept(processor: str) -> None:
    drawn = draw(5, 6, 7, torch.bfloat16)
    layer, kept = layer_of(drawn), []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    with used_as(processor), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        assert is_widened(layer(drawn.x.requires_grad_())) == (serving("linear", torch.bfloat16) == VENDOR)
    assert set(kept) == {layer.weight.data_ptr()}


@pytest.mark.skipif("avx2" not in reachable(), reason="no processor, or no C++ operators, with a class that widens")
def test_torch_s_own_runs_where_the_layer_is_trained_or_has_no_data() -> None:
    layer = layer_of(draw(5, 6, 7, torch.bfloat16))
    trained = copy.deepcopy(layer).requires_grad_()
    x = torch.ones(2, 6, dtype=torch.bfloat16, requires_grad=True)
    with used_as("avx2"):
        assert is_widened(layer(x)) and not is_widened(trained(x))
        trained(x).sum().backward()
        assert trained.weight.grad is not None and trained.bias.grad is not None
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert not is_widened(layer(mode.from_tensor(x)))
        with pytest.raises(RuntimeError, match="dtype"):  # of another dtype, as `nn.Linear` refuses it
            layer(x.float())


def test_only_plain_layers_are_taken() -> None:
    class Own(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(2, 2), Own(2, 2), nn.Sequential(nn.Linear(2, 2))).train()
    assert frozen(network) is network and not network.training
    assert [type(layer) for layer in network.modules() if isinstance(layer, nn.Linear)] == [
        FrozenLinear, Own, FrozenLinear,
    ]  # fmt: skip
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert [is_plain(layer) for layer in (network[0], network[1], nn.Linear(2, 2))] == [True, False, True]
