"""The Triton kernels of patchify without a GPU: their numbers in the interpreter, their code compiled ahead of time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'vlmteacher[triton]'"
)


def rows_of(mode: str, tmp_path: Path, **environment: str) -> list[dict]:
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), **environment}
    command = [sys.executable, str(ROOT / "tests/kernels/patchify_process.py"), mode]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_interpreted_against_float64(tmp_path):
    rows = rows_of("interpret", tmp_path, TRITON_INTERPRET="1")
    assert len(rows) == 30
    # written so that a NaN, left by an element that no program wrote, fails too
    assert not [row for row in rows if not row["error"] <= row["allowed"]]


def test_compiles_for_ampere_and_hopper_without_spills(tmp_path):
    rows = rows_of("compile", tmp_path)
    assert len(rows) == 4
    assert not [row for row in rows if row["stack_bytes"] or row["registers"] > 128], rows
