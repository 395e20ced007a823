"""The GPU kernels of qk_norm_rope against the definition in float64: Triton's in its interpreter,
the CUDA source executed on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.kernels import simt
from tests.kernels.interpreter import interpreted, with_triton
from tests.ops.test_qk_norm_rope import Drawn, draw, expected
from tests.rounding import check

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [  # as in tests/ops/test_qk_norm_rope.py
    (2, (5, 5), 2, 16),
    (1, (3, 3), 3, 10),  # nothing is aligned
    (2, (2, 5), 3, 22),
    (1, (1, 1), 1, 2),
    (1, (2, 2), 12, 128),  # several warps
    (1, (0, 0), 2, 8),
]


def execute(library: ctypes.CDLL, drawn: Drawn) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with simt.Memory(library) as memory:
        tables = [memory.put(t) for t in drawn.rope] if drawn.rope else [None, None]
        for name, x, weight, grad in zip(("q", "k"), drawn.xs, drawn.weights, drawn.grads, strict=True):
            kind = (x.dtype.itemsize, x.dtype == torch.bfloat16)
            sizes = [*x.shape, x.shape[2] // drawn.heads // 2]
            own = [memory.put(t) for t in (x, weight, grad)]
            y, dx = (memory.empty(*x.shape, dtype=x.dtype) for _ in range(2))
            simt.call(library.run, *kind, sizes, ctypes.c_float(1e-6), *own[:2], None, *tables, y)
            simt.call(library.run, *kind, sizes, ctypes.c_float(1e-6), *own, *tables, dx)
            found |= {name: y.clone(), f"d{name}": dx.clone()}
    return {name: found[name] for name in ("q", "k", "dq", "dk")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda(library, case, dtype):
    library.simt_seed(case[3])
    drawn = draw(case, dtype)
    check(execute(library, drawn), expected(drawn))


def test_every_order_of_the_warps_gives_the_same_bits(library):
    found = []
    for seed in range(2):
        library.simt_seed(seed)
        found.append(execute(library, draw(CASES[-2], torch.float32)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
@with_triton
def test_triton_in_its_interpreter(tmp_path):
    rows = interpreted("qk_norm_rope_process", tmp_path)
    assert len(rows) == 2 * len(CASES)
    assert not [row for row in rows if not row["part"] <= 1]  # a NaN fails too
