"""The slow tests' share of a day: each runs on one day of seven, all when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slow import is_of_day

FILE = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("i", range(40))
def test_long(i): ...

def test_short(): ...
"""
pytest_plugins = ["pytester"]


def test_every_slow_test_runs_once_a_week() -> None:
    days = [[i for i in range(200) if is_of_day(f"tests/test_{i}.py::test", day)] for day in range(7)]
    assert sorted(i for day in days for i in day) == list(range(200)) and all(len(day) > 10 for day in days)


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
    assert len(every) == 41
    days = [collected("--slow-day", str(day)) for day in range(7)]
    assert all(short in day and len(day) < 41 for day in days) and set.union(*days) == every
    assert collected() in days
    assert collected("-m", "slow") == every - {short} and collected("-m", "not slow") == {short}
    assert collected("test_it.py::test_long") == every - {short}  # by name
