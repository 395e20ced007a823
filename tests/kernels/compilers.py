"""Triton's interpreter and the GPU compilers, for the tests of kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.static.tool import ARCHITECTURES, Row, rows

with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'vlmteacher[triton]'"
)
with_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")


def with_compilers(test: Any) -> Any:
    """For both compilers and both architectures. Triton's takes minutes for an operator's kernels."""
    backends = [pytest.param("triton", marks=[with_triton, pytest.mark.slow]), pytest.param("cuda", marks=with_nvcc)]
    return pytest.mark.parametrize("backend", backends)(pytest.mark.parametrize("architecture", ARCHITECTURES)(test))


def interpreted(module: str, cache: Path, *arguments: str) -> list[Any]:
    """What tests.kernels.`module` prints as its last line. A process of its own: Triton decides at import whether it
    interprets."""
    root = Path(__file__).parents[2]
    variables = os.environ | {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", f"tests.kernels.{module}", *arguments]
    done = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def compiled(backend: str, operator: str, architecture: int) -> list[Row]:
    """The compile table's rows of an operator; none spills, and a block of each fits a multiprocessor."""
    found = rows((backend,), operator, [architecture])
    assert {row.architecture for row in found} == {architecture}
    assert not [row for row in found if row.spills]
    assert min(row.occupancy for row in found) > 0
    return found
