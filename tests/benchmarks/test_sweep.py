"""The benchmark of sweeps sends its stubs through the real driver."""

from __future__ import annotations

import pytest

from benchmarks import sweep
from vlmteacher.evaluation.workers import Alone


def test_every_stub_gets_a_row() -> None:
    before = sweep.sweep._work
    row = sweep.measure_scale(300, 7)
    assert (row["part"], row["instances"], row["workers"]) == ("scale", 300, 7)
    assert 0 < row["results_ms"] < row["driver_ms"] and 2000 < row["journal_bytes"] < 3000
    row = sweep.measure_workers("processes", Alone, 20)
    assert row["driver_ms"] > 0 and 0 < row["instances_per_second"] <= 1 / sweep.STUB_SECONDS
    assert sweep.sweep._work is before


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({"part": "scale", "driver_ms": 0.9}, True),
        ({"part": "ray", "driver_ms": 1.1}, False),
        ({"part": "throughput", "value": 1.7}, True),
        ({"part": "throughput", "value": 1.5}, False),
        ({"part": "overhead", "value": 0.02}, True),
        ({"part": "overhead", "value": 0.04}, False),
    ],
)
def test_bounds(row: dict[str, float], kept: bool) -> None:
    assert sweep.within(row) is kept
