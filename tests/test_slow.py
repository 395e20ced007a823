"""The slow tests' share of a day: each runs on one day of seven or of 28, all when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slow import DAYS, LONGEST, is_of_day

FILE = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("i", range(40))
def test_long(i): ...

@pytest.mark.slow(days=28)
@pytest.mark.parametrize("i", range(60))
def test_rare(i): ...

def test_short(): ...
"""
pytest_plugins = ["pytester"]


@pytest.mark.parametrize("period", [7, 28])
def test_every_slow_test_runs_once_in_its_days(period: int) -> None:
    days = [[i for i in range(900) if is_of_day(f"tests/test_{i}.py::test", day, period)] for day in range(period)]
    assert sorted(i for day in days for i in day) == list(range(900)) and all(len(day) > 10 for day in days)


@pytest.fixture
def collected(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """The ids that pytest collects from that file with these arguments."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest(Path(__file__).with_name("slow.py").read_text())
    pytester.makepyfile(test_it=FILE)

    def run(*arguments: str) -> set[str]:
        result = pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:cacheprovider", *arguments)
        return {line for line in result.outlines if "::" in line}

    return run


def test_selection(collected: Callable[..., set[str]]) -> None:
    every, short = collected("--slow=all"), "test_it.py::test_short"
    assert len(every) == 101
    days = [collected("--slow-day", str(day)) for day in range(LONGEST)]
    assert all(short in day and len(day) < 41 for day in days) and set.union(*days) == every
    weeks = [set().union(*days[first : first + DAYS]) for first in range(0, LONGEST, DAYS)]
    assert all(len([test for test in week if "long" in test]) == 40 for week in weeks)
    assert collected() in days
    assert collected("-m", "slow") == every - {short} and collected("-m", "not slow") == {short}
    assert collected("test_it.py::test_long") == {test for test in every if "long" in test}  # by name
