"""Every operator has all of its files, and no operator's file stands outside of the manifest."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from vlmteacher.ops.manifest import OPERATORS, Operator, benchmark_modules

ROOT = Path(__file__).parents[2]
SHARED = {  # what operators share
    "vlmteacher/ops/*.py": {
        "__init__",
        "backends",
        "bits",
        "checks",
        "decoder_cpu",
        "decoder_plan",
        "gpus",
        "linear",
        "manifest",
        "processors",
        "resize",
        "sdpa",
    },
    "kernels/*.py": {"__init__", "products"},
    "tests/kernels/simt/*.cpp": {"examples", "simt"},
}


def missing(operator: Operator, root: Path = ROOT) -> list[str]:
    return [file for file in operator.files() if not (root / file).is_file()]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_has_all_files(operator: Operator) -> None:
    assert missing(operator) == []


def test_a_missing_file_is_named() -> None:
    assert "csrc/absent/plan.cuh" in missing(Operator("absent", ("absent",)))


@pytest.mark.parametrize("pattern", SHARED)
def test_no_file_outside_of_the_manifest(pattern: str) -> None:
    """A helper that operators share is listed in `SHARED`."""
    assert {path.stem for path in ROOT.glob(pattern)} - SHARED[pattern] <= OPERATORS.keys()


def test_no_folder_outside_of_the_manifest() -> None:
    compiled = {operator.name for operator in OPERATORS.values() if {"cpp", "cuda"} & {*operator.backends}}
    assert {path.parent.name for path in ROOT.glob("csrc/*/*")} == compiled


@pytest.mark.parametrize("name", benchmark_modules())
def test_benchmark_has_cases_for_the_suite(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").SUITE


def test_the_manifest_does_not_load_torch() -> None:
    code = "import sys, vlmteacher.ops.manifest; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_compile_table_lists_every_gpu_operator() -> None:
    """Where this fails: `python -m benchmarks.static --write`."""
    cells = [line.split(" | ")[:2] for line in (ROOT / "benchmarks/static/table.md").read_text().splitlines()]
    listed = {(name.removeprefix("| "), backend) for name, *rest in cells if name[:2] == "| " for backend in rest}
    expected = {(operator.name, backend) for operator in OPERATORS.values() for backend in operator.compiled}
    assert expected <= listed
