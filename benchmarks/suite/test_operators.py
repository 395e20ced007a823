"""Every operator, forward + backward: ours, and the sides that its benchmark compares it with; see README.md here."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from vlmteacher.ops.manifest import benchmark_modules

MODULES = {name: importlib.import_module(f"benchmarks.{name}") for name in benchmark_modules()}


@pytest.mark.parametrize(
    ("name", "case", "side"),
    [
        (name, case, side)
        for name, module in MODULES.items()
        for case in module.SUITE
        for side in getattr(module, "SIDES", ("ours", "stock"))
    ],
)
def test_operator(benchmark: Any, name: str, case: str, side: str) -> None:
    benchmark.group = f"{name}, {case}"
    benchmark(MODULES[name].SUITE[case](side))
