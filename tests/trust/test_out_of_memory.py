"""A step of the optimisation in which memory runs out: see full_memory.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trust.report import count
from vlmteacher.optimization.out_of_memory import is_out_of_memory

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler, and Linux")
    found = tmp_path_factory.mktemp("full_memory") / "full_memory.so"
    source = Path(__file__).with_name("full_memory.cpp")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", found, source, "-ldl"], check=True)
    return found


def sweep(library: Path, models: dict[str, str], trials: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.trust.full_memory", json.dumps(models), str(trials)]
    variables = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"exit status {done.returncode} in {last}: {done.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(last[0])
    outcomes = found["outcomes"]
    assert outcomes["a rung"] and outcomes["OutOfMemory"]
    count("a step of which an allocation fails, or all from one on", sum(outcomes.values()), json.dumps(outcomes))
    return found


@pytest.mark.slow
def test_a_few_allocations_of_a_step(library: Path, models: dict[str, str]) -> None:
    found = sweep(library, models, 8)
    assert min(found["allocations"].values()) > 500  # of tensors and operators, all of which can fail


@pytest.mark.slow
def test_many_allocations_of_a_step(library: Path, models: dict[str, str]) -> None:
    sweep(library, models, 400)


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8.",
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.00 GiB",
        "CUDA error: out of memory",
        "std::bad_alloc",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_every_allocators_words_are_known(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(ValueError(text))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_an_update_without_room_changes_nothing(make_loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop()
    loop.step()
    before, failures = loop.state_dict(), [1]
    square_root = torch.Tensor.sqrt

    def full(tensor: torch.Tensor) -> torch.Tensor:
        """AdamW's, whose second fails."""
        failures[0] -= 1
        if failures[0] < 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return square_root(tensor)

    evaluate = loop.engine.evaluate
    monkeypatch.setattr(
        loop.engine, "evaluate", lambda step: (evaluate(step), monkeypatch.setattr(torch.Tensor, "sqrt", full))[0]
    )
    with pytest.raises(Exception, match="does not fit in memory"):
        loop.step()
    monkeypatch.setattr(torch.Tensor, "sqrt", square_root)
    after = loop.state_dict()
    assert all(torch.equal(value, after["lora"][name]) for name, value in before["lora"].items())
    states = zip(before["optimizer"]["state"].values(), after["optimizer"]["state"].values(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in states for key in a)
    loop.close()
