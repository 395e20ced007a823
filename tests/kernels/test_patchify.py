"""The GPU kernels of patchify without a GPU: Triton's in its interpreter, the CUDA source executed on the CPU, each
against the definition in float64; and what the GPU compilers make of them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.static.tool import rows as compiled_rows
from vlmteacher.ops.patchify import patchify_reference

MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
DTYPES = [(d, d) for d in (torch.float32, torch.float16, torch.bfloat16)]
DTYPES += [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
CASES = [  # frames, height, width, patch, temporal patch, merge, and the size they are resized to
    (4, 16, 32, 4, 2, 2, (16, 32)),  # none: the frames' own
    (5, 16, 8, 2, 2, 2, (16, 8)),
    (1, 28, 14, 14, 2, 1, (28, 14)),
    (7, 12, 24, 2, 4, 3, (12, 24)),
    (3, 16, 32, 8, 1, 2, (16, 32)),
    (3, 33, 47, 4, 2, 2, (16, 24)),  # smaller, odd
    (5, 16, 8, 2, 2, 2, (36, 20)),  # larger
    (2, 9, 200, 8, 2, 2, (64, 16)),
    (1, 1, 1, 2, 2, 2, (4, 8)),
    (2, 13, 21, 1, 1, 1, (1, 2)),
    (3, 40, 72, 28, 1, 1, (28, 28)),  # the patch is the frame
    (1, 45, 600, 5, 1, 1, (40, 70)),  # more than one block of a kernel in every direction
]


def draw(case: tuple, dtype: torch.dtype, out: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, int, int], list[int]]:
    """Strided frames of `dtype`, the gradient of their rows of `out`, the patch sizes, the size after the resize."""
    t, height, width, *args, size = case
    generator = torch.Generator().manual_seed(t * height + width)
    frames = torch.rand(t, 3, width, height, generator=generator).to(dtype).transpose(2, 3)
    shape = patchify_reference(frames.double(), *args, MEAN, STD, size).shape
    return frames, torch.randn(shape, generator=generator).to(out), tuple(args), list(size)


triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'vlmteacher[triton]'"
)


@triton
def test_triton_in_its_interpreter(tmp_path):
    root = Path(__file__).parents[2]
    variables = os.environ | {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.patchify_process"]
    done = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 2 * len(CASES) * len(DTYPES)
    # written so that a NaN, left by an element that no program wrote, fails too
    assert not [row for row in rows if not row["error"] <= row["allowed"]]


@pytest.mark.parametrize(
    ("backend", "kernels"),
    [
        pytest.param("triton", 5, marks=triton),
        pytest.param("cuda", 1, marks=pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")),
    ],
)
def test_compiles_for_ampere_and_hopper_without_spills(backend, kernels):
    rows = compiled_rows((backend,), "patchify")
    assert {row.architecture for row in rows} == {80, 90} and len(rows) >= 2 * kernels
    assert not [row for row in rows if row.spills or row.occupancy < 0.5], rows
