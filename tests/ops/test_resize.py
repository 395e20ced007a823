"""csrc/patchify/resize.h compiled for every vector width; an installed library uses the processor's widest."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vlmteacher.ops.resize import Band, resize_matrix

FLAGS = {16: [], 32: ["-mavx2", "-mfma"], 64: ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma"]}
SIZES = [(33, 47, 16, 24), (16, 8, 36, 20), (9, 200, 64, 16), (1, 1, 4, 8), (40, 70, 19, 70), (64, 64, 129, 65)]


def compile_for(vector_bytes: int, source: Path, to: Path) -> ctypes.CDLL:
    """Compile `source` with vectors of `vector_bytes`; skips the test if compiler or processor lack them."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if any(flag.removeprefix("-m") not in cpu for flag in FLAGS[vector_bytes]):
        pytest.skip(f"this processor has no vectors of {vector_bytes} bytes")
    command = [compiler, "-std=c++20", "-O3", "-shared", "-fPIC", "-Wall", "-Werror", *FLAGS[vector_bytes]]
    subprocess.run([*command, str(source), "-o", str(to)], check=True)
    return ctypes.CDLL(str(to))


@pytest.fixture(scope="module", params=FLAGS)
def library(request, tmp_path_factory):
    found = compile_for(
        request.param, Path(__file__).with_name("resize.cpp"), tmp_path_factory.mktemp("resize") / "resize.so"
    )
    assert found.vector_bytes() == request.param
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_parts_of_a_plane(library, size, dtype, backward):
    height, width, new_height, new_width = size
    matrices = [resize_matrix(height, new_height), resize_matrix(width, new_width)]
    y, x = (m.T if backward else m for m in matrices)
    plane = torch.rand(y.shape[1], x.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run, c_type = (
        (library.resize_float, ctypes.c_float) if dtype == torch.float32 else (library.resize_double, ctypes.c_double)
    )
    bands = [Band(start, weight.to(dtype)) for start, weight in (Band.of(y), Band.of(x))]
    values = plane.to(dtype).contiguous()
    out = torch.full((len(y), len(x)), float("nan"), dtype=dtype)
    for begin in range(0, len(y), 20):  # more than the rows that are turned into columns together, and fewer
        end = min(begin + 20, len(y))
        tables = [
            argument
            for start, weight in bands
            for argument in (_pointer(start), _pointer(weight), len(start), weight.shape[1])
        ]
        run(_pointer(values), *tables, *plane.shape, begin, end, c_type(2), c_type(-0.5), _pointer(out[begin:]))
    exact = 2 * (y @ plane @ x.T) - 0.5
    assert (out.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
