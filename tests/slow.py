"""Which tests marked `slow` run: pytest's hooks, which conftest.py takes over.

A test marked `slow` runs on one day of seven, one marked `slow(days=28)` on one of 28.
"""

from __future__ import annotations

from datetime import date
from zlib import crc32

import pytest

DAYS = 7
LONGEST = 28  # a multiple of every number of days


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("slow tests")
    group.addoption("--slow", choices=("today", "all"), default="today", help="which tests marked slow run (today)")
    group.addoption("--slow-day", type=int, help=f"the day of {LONGEST} whose slow tests run, from 0 (today)")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.slow_day is None:  # handed on to pytest-xdist's processes, which must not differ at midnight
        config.option.slow_day = date.today().toordinal() % LONGEST


def pytest_report_header(config: pytest.Config) -> str:
    chosen = "all" if config.option.slow == "all" else f"those of --slow-day={config.option.slow_day} (--slow=all: all)"
    return f"slow tests: {chosen}"


def is_of_day(test: str, day: int, days: int = DAYS) -> bool:
    """Whether the slow test of this id, which runs on one of `days` days, runs on this one."""
    return crc32(test.encode()) % days == day % days


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow tests of other days, unless slow ones were asked for by --slow=all, by -m or by name."""
    named = any("::" in argument for argument in config.args)
    if named or config.option.slow == "all" or "slow" in config.option.markexpr:
        return
    day = config.option.slow_day
    slow = {item: marker for item in items if (marker := item.get_closest_marker("slow"))}
    others = {item for item, marker in slow.items() if not is_of_day(item.nodeid, day, marker.kwargs.get("days", DAYS))}
    config.hook.pytest_deselected(items=list(others))
    items[:] = [item for item in items if item not in others]
