"""What the GPU compilers make of every operator's kernels."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.static.tool import ARCHITECTURES, rows
from tests.kernels.interpreter import with_triton
from vlmteacher.ops.manifest import OPERATORS

with_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
# Triton's takes minutes for an operator
COMPILERS = {"triton": [with_triton, pytest.mark.slow(days=28)], "cuda": [with_nvcc, pytest.mark.slow]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(operator.name, backend, marks=marks)
        for operator in OPERATORS.values()
        for backend, marks in COMPILERS.items()
        if backend in operator.backends
    ],
)
def test_compiles_without_spills(name: str, backend: str, architecture: int) -> None:
    operator = OPERATORS[name]
    compiled = rows((backend,), name, [architecture])
    assert {row.architecture for row in compiled} == {architecture}
    assert len(compiled) >= operator.compiled[backend]
    assert not [row for row in compiled if row.spills]
    assert not [row for row in compiled if row.occupancy == 0 or row.occupancy < operator.occupancy]
