"""The progress of long work: events, and who takes them: a console, tqdm's bar, JSON lines, trackers, an application.

Work emits an `Event` when it begins, after each step and when it ends (`reporting`). `listening` says who takes them;
without it a `Display` on standard error does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO, TypeAlias, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

T = TypeVar("T")
INTERVAL, SHORT = 30.0, 2.0  # seconds between the lines of a log; of work of few steps
FEW = 100  # steps
NUMBERS = 3  # of a step that a line shows
SHOWN_ELSEWHERE = ("step", "seconds", "memory", "grad_norm", "learning_rate", "done", "index", "noise", "updates")

# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class Event:
    """Something that long work reports.

    kind: "begin"; "step", after each step; "end", also where an error ends the work.
    work: its name. unit: what one step is: step, instance, video, file.
    done: finished steps, `kept` of them from an earlier run. failed: steps that failed. total: steps in all; None:
    unknown. elapsed: seconds since the beginning.
    values: at the beginning the settings, if any; after a step what was measured: "loss", "p_yes" (goal first),
    "guards", "memory" (bytes: see `placement.used_memory`), ...
    """

    kind: Literal["begin", "step", "end"]
    work: str
    unit: str = "step"
    done: int = 0
    total: int | None = None
    failed: int = 0
    kept: int = 0
    elapsed: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The event as an entry of JSON lines: `values` beside the other entries, settings by themselves."""
        names = ("work", "unit", "done", "total", "failed")
        entries = {"event": self.kind, **{name: getattr(self, name) for name in names}}
        entries["elapsed"] = round(self.elapsed, 3)
        if self.kind == "begin":
            return {**entries, "settings": dict(self.values)}
        return {**entries, **{name: value for name, value in self.values.items() if name not in entries}}


Listener: TypeAlias = Callable[[Event], object]
_LISTENERS: ContextVar[tuple[Listener, ...] | None] = ContextVar("listeners", default=None)


def listeners() -> tuple[Listener, ...] | None:
    """Those who take the events of this context; None where nobody has said."""
    return _LISTENERS.get()


@contextmanager
def listening(*takers: Listener) -> Iterator[None]:
    """Give the events of the block to `takers` alone, each a function of an `Event`; to nobody, where there is none."""
    token = _LISTENERS.set(takers)
    try:
        yield
    finally:
        _LISTENERS.reset(token)


@contextmanager
def also(*takers: Listener) -> Iterator[None]:
    """Give the events of the block to `takers` too."""
    before = listeners()
    with listening(*((Display(),) if before is None else before), *takers):
        yield


class Reporter:
    """Reports the events of one piece of work; a call says that a step is finished."""

    def __init__(self, name: str, total: int | None, done: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.kept = done
        self.failed = 0
        self._began = time.monotonic()
        takers = listeners()
        self._listeners = (Display(),) if takers is None else takers

    def __call__(self, values: Mapping[str, Any] | None = None, *, count: int = 1, failed: bool = False) -> None:
        """Report `count` further steps, or a failed one, with what was measured."""
        if failed:
            self.failed += count
        else:
            self.done += count
        self.emit("step", values or {})

    def emit(self, kind: Literal["begin", "step", "end"], values: Mapping[str, Any]) -> None:
        elapsed = time.monotonic() - self._began
        event = Event(kind, self.name, self.unit, self.done, self.total, self.failed, self.kept, elapsed, values)
        for listener in self._listeners:
            listener(event)


@contextmanager
def reporting(
    name: str,
    total: int | None = None,
    *,
    done: int = 0,
    unit: str = "step",
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Reporter]:
    """Report the work of the block. total: its steps, `done` of them from an earlier run.

    settings: what a tracker keeps as the configuration of the run; work without settings is not tracked.
    """
    begun = Reporter(name, total, done, unit)
    begun.emit("begin", settings or {})
    try:
        yield begun
    finally:
        begun.emit("end", {})


def track(items: Sequence[T], name: str, unit: str) -> Iterable[T]:
    """The items, each of which is a step of the work."""
    with reporting(name, len(items), unit=unit) as advance:
        for item in items:
            yield item
            advance()


# ---------------------------------------------------------------- console


class Display:
    """Shows the work on standard error.

    On a terminal, of any width, a bar, seconds per step, time left, memory, loss and P(Yes), drawn twice a second
    while the work goes on, and at its end one line. Elsewhere, in a log file, lines: when work begins and ends, and
    between them where the last one is `interval` seconds old (None: 2 s for work of up to 100 steps, 30 s for more).
    NO_COLOR takes the colours away, TERM=dumb the drawing.

    loads: show the loading of models in a log too. title: the name of the work instead of its own.
    """

    def __init__(
        self,
        console: Console | None = None,
        interval: float | None = None,
        loads: bool = False,
        title: str | None = None,
        drawn: bool = True,
    ) -> None:
        self._console, self._interval, self._title = console or Console(stderr=True), interval, title
        # `Console.is_terminal` is also true of logs, by FORCE_COLOR
        self._drawn = drawn and is_terminal(self._console.file) and not self._console.is_dumb_terminal
        self._loads = loads or is_terminal(self._console.file)
        self._works: dict[str, _Shown] = {}
        self._live: Live | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, event: Event) -> None:
        if event.total is None:
            if self._loads and event.kind == "begin":
                self._print(f"{event.work} ...")
            elif self._loads and event.elapsed >= 1:
                self._print(f"{event.work}: {event.elapsed:.1f} s")
            return
        shown = self._works.setdefault(event.work, _Shown(event, self._title or event.work))
        shown.event = event
        if event.kind == "step" and event.values:
            shown.values = event.values
        if event.kind == "end":
            del self._works[event.work]
            if not self._works:
                self._stop()
            self._print(shown.line())
        elif self._drawn:
            self._start()
        elif event.kind == "begin" or (  # the end has a line of its own
            event.done + event.failed < event.total and time.monotonic() - shown.printed >= self._pause(event.total)
        ):
            shown.printed = time.monotonic()
            self._print(shown.line())

    def _pause(self, total: int) -> float:
        if self._interval is not None:
            return self._interval
        return SHORT if total <= FEW else INTERVAL

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _start(self) -> None:
        if self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=lambda: _Stack(list(self._works.values())),
                refresh_per_second=2,
                transient=True,
                redirect_stdout=False,  # it may be a pipe of JSON lines
            )
            self._live.start()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


