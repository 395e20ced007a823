"""Triton's interpreter, for the tests of kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'vlmteacher[triton]'"
)


def interpreted(module: str, cache: Path, *arguments: str) -> list[Any]:
    """Run tests.kernels.`module` with Triton's interpreter, and parse the last line that it prints. In a process of its
    own, because Triton decides at import whether it interprets."""
    root = Path(__file__).parents[2]
    variables = os.environ | {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", f"tests.kernels.{module}", *arguments]
    done = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
