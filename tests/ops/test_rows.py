"""csrc/vectors.h and the rows.h of ada_norm and qk_norm_rope compiled for every vector width; an installed library uses
the processor's widest."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops import test_ada_norm, test_qk_norm_rope
from tests.ops.test_resize import FLAGS, compile_for
from tests.rounding import check

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=FLAGS)
def library(request, tmp_path_factory):
    found = compile_for(
        request.param, Path(__file__).with_name("rows.cpp"), tmp_path_factory.mktemp("rows") / "rows.so"
    )
    assert found.vector_bytes() == request.param
    return found


def call(library: ctypes.CDLL, name: str, dtype: torch.dtype, *arguments: Tensor | int | None) -> None:
    function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
    function.restype = None
    function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 16, 37, 130])
def test_ada_norm_rows(library, width, dtype):
    case = (1, 5, width, 2, 1, 2)
    drawn = test_ada_norm.draw(case, "both", dtype)
    sizes = (5, width, 2)
    found = {name: torch.full_like(drawn["x"], float("nan")) for name in ("out", "norm", "dx", "dy")}
    inputs = [drawn[name] for name in ("x", "y", "gate", "weight", "bias")]
    call(library, "ada_norm", dtype, *sizes, *inputs, found["out"], found["norm"])
    grads = drawn["grad_out"], drawn["grad_norm"]
    call(library, "ada_norm_backward", dtype, *sizes, *grads, found["out"], *inputs[2:4], found["dx"], found["dy"])
    check(found, test_ada_norm.expected(drawn, 2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, channels", [(1, 2), (3, 10), (2, 16), (5, 38)])
def test_qk_norm_rope_rows(library, heads, channels, dtype):
    drawn = test_qk_norm_rope.draw((1, (4, 4), heads, channels), dtype)
    found = {}
    for name, x, weight, grad in zip(("q", "k"), drawn.xs, drawn.weights, drawn.grads, strict=True):
        for to, given in ((name, None), (f"d{name}", grad)):
            found[to] = torch.full_like(x, float("nan"))
            call(library, "qk_norm_rope", dtype, 4, x.shape[2], channels, x, weight, given, *drawn.rope, found[to])
    check(found, test_qk_norm_rope.expected(drawn))


def test_bfloat16_is_rounded_as_torch_does(library):
    """Ties, the largest numbers, infinities, subnormal numbers and NaN."""
    bits = torch.cat([torch.arange(0, 2**16) << 16 | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = bits.to(torch.int32).view(torch.float32)
    found = torch.empty(len(values), dtype=torch.bfloat16)
    library.to_bfloat16(len(values), ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(found.data_ptr()))
    expected = values.bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))