@dataclass
class _Shown:
    """Work as the display shows it: its last event, and what its last step measured."""

    event: Event
    title: str
    values: Mapping[str, Any] = field(default_factory=dict)
    printed: float = -math.inf
    began: float = field(default_factory=time.monotonic)
    spinner: Spinner = field(default_factory=lambda: Spinner("dots"))

    def count(self) -> str:
        return f"{self.title}: {self.event.done}/{self.event.total}"

    def line(self) -> str:
        """The state in one line: "solve: 12/60, 1.32 s/step, 0:01:03 left, 1.2 GB, loss 0.412, P(Yes) 0.91 0.45"."""
        return ", ".join([self.count(), *self.parts()])

    def parts(self) -> list[str]:
        event, parts = self.event, []
        assert event.total is not None
        if event.failed:
            parts.append(f"{event.failed} failed")
        if steps := event.done + event.failed - event.kept:
            each, left = event.elapsed / steps, event.total - event.done - event.failed
            parts.append(f"{each:.3g} s/{event.unit}")
            going = left > 0 and event.kind != "end"
            parts.append(f"{clock(left * each)} left" if going else f"in {clock(event.elapsed)}")
        return parts + summary(self.values)


class _Stack:
    """Works below each other."""

    def __init__(self, works: list[_Shown]) -> None:
        self._works = works

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for shown in self._works:
            count, event = shown.count(), shown.event
            row: list[Any] = [shown.spinner, Text(count, no_wrap=True, overflow="crop")]
            room = options.max_width - len(count) - 4
            if room >= 8:
                row.append(ProgressBar(event.total, event.done + event.failed, width=min(room, 40)))
            grid = Table.grid(padding=(0, 1, 0, 0))
            grid.add_row(*row)
            yield grid
            yield Text(
                "  " + ", ".join([f"for {clock(time.monotonic() - shown.began)}", *shown.parts()]), overflow="fold"
            )


def summary(values: Mapping[str, Any]) -> list[str]:
    """What a line says of a step: the memory, P(Yes) and up to `NUMBERS` numbers."""
    parts = []
    if "memory" in values:
        parts.append(f"{values['memory'] / 1e9:.3g} GB")
    numbers = ((n, v) for n, v in values.items() if isinstance(v, float) and n not in SHOWN_ELSEWHERE)
    parts += [f"{name} {value:.3g}" for (name, value), _ in zip(numbers, range(NUMBERS), strict=False)]
    if p_yes := values.get("p_yes"):
        parts.append(f"P(Yes) {' '.join(f'{p:.2f}' for p in p_yes)}")
    return parts


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def is_terminal(file: Any) -> bool:
    return bool(getattr(file, "isatty", lambda: False)())


class Bar:
    """Shows the work by tqdm, in a notebook by its widget. keywords: of tqdm."""

    def __init__(self, keywords: Mapping[str, Any]) -> None:
        self._keywords = dict(keywords)
        self._bars: dict[str, tqdm[Any]] = {}

    def __call__(self, event: Event) -> None:
        if event.total is None:
            return
        if event.kind == "begin":
            own = {"desc": event.work, "total": event.total, "initial": event.done, "unit": event.unit}
            self._bars[event.work] = tqdm(**{**own, **self._keywords})
        bar = self._bars[event.work]
        if event.values and event.kind == "step":
            bar.set_postfix_str(", ".join(summary(event.values)), refresh=False)
        bar.update(event.done + event.failed - bar.n)
        if event.kind == "end":
            self._bars.pop(event.work).close()


def bar(keywords: Mapping[str, Any]) -> Listener:
    """tqdm's bar with these keywords on a terminal and in a notebook; lines in a log, or nothing by `disable`."""
    if keywords.get("disable"):
        return lambda event: None
    console = Console(stderr=True)
    if "file" in keywords or console.is_jupyter or is_terminal(console.file):
        return Bar(keywords)
    return Display(console, title=keywords.get("desc"))


# ---------------------------------------------------------------- JSON lines


class JsonLines:
    """Writes each event as a line of JSON. A reader that has gone stops the lines, not the work."""

    def __init__(self, file: TextIO) -> None:
        self._file: TextIO | None = file

    def __call__(self, event: Event) -> None:
        self.write(event.to_dict())

    def write(self, entries: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(_plain(entries), ensure_ascii=False, default=str) + "\n")
            self._file.flush()
        except BrokenPipeError:
            self._file = None


def _plain(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
