"""Progress: drawn on a terminal of any width, lines in a log, lines of JSON for programs."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from vlmteacher import progress
from vlmteacher.progress import Bar, Display, Event, JsonLines, also, bar, listening, reporting, track

STEP = {"loss": 0.41234, "p_yes": [0.914, 0.5, 0.25, 0.999], "grad_norm": 1.0, "memory": 1_230_000_000, "seconds": 9.9}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(width: int = 100, **console: object) -> tuple[Terminal, Display]:
    terminal = Terminal()
    options = {"force_terminal": True, "color_system": "truecolor", "width": width, **console}
    return terminal, Display(Console(file=terminal, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Event("step", "w", total=200), "w: 0/200"),
        (Event("step", "w", total=200, done=40, kept=40), "w: 40/200"),
        (Event("step", "w", total=200, done=60, kept=40, elapsed=10), "w: 60/200, 0.5 s/step, 0:01:10 left"),
        (
            Event("step", "w", "instance", total=200, done=30, failed=2, elapsed=1920),
            "w: 30/200, 2 failed, 60 s/instance, 2:48:00 left",
        ),
        (Event("end", "w", total=200, done=20, elapsed=25), "w: 20/200, 1.25 s/step, in 0:00:25"),
    ],
)
def test_the_state_in_words(event: Event, text: str) -> None:
    assert progress._Shown(event, "w").line() == text


def test_what_a_step_measured() -> None:
    assert progress.summary(STEP) == ["1.23 GB", "loss 0.412", "P(Yes) 0.91 0.50 0.25 1.00"]
    assert progress.summary({"flow": 1.5, "a": 2.0, "b": 3.0, "c": 4.0}) == ["flow 1.5", "a 2", "b 3"]


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock = io.StringIO(), iter(range(0, 10000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("FORCE_COLOR", "1")
    with listening(Display(Console(file=log), interval=100)), reporting("teacher", 50, done=10) as advance:
        for k in range(40):
            advance(STEP, failed=k == 7)
    lines = log.getvalue().splitlines()
    assert lines[0] == "teacher: 10/50" and lines[-1].startswith("teacher: 49/50, 1 failed")
    assert "loss 0.412, P(Yes) 0.91" in lines[-1]
    assert 4 <= len(lines) <= 14 and len({*lines}) == len(lines) and not set(log.getvalue()) & set("\r\x1b")


@pytest.mark.parametrize("width", [100, 40, 12])
def test_a_terminal_of_any_width(width: int) -> None:
    terminal, display = drawn(width)
    with listening(display), reporting("solve", 60) as advance:
        advance(STEP)
        assert display._live is not None
        display._live.refresh()
    assert display._live is None
    frames, _, last = terminal.getvalue().rpartition("\x1b[?25h")
    rows = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", row) for row in re.split(r"[\r\n]+", frames)]
    assert max(map(len, rows)) <= width and any("solve:" in row for row in rows)
    if width > 12:
        assert any("s/step" in row for row in rows) and any("\u2501" in row for row in rows)
    assert last.lstrip("\r").startswith("solve: 1/60") and "P(Yes) 0.91" in last


def test_an_error_ends_the_drawing() -> None:
    terminal, display = drawn()
    with pytest.raises(RuntimeError), listening(display), reporting("solve", 60) as advance:
        advance(STEP)
        raise RuntimeError
    assert display._live is None and terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is back
    assert "in 0:00:00" in terminal.getvalue() and "left" not in terminal.getvalue().splitlines()[-1]


def test_no_color_and_dumb_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal, display = drawn()
    for item in track("ab", "encode", "video"):
        assert item in "ab"
    with listening(display):
        assert list(track("abc", "encode", "video")) == [*"abc"]
    assert "3/3" in terminal.getvalue() and not re.search(r"\x1b\[[0-9;]*m", terminal.getvalue())
    monkeypatch.setenv("TERM", "dumb")
    terminal, display = drawn()
    with listening(display):
        assert list(track("abc", "encode", "video")) == [*"abc"]
    assert "\x1b" not in terminal.getvalue() and terminal.getvalue().startswith("encode: 0/3\n")


def test_the_loading_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for loads, expected in ((False, ""), (True, "loading it ...\n")):
        log = io.StringIO()
        with listening(Display(Console(file=log), loads=loads)), reporting("loading it"):
            pass
        assert log.getvalue() == expected


def test_who_listens() -> None:
    first: list[Event] = []
    second: list[Event] = []
    with listening(first.append):
        with also(second.append), reporting("a", 1, settings={"lr": 1}) as advance:
            advance({"loss": 2.0})
            advance({"validation_loss": 3.0}, count=0)
        with listening(), reporting("silent", 1):
            pass
    assert first == second and [event.kind for event in first] == ["begin", "step", "step", "end"]
    assert first[0].values == {"lr": 1} and [event.done for event in first] == [0, 1, 1, 1]


def test_lines_of_json() -> None:
    file = io.StringIO()
    with listening(JsonLines(file)), reporting("solve", 2, settings={"lr": float("inf"), "p": (1, 2)}) as advance:
        advance({"step": 0, "loss": float("nan"), "guards": {"dark": 0.5}, "done": 7})
    begin, step, end = map(json.loads, file.getvalue().splitlines())
    assert begin["settings"] == {"lr": None, "p": [1, 2]}
    assert (step["loss"], step["guards"], step["done"], step["total"]) == (None, {"dark": 0.5}, 1, 2)
    assert (end["event"], end["work"], end["done"]) == ("end", "solve", 1)


def test_a_reader_that_has_gone() -> None:
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    with listening(JsonLines(Closed())), reporting("solve", 3) as advance:
        for _ in range(3):
            advance()
    assert advance.done == 3


def test_tqdm_on_a_terminal_and_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    for keywords in ({"desc": "mine", "file": file}, {"desc": "mine"}, {"disable": True}):
        with listening(bar(keywords)), reporting("loading"), reporting("solve", 2) as advance:
            advance(STEP)
    assert isinstance(bar({"file": file}), Bar) and "\r" in file.getvalue() and "mine:  50%" in file.getvalue()
    err = capsys.readouterr().err
    assert err.startswith("mine: 0/2\n") and "\r" not in err and err.count("mine: 1/2") == 1
