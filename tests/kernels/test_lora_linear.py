"""Every backend of lora_linear against its definition in float64: plain torch and C++ on the CPU, the Triton kernels in
their interpreter, the CUDA source executed on the CPU."""

from __future__ import annotations

import ctypes
import functools
import itertools

import pytest
import torch
from torch import Tensor

from tests import rounding
from tests.kernels import simt
from tests.kernels.interpreter import interpreted, with_triton
from tests.ops import test_lora_linear as cpu
from tests.ops.test_lora_linear import each_backend  # noqa: F401 (a fixture)
from vlmteacher.ops.lora_linear import lora_linear, lora_linear_group, lora_linear_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


SHAPES = [  # m, k, n, r: every size that a kernel may have trouble with, in some company
    (0, 64, 64, 4),
    (1, 64, 3072, 4),
    (63, 320, 1000, 16),
    (63, 65, 33, 3),
    (63, 3072, 64, 64),
    (257, 1000, 320, 64),
    (257, 320, 3072, 128),
    (1000, 64, 320, 128),
    (300, 1000, 1000, 16),
    (4096, 320, 64, 4),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
def test_on_the_cpu(m, k, n, r, bias, dtype, each_backend):  # noqa: F811
    tensors, grad, wanted = on_the_cpu(m, k, n, r, bias, dtype)
    rounding.check(cpu.run(lora_linear, tensors, grad, dtype), wanted)


@functools.lru_cache(maxsize=1)  # both backends
def on_the_cpu(m: int, k: int, n: int, r: int, bias: bool, dtype: torch.dtype):
    tensors = cpu.draw(m, k, n, r, bias, dtype)
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(dtype).double()
    return tensors, grad, rounding.expected(cpu.run, lora_linear_reference, tensors, grad, dtype)


@pytest.mark.parametrize(("m", "k", "n", "r"), [(63, 65, 33, 3), (63, 320, 1000, 16), (257, 1000, 320, 64)])
def test_float32_factors_beside_bfloat16(m, k, n, r, each_backend):  # noqa: F811
    """PEFT keeps the factors in float32, and their gradients are float32 too."""
    drawn = cpu.draw(m, k, n, r)
    half = {name: t.bfloat16() if name in ("x", "weight", "bias") else t.float() for name, t in drawn.items()}
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = rounding.expected(cpu.run, lora_linear_reference, half, grad, torch.bfloat16)
    for t in (half["x"], half["bias"], half["lora_a"], half["lora_b"]):
        t.requires_grad_()
    y = lora_linear(*(half[name] for name in cpu.NAMES), 0.7)
    y.backward(grad)
    assert half["lora_a"].grad.dtype == half["lora_b"].grad.dtype == torch.float32
    rounding.check({"y": y.detach()} | {name: half[name].grad for name in wanted if name != "y"}, wanted)


def draw(m: int, k: int, layers: list[tuple[int, int]], biased: bool, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """x and, for each (n, rank), the layer's tensors and the gradient of its output."""
    generator = torch.Generator().manual_seed(m + k)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    drawn = {"x": [randn(m, k)], "grads": [randn(m, n) for n, _ in layers]}
    drawn["weights"] = [randn(n, k) / max(k, 1) ** 0.5 for n, _ in layers]
    drawn["biases"] = [randn(n) if biased else None for n, _ in layers]
    drawn["lora_a"] = [randn(r, k) / max(k, 1) ** 0.5 for _, r in layers]
    return drawn | {"lora_b": [randn(n, r) / r**0.5 for n, r in layers]}


def definition(drawn: dict[str, list[Tensor]], scaling: list[float]) -> dict[str, list[Tensor]]:
    layers = zip(drawn["weights"], drawn["biases"], drawn["lora_a"], drawn["lora_b"], scaling, strict=True)
    layers = [[None if t is None else t.detach() for t in tensors] + [factor] for *tensors, factor in layers]
    x = drawn["x"][0].detach().requires_grad_()
    trained = [layer[2].requires_grad_() for layer in layers] + [layer[3].requires_grad_() for layer in layers]
    linear = torch.nn.functional.linear
    s = torch.cat([linear(x, layer[2]) for layer in layers], 1)
    y = [linear(x, w, bias) + factor * linear(linear(x, a), b) for w, bias, a, b, factor in layers]
    dx, *rest = torch.autograd.grad(y, [x, *trained], drawn["grads"])
    n = len(layers)
    return {"y": [t.detach() for t in y], "s": [s.detach()], "dx": [dx], "da": rest[:n], "db": rest[n:]}


def expected(drawn: dict[str, list[Tensor]], scaling: list[float]) -> dict[str, list[rounding.Expected]]:
    return rounding.expected(definition, drawn, scaling)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 7])  # of a narrow result each takes some rows
