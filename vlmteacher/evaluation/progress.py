"""The progress of a sweep on standard error: a live table on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as Bar
from rich.text import Text

INTERVAL = 30.0  # seconds between lines
UNITS = ((1, "a second"), (60, "a minute"), (3600, "an hour"))


@dataclass
class Counts:
    """The instances of one method.

    Attributes:
        total: all that were asked for.
        finished: those with rows, `kept` of them from an earlier run.
        failed: those that failed at every attempt.
    """

    total: int
    kept: int
    finished: int = field(init=False)
    failed: int = 0
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None

    def __post_init__(self) -> None:
        self.finished = self.kept

    def add(self, failed: bool) -> None:
        if failed:
            self.failed += 1
        else:
            self.finished += 1

    def __str__(self) -> str:
        """How far it is: "37/200, 1 failed, 2.4 a minute, 1:08:20 left"."""
        elapsed = max((self.ended or time.monotonic()) - self.began, 1e-9)
        done = self.finished + self.failed - self.kept
        parts = [f"{self.finished}/{self.total}"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if done:
            left = self.total - self.finished - self.failed
            seconds, unit = next((one for one in UNITS if done / elapsed * one[0] >= 1), UNITS[-1])
            parts.append(f"{done / elapsed * seconds:.3g} {unit}")
            parts.append(f"{_clock(left * elapsed / done)} left" if left else f"in {_clock(elapsed)}")
        return ", ".join(parts)


class SweepProgress:
    """Shows finished and failed instances, rate and time left of every method.

    On a terminal a table, drawn twice a second, has a row for each method. Elsewhere, in a log file, there is a line
    when a method begins and ends, and one after an instance if the last line is `interval` seconds old.
    """

    def __init__(self, console: Console | None = None, interval: float = INTERVAL) -> None:
        self._console, self._interval = console or Console(stderr=True), interval
        self._live = self._console.file.isatty()  # `Console.is_terminal` is also true of logs, by FORCE_COLOR
        columns = (TextColumn("{task.description}"), BarColumn(), _State())
        self._table = Progress(*columns, console=self._console, refresh_per_second=2, disable=not self._live)
        self._printed = 0.0

    def __enter__(self) -> SweepProgress:
        self._table.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._table.stop()

    @contextmanager
    def method(self, name: str, total: int, kept: int) -> Iterator[Callable[[bool], None]]:
        """Show a method with `total` instances, `kept` of them from an earlier run; yield a function that counts one.

        Its argument says whether the instance failed.
        """
        counts = Counts(total, kept)
        bar = self._table.add_task(name, total=total, completed=kept, counts=counts)
        self._print(name, counts)

        def add(failed: bool) -> None:
            counts.add(failed)
            self._table.advance(bar)
            if time.monotonic() - self._printed >= self._interval:
                self._print(name, counts)

        try:
            yield add
        finally:
            counts.ended = time.monotonic()
            self._print(name, counts)

    def _print(self, name: str, counts: Counts) -> None:
        self._printed = time.monotonic()
        if not self._live:
            self._console.print(f"{name}: {counts}", highlight=False, markup=False, soft_wrap=True)


class _State(ProgressColumn):
    def render(self, task: Bar) -> Text:
        return Text(str(task.fields["counts"]))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
