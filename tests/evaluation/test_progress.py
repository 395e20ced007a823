"""The progress of a sweep: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from vlmteacher.evaluation import progress
from vlmteacher.evaluation.progress import Counts, SweepProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("kept", "finished", "failed", "elapsed", "text"),
    [
        (0, 0, 0, 9, "0/200"),
        (40, 0, 0, 9, "40/200"),
        (40, 20, 0, 10, "60/200, 2 a second, 0:01:10 left"),
        (0, 30, 2, 1920, "30/200, 2 failed, 1 a minute, 2:48:00 left"),
        (0, 1, 0, 36000, "1/200, 0.1 an hour, 1990:00:00 left"),
        (100, 99, 1, 25, "199/200, 1 failed, 4 a second, in 0:00:25"),
    ],
)
def test_counts(kept: int, finished: int, failed: int, elapsed: float, text: str) -> None:
    counts = Counts(200, kept, began=time.monotonic() - elapsed)
    counts.ended = counts.began + elapsed
    for failure in [False] * finished + [True] * failed:
        counts.add(failure)
    assert str(counts) == text


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock = io.StringIO(), iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("FORCE_COLOR", "1")
    with SweepProgress(Console(file=log), interval=100) as shown, shown.method("teacher@[1]", 50, 10) as add:
        for k in range(40):
            add(k == 7)
    lines = log.getvalue().splitlines()
    assert lines[0] == "teacher@[1]: 10/50" and lines[-1].startswith("teacher@[1]: 49/50, 1 failed")
    assert 4 <= len(lines) <= 12 and not set(log.getvalue()) & set("\r\x1b")


def test_a_terminal_gets_a_table() -> None:
    terminal = Terminal()
    with SweepProgress(Console(file=terminal, force_terminal=True, width=100)) as shown:
        with shown.method("base", 2, 0) as add:
            add(False)
            add(False)
        with shown.method("teacher", 3, 1) as add:
            add(True)
    table = terminal.getvalue().split("base")[-1]
    assert "2/2" in table and "teacher" in table and "1/3, 1 failed" in table
