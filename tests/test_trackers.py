"""Trackers: TensorBoard's files read back, one's own, one that fails, one that is not installed."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker

from tests.progress_output import curves, tracked_settings
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher import InputError, TeacherPipeline
from vlmteacher.errors import MissingExtra, Notice
from vlmteacher.progress import listening, reporting
from vlmteacher.trackers import configuration, make, numbers, tracking

FAST: dict[str, Any] = {"max_steps": 2, "rank": 2, "teacher_frames": 4, "queries": QUERIES, "progress": False}


class Own(GeneralTracker):
    """Keeps what it gets; raises in `breaks`."""

    name, requires_logging_directory = "own", False

    def __init__(self, breaks: str = "") -> None:
        super().__init__()
        self.breaks, self.calls = breaks, []

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    def _take(self, name: str, *given: Any) -> None:
        self.calls.append((name, *given))
        if name == self.breaks:
            raise OSError("no space\nleft")

    def start(self) -> None:
        self._take("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._take("configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._take("log", values, step)

    def finish(self) -> None:
        self._take("finish")


def test_a_call_leaves_its_curves(pipe: TeacherPipeline, tmp_path: Path) -> None:
    own = Own()
    out = pipe(PROMPT, run_dir=tmp_path, tracker=["tensorboard", own], **FAST)
    read = curves(tmp_path / "logs")
    assert [step for step, _ in read["loss"]] == [0, 1] == [row["step"] for row in out.history]
    assert [value for _, value in read["loss"]] == pytest.approx([row["loss"] for row in out.history])
    assert [value for _, value in read["p_yes/2"]] == pytest.approx([row["p_yes"][2] for row in out.history])
    assert {f"guards/{name}" for name in out.history[0]["guards"]} <= read.keys() and read["memory"][0][1] > 1e7
    settings = tracked_settings(tmp_path / "logs")
    assert (settings["prompt"], settings["rank"], settings["queries.goal"]) == (PROMPT, 2, QUERIES["goal"])
    assert [name for name, *_ in own.calls] == ["start", "configuration", "log", "log", "finish"]
    assert own.calls[1][1] == settings


def test_without_a_run_folder(pipe: TeacherPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe([PROMPT] * 2, tracker="tensorboard", **{**FAST, "max_steps": 1})
    assert len(list(tmp_path.glob("logs/*/events.out.tfevents.*"))) == 2


@pytest.mark.parametrize("breaks", ["start", "configuration", "log", "finish"])
def test_a_tracker_that_fails_does_not_lose_the_run(pipe: TeacherPipeline, breaks: str) -> None:
    own, other = Own(breaks), Own()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = pipe(PROMPT, tracker=(own, other), **FAST)
    assert out.stopped == "max_steps" and len(out.history) == 2
    (notice,) = [str(each.message) for each in caught if issubclass(each.category, Notice)]
    assert notice == "tracker own failed (OSError: no space): the run goes on without it"
    assert own.calls[-1] == ("finish",) and sum(name == breaks for name, *_ in own.calls) == 1
    assert sum(name == "log" for name, *_ in other.calls) == 2


def test_steps_of_several_works_rise() -> None:
    own = Own()
    with listening(), tracking(own):
        for method in ("base", "teacher"):
            with reporting(method, 2, unit="instance", settings={"method": method}) as advance:
                advance({"score": 0.5})
                advance(failed=True)
        with reporting("encode", 3) as advance:  # no settings: no curve
            advance({"score": 1.0})
    logged = [call[1:] for call in own.calls if call[0] == "log"]
    assert logged == [({"base/score": 0.5}, 1), ({"teacher/score": 0.5}, 2)]


def test_names_and_values() -> None:
    values = {"a": 1, "b": [0.5, None], "c": {"d": True, "e": "text"}, "f": float("nan"), "g": None}
    assert numbers(values) == {"a": 1, "b/0": 0.5, "c/d": True}
    assert configuration(values) == {
        "a": 1,
        "b": "[0.5, null]",
        "c.d": True,
        "c.e": "text",
        "f": values["f"],
        "g": "none",
    }


def test_bad_input(pipe: TeacherPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for tracker in ("mlflow", 3, ["tensorboard", None]):
        with pytest.raises(InputError, match="tracker must be tensorboard"):
            pipe(PROMPT, tracker=tracker, **FAST)
    monkeypatch.setattr("vlmteacher.trackers.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"tracker wandb needs .*pip install wandb"):
        pipe(PROMPT, tracker="wandb", **FAST)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_are_those_of_accelerate(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, where they are installed; else what they would be given."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    tracker = make(name, tmp_path / "run" / "logs")
    assert (tracker.name, tracker.run_name, tracker.init_kwargs["name"]) == (name, "vlmteacher", "run")
    if find_spec(name) is None:
        return
    settings = {"lr": 1}
    with listening(), tracking(name, tmp_path / "run" / "logs"), reporting("solve", 1, settings=settings) as advance:
        advance({"step": 0, "loss": 0.5})
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".wandb", ".db")]
