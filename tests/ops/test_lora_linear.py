"""The operator against its definition in float64: outputs, every gradient, every way of calling it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmteacher.errors import InputError
from vlmteacher.ops import lora_linear as operator
from vlmteacher.ops.backends import cpp_status
from vlmteacher.ops.lora_linear import lora_linear, lora_linear_group, lora_linear_reference

NAMES = ("x", "weight", "bias", "lora_a", "lora_b")


def draw(
    m: int, k: int, n: int, r: int, bias: bool = True, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(m * 31 + k * 7 + n * 3 + r)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    drawn = {"x": randn(m, k), "weight": randn(n, k) / k**0.5, "bias": randn(n) if bias else None}
    drawn |= {"lora_a": randn(r, k) / k**0.5, "lora_b": randn(n, r) / r**0.5}
    return {name: None if t is None else t.to(dtype) for name, t in drawn.items()}


def run(function, tensors: dict[str, Tensor | None], grad: Tensor, dtype: torch.dtype, needs=None) -> dict[str, Tensor]:
    """y and the gradient of each tensor in `needs` (default: all but the weight), all in float64."""
    own = {name: None if t is None else t.detach().to(dtype) for name, t in tensors.items()}
    needs = [name for name in NAMES if name != "weight" and own[name] is not None] if needs is None else needs
    for name in needs:
        own[name].requires_grad_(True)
    y = function(*(own[name] for name in NAMES), 0.7)
    found = {"y": y.detach()}
    if needs:
        found |= dict(zip(needs, torch.autograd.grad(y, [own[name] for name in needs], grad.to(dtype)), strict=True))
    assert all(t.dtype == dtype for t in found.values())
    return {name: t.double() for name, t in found.items()}


@pytest.fixture(params=["reference", "cpp"])
def each_backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(operator, "backend", lambda *_: None)
    elif not cpp_status()[0]:
        pytest.skip(cpp_status()[1])


@pytest.mark.parametrize(
    "needs", [list(c) for k in range(5) for c in itertools.combinations(("x", "bias", "lora_a", "lora_b"), k)], ids=str
)
def test_any_of_the_gradients_alone(needs):
    tensors, grad = draw(5, 8, 6, 2), torch.randn(5, 6, dtype=torch.float64)
    exact, ours = (run(f, tensors, grad, torch.float64, needs) for f in (lora_linear_reference, lora_linear))
    assert exact.keys() == ours.keys()
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name])


def test_gradients_by_finite_differences():
    tensors = {n: t.requires_grad_(n != "weight") for n, t in draw(3, 5, 4, 2).items() if t is not None}
    assert torch.autograd.gradcheck(lambda *args: lora_linear(*args, 1.3), tuple(tensors[name] for name in NAMES))


@pytest.mark.parametrize("biased", [True, False])
def test_layers_that_share_x_are_each_as_by_themselves_and_save_it_once(biased, each_backend):
    layers = [draw(7, 8, n, r) for n, r in ((6, 2), (4, 3), (6, 1))]
    x, grads = layers[0]["x"].requires_grad_(), [torch.randn(7, n, dtype=torch.float64) for n in (6, 4, 6)]
    trained = [layer[name].requires_grad_() for layer in layers for name in ("lora_a", "lora_b")]
    biases = [layer["bias"] for layer in layers] if biased else None
    scaling = [0.5, 1.0, 2.0]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = lora_linear_group(
            x, *([layer[n] for layer in layers] if n != "bias" else biases for n in NAMES[1:]), scaling
        )
    assert sum(t.shape == x.shape and t.data_ptr() == x.data_ptr() for t in saved) == 1
    expected = [
        lora_linear_reference(x, e["weight"], e["bias"] if biased else None, e["lora_a"], e["lora_b"], s)
        for e, s in zip(layers, scaling, strict=True)
    ]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    ours, theirs = (torch.autograd.grad(ys, [x, *trained], grads) for ys in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_one_of_a_group_may_stay_unused():
    layer = draw(5, 8, 6, 2)
    a, b, x = layer["lora_a"].requires_grad_(), layer["lora_b"].requires_grad_(), layer["x"].requires_grad_()
    args = ([layer["weight"]] * 2, None, [a, a], [b, b], [1.0, 1.0])
    first, _ = lora_linear_group(x, *args)
    expected = lora_linear_reference(x, layer["weight"], None, a, b, 1.0)
    for ours, theirs in zip(
        torch.autograd.grad(first.sum(), [x, a, b]), torch.autograd.grad(expected.sum(), [x, a, b]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (0, 8), (3, 0, 8)])
def test_any_leading_shape(shape):
    layer = draw(1, 8, 6, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    args = [layer[name] for name in NAMES[1:]]
    ours, theirs = lora_linear(x, *args, 1.0), lora_linear_reference(x, *args, 1.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x))


def test_strided_x_and_expanded_gradients():
    layer = draw(1, 8, 6, 2)
    args = [layer[name] for name in NAMES[1:]]
    x = torch.randn(8, 5, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    ours, theirs = lora_linear(x, *args, 1.0), lora_linear_reference(x, *args, 1.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x))


def test_under_autocast_it_is_as_a_linear_layer():
    layer = draw(9, 16, 12, 4, dtype=torch.float32)
    trained = [layer["lora_a"].requires_grad_(), layer["lora_b"].requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*(layer[name] for name in NAMES), 1.0)
        plain = lora_linear_reference(*(layer[name] for name in NAMES), 1.0)
    assert y.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain, atol=0.05, rtol=0.05)
    for ours, theirs in zip(*(torch.autograd.grad(t.float().sum(), trained) for t in (y, plain)), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_checkpointing_compiling_and_no_grad_change_nothing():
    layer = draw(9, 16, 12, 4, dtype=torch.float32)
    x = layer["x"].requires_grad_()
    args = [layer[name] for name in NAMES[1:]]

    def grads(function) -> tuple[Tensor, ...]:
        y = function(x, *args, 0.5)
        return y, *torch.autograd.grad(y.square().sum(), [x])

    plain = grads(lora_linear)
    again = grads(lambda *a: checkpoint(lora_linear, *a, use_reentrant=False))
    compiled = grads(torch.compile(lora_linear, fullgraph=True, backend="aot_eager"))
    for a, b, c in zip(plain, again, compiled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    with torch.no_grad():
        assert torch.equal(lora_linear(x, *args, 0.5), plain[0])


def test_the_operators_are_registered_as_torch_asks():
    layer = draw(5, 8, 6, 2, dtype=torch.float32)
    x, s, layers = layer["x"], torch.randn(5, 2), [[layer[name]] for name in ("weight", "lora_a", "lora_b")]
    args = (x, layers[0], [layer["bias"]], *layers[1:], [0.5])
    torch.library.opcheck(torch.ops.vlmteacher.lora_linear.default, args)
    for needs in itertools.product((True, False), repeat=3):
        args = ([torch.randn(5, 6)], x, s, *layers, [0.5], *needs)
        torch.library.opcheck(torch.ops.vlmteacher.lora_linear_backward.default, args)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3, 7)}, r"x \(3, 7\), weight \(6, 8\)"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "floating-point x"),
        ({"weight": torch.zeros(8)}, "shapes do not fit"),
        ({"bias": torch.zeros(5)}, r"bias \(5,\)"),
        ({"lora_a": torch.zeros(2, 9)}, r"lora_a \(2, 9\)"),
        ({"lora_b": torch.zeros(6, 3)}, r"lora_b \(6, 3\)"),
        ({"lora_a": torch.zeros(0, 8), "lora_b": torch.zeros(6, 0)}, "rank must be at least 1"),
        ({"lora_a": torch.zeros(2, 8, device="meta")}, "on one device: .*lora_a on meta"),
        ({"weight": torch.zeros(6, 8, dtype=torch.int8)}, "floating-point weights"),
        ({"weight": torch.zeros(6, 8, dtype=torch.bfloat16)}, r"x torch.float32, weight torch.bfloat16"),
        ({"weight": torch.zeros(6, 8, requires_grad=True)}, "is frozen"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    layer = draw(3, 8, 6, 2, dtype=torch.float32) | changed
    with pytest.raises(InputError, match=message):
        lora_linear(*(layer[name] for name in NAMES), 1.0)


def test_a_group_needs_one_of_each():
    layer = draw(3, 8, 6, 2)
    with pytest.raises(InputError, match="2 weights need as many"):
        lora_linear_group(layer["x"], [layer["weight"]] * 2, None, [layer["lora_a"]], [layer["lora_b"]], [1.0])
