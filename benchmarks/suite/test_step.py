"""A whole optimisation step, ours and stock; see README.md here."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.presets import build
from benchmarks.step import OurLoop
from benchmarks.stock import StockLoop


@pytest.mark.parametrize("which", ["ours", "plain", "checkpointed"])
@pytest.mark.parametrize("preset", ["smoke", "tiny"])
def test_step(benchmark: Any, preset: str, which: Any) -> None:
    instance = build(preset)
    loop = OurLoop(instance) if which == "ours" else StockLoop(instance, which)
    benchmark.group = f"step, {preset}"
    benchmark.pedantic(loop.step, rounds=7, warmup_rounds=2)
