"""The GPU kernels of ada_norm against the definition in float64: Triton's in its interpreter,
the CUDA source executed on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.kernels import simt
from tests.kernels.interpreter import interpreted, with_triton
from tests.ops.test_ada_norm import FORMS, draw, expected
from tests.rounding import check

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [  # items, tokens, width, first, batches and rows of a table
    (1, 5, 64, 2, 1, 2),
    (2, 3, 33, 1, 2, 2),  # nothing is aligned
    (3, 2, 520, 0, 3, 1),
    (2, 2, 6, 2, 1, 2),  # less than a warp; every token is a first one
    (1, 3, 1544, 3, 1, 1),
    (1, 0, 16, 0, 1, 2),
]


def execute(library: ctypes.CDLL, drawn: dict[str, Tensor | None], form: str, case: tuple) -> dict[str, Tensor]:
    x = drawn["x"]
    kind = (x.dtype.itemsize, x.dtype == torch.bfloat16)
    sizes = list(case)
    eps = ctypes.c_float(1e-6)
    with simt.Memory(library) as memory:
        own = {name: None if t is None else memory.put(t) for name, t in drawn.items()}
        made = {name: memory.empty(*x.shape, dtype=x.dtype) for name in ("out", "norm", "dx", "dy")}
        out, norm = (made[n] if drawn[of] is not None else None for n, of in (("out", "y"), ("norm", "weight")))
        simt.call(
            library.run_forward, *kind, sizes, eps, *(own[n] for n in ("x", "y", "gate", "weight", "bias")), out, norm
        )
        grads = own["grad_out"], own["grad_norm"]
        kept = own["x"] if out is None else out
        dx, dy = made["dx"], made["dy"] if drawn["gate"] is not None else None
        simt.call(library.run_backward, *kind, sizes, eps, *grads, kept, own["gate"], own["weight"], dx, dy)
        found = {"out": out, "norm": norm, "dx": dx, "dy": dy}
        return {name: t.clone() for name, t in found.items() if t is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda(library, case, form, dtype):
    library.simt_seed(case[2])
    drawn = draw(case, form, dtype)
    check(execute(library, drawn, form, case), expected(drawn, case[3]))


def test_every_order_of_the_warps_gives_the_same_bits(library):
    found = []
    for seed in range(2):
        library.simt_seed(seed)
        found.append(execute(library, draw(CASES[-2], "both", torch.float32), "both", CASES[-2]))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_wider_row_than_a_block_holds_is_refused(library):
    case = (1, 1, 8200, 0, 1, 1)
    with pytest.raises(simt.Fault, match="8200 channels are more than 8192"):
        execute(library, draw(case, "norm", torch.float32), "norm", case)


@pytest.mark.slow
@with_triton
def test_triton_in_its_interpreter(tmp_path):
    rows = interpreted("ada_norm_process", tmp_path)
    assert len(rows) == len(CASES) * len(FORMS) * 2
    assert not [row for row in rows if not row["part"] <= 1]  # a NaN fails too
