"""The line of jobs: one at work, the others wait; a stopped run keeps its state and goes on to the same result."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.app.jobs import FIRST_FRAME, MOST_WAITING, Job, Run, Worker, WriteQueries
from vlmteacher.errors import InputError
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet

SETTINGS: Any = {"threshold": 1e-6, "teacher_frames": 4, "rank": 2, "learning_rate": 0.01}
SECONDS = 60  # that anything may take here


@pytest.fixture
def worker(pipe: TeacherPipeline) -> Iterator[Worker]:
    worker = Worker(pipe)
    yield worker
    worker.close()


class Held(Job):
    """A job that is at work until it is released."""

    def __init__(self, title: str = "held") -> None:
        super().__init__(title)
        self.begun, self.release = threading.Event(), threading.Event()

    def work(self, pipe: TeacherPipeline) -> None:
        self.begun.set()
        assert self.release.wait(SECONDS)


def run(folder: Path, max_steps: int, **changed: Any) -> Run:
    settings = {**SETTINGS, "max_steps": max_steps}
    return Run(PROMPT, folder=folder, queries=QuerySet.from_dict(QUERIES), settings=settings, **changed)


def test_a_run_is_an_ordinary_run_folder(worker: Worker, tmp_path: Path) -> None:
    job = run(tmp_path / "run", 2, image=Image.new("RGB", (48, 32), "red"))
    worker.submit(job)
    assert job.ended.wait(SECONDS) and job.state == "finished", job.message
    files = {"run.json", "before.mp4", "after.mp4", "lora.safetensors", "README.md", "queries.json", "report.html"}
    assert files | {FIRST_FRAME, "frames.webp", "state.pt"} == {path.name for path in job.folder.iterdir()}
    record = json.loads((job.folder / "run.json").read_text())
    assert [row["loss"] for row in record["steps"]] == [row["loss"] for row in job.rows]
    assert job.strip is not None and job.strip.shape == (32, 4 * 48, 3)


def test_a_stopped_run_goes_on_to_the_same_result(worker: Worker, tmp_path: Path) -> None:
    stopped = run(tmp_path / "stopped", 500)
    worker.submit(stopped)
    while not stopped.rows and not stopped.ended.is_set():
        stopped.ended.wait(0.01)
    worker.stop(stopped)
    assert stopped.ended.wait(SECONDS) and stopped.state == "stopped", stopped.message
    record = json.loads((stopped.folder / "run.json").read_text())
    made = len(record["steps"])
    assert record["stopped"] == "interrupted" and 1 <= made == len(stopped.rows)
    again = run(stopped.folder, made + 2, resume=True, rows=list(record["steps"]))
    whole = run(tmp_path / "whole", made + 2)
    for job in (again, whole):
        worker.submit(job)
        assert job.ended.wait(SECONDS) and job.state == "finished", job.message
    assert len(again.rows) == made + 2
    assert (again.folder / "lora.safetensors").read_bytes() == (whole.folder / "lora.safetensors").read_bytes()


def test_one_is_at_work_and_the_others_wait(worker: Worker, tmp_path: Path) -> None:
    first, second, third = Held(), run(tmp_path / "second", 1), run(tmp_path / "third", 1)
    for job in (first, second, third):
        worker.submit(job)
    assert first.begun.wait(SECONDS)
    assert [worker.ahead(job) for job in (first, second, third)] == [0, 1, 2]
    assert (first.state, second.state) == ("at work", "waiting")
    worker.stop(second)
    assert second.state == "stopped" and worker.ahead(third) == 1 and not second.folder.exists()
    first.release.set()
    assert third.ended.wait(SECONDS) and third.state == "finished", third.message


def test_a_full_line_is_refused(worker: Worker) -> None:
    jobs = [Held(str(number)) for number in range(MOST_WAITING + 1)]
    for job in jobs:
        job.release.set() if job is not jobs[0] else None
        worker.submit(job)
    assert jobs[0].begun.wait(SECONDS)
    with pytest.raises(InputError, match="are waiting already"):
        worker.submit(Held())
    jobs[0].release.set()
    assert jobs[-1].ended.wait(SECONDS)


def test_what_fails_leaves_a_line_and_no_folder(worker: Worker, tmp_path: Path) -> None:
    bad = run(tmp_path / "bad", 1, image=Image.new("RGB", (48, 32)), calls={"num_frames": 4})
    broken = Held()
    broken.work = lambda pipe: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    jobs = [bad, broken, WriteQueries(PROMPT)]  # a Teacher of random weights writes nothing usable
    for job in jobs:
        worker.submit(job)
    assert all(job.ended.wait(SECONDS) for job in jobs) and {job.state for job in jobs} == {"failed"}
    assert "num_frames" in bad.message and "\n" not in bad.message and not bad.folder.exists()
    assert broken.message == "division by zero"
    assert "no usable queries" in jobs[2].message


def test_the_end_of_the_program_keeps_the_state(pipe: TeacherPipeline, tmp_path: Path) -> None:
    worker = Worker(pipe)
    at_work, waiting = run(tmp_path / "at_work", 500), run(tmp_path / "waiting", 1)
    worker.submit(at_work)
    worker.submit(waiting)
    while not at_work.rows:
        at_work.ended.wait(0.01)
    worker.close(SECONDS)
    assert (at_work.state, waiting.state) == ("stopped", "stopped") and worker.line() == []
    assert (at_work.folder / "state.pt").exists() and not waiting.folder.exists()
    with pytest.raises(InputError, match="ends"):
        worker.submit(Held())