@pytest.mark.parametrize(
    ("m", "k", "layers"),
    [
        (4, 64, [(64, 16)]),
        (211, 66, [(30, 4)]),
        (300, 4200, [(40, 4)]),  # sums that are made in several passes
        (63, 1000, [(3072, 16), (3072, 64), (64, 4)]),  # and, backward, of several layers
        (63, 64, [(33, 4), (64, 5)]),  # odd sizes, which bfloat16's pairs do not take
    ],
)
def test_groups_on_the_cpu(m, k, layers, threads, each_backend):  # noqa: F811
    drawn, scaling = draw(m, k, layers, True, torch.bfloat16), [0.7, 2.0, 1.3][: len(layers)]
    x = drawn["x"][0].clone().requires_grad_()
    factors = [t.clone().requires_grad_() for t in (*drawn["lora_a"], *drawn["lora_b"])]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = lora_linear_group(
            x, drawn["weights"], drawn["biases"], factors[: len(layers)], factors[len(layers) :], scaling
        )
        dx, *rest = torch.autograd.grad(y, [x, *factors], drawn["grads"])
    finally:
        torch.set_num_threads(before)
    ours = {"y": [t.detach() for t in y], "dx": [dx], "da": rest[: len(layers)], "db": rest[len(layers) :]}
    wanted = expected(drawn, scaling)
    for name, tensors in ours.items():
        rounding.check(tensors, wanted[name])


def execute(
    library: ctypes.CDLL, drawn: dict[str, list[Tensor]], scaling: list[float], needs: str = "xab"
) -> dict[str, list[Tensor]]:
    with simt.Memory(library) as memory:
        held = {name: [None if t is None else memory.put(t) for t in tensors] for name, tensors in drawn.items()}
        x, dtype = held["x"][0], held["x"][0].dtype
        (m, k), sizes = x.shape, [b.shape for b in held["lora_b"]]
        out = {"y": [memory.empty(m, n, dtype=dtype) for n, _ in sizes]}
        out["s"] = [memory.empty(m, sum(r for _, r in sizes), dtype=dtype)]
        out["dx"] = [memory.empty(m, k, dtype=dtype)] if "x" in needs else []
        out["da"] = [memory.empty(r, k, dtype=dtype) for _, r in sizes] if "a" in needs else []
        out["db"] = [memory.empty(n, r, dtype=dtype) for n, r in sizes] if "b" in needs else []
        kind = (dtype.itemsize, dtype == torch.bfloat16)
        lists = [[ctypes.c_float(factor) for factor in scaling], *(list(column) for column in zip(*sizes, strict=True))]
        simt.call(
            library.run_forward, *kind, x, m, k, len(sizes), held["weights"], held["biases"], held["lora_a"],
            held["lora_b"], *lists, out["y"], out["s"][0],
        )  # fmt: skip
        simt.call(
            library.run_backward, *kind, held["grads"], x, out["s"][0], m, k, len(sizes), held["weights"],
            held["lora_a"], held["lora_b"], *lists, *(out["dx"] or [None]), out["da"] or None, out["db"] or None,
        )  # fmt: skip
        return {name: [t.clone() for t in tensors] for name, tensors in out.items()}


def compare(library: ctypes.CDLL, m: int, k: int, layers: list[tuple[int, int]], biased: bool, dtype: torch.dtype):
    drawn, scaling = draw(m, k, layers, biased, dtype), [0.7, 2.0, 1.3][: len(layers)]
    ours, wanted = execute(library, drawn, scaling), expected(drawn, scaling)
    assert ours.keys() == wanted.keys()
    for name, tensors in ours.items():
        rounding.check(tensors, wanted[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "k", "layers", "biased"),
    [
        (1, 64, [(64, 4)], True),
        (63, 200, [(136, 16)], False),
        (130, 63, [(63, 7)], True),  # nothing is aligned
        (33, 328, [(24, 128)], True),  # more rank than output
        (600, 72, [(40, 64)], False),  # the sums over rows are in parts
        (47, 96, [(160, 16), (32, 8), (31, 4)], True),
        (40, 64, [(64, 16), (64, 16)], False),
        (0, 64, [(64, 4), (8, 4)], True),
    ],
)
def test_cuda(library, m, k, layers, biased, dtype):
    library.simt_seed(m)
    compare(library, m, k, layers, biased, dtype)


@pytest.mark.slow
def test_many_block_rows_and_columns_and_steps(library):
    compare(library, 1100, 80, [(150, 8)], True, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_of_the_warps_gives_the_same_bits(library, dtype):
    drawn = draw(300, 72, [(72, 16), (40, 8)], True, dtype)
    found = []
    for seed in range(2):
        library.simt_seed(seed)
        found.append(execute(library, drawn, [0.7, 2.0]))
    assert all(torch.equal(a, b) for name in found[0] for a, b in zip(found[0][name], found[1][name], strict=True))


@pytest.mark.parametrize("needs", ["".join(c) for n in range(4) for c in itertools.combinations("xab", n)])
def test_any_of_the_gradients_alone(library, needs):
    drawn = draw(20, 32, [(24, 4), (16, 8)], False, torch.float32)
    everything, some = (execute(library, drawn, [0.7, 2.0], which) for which in ("xab", needs))
    for name in ("dx", "da", "db"):
        assert len(some[name]) == (len(everything[name]) if name[1] in needs else 0)
        assert all(torch.equal(a, b) for a, b in zip(some[name], everything[name], strict=False))


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_triton_in_its_interpreter(dtype, tmp_path):
    rows = interpreted("lora_linear_process", tmp_path, dtype)
    assert len(rows) == 49
    assert not [row for row in rows if not row["part"] <= 1]  # a NaN fails too
