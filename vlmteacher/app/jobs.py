"""The work of the page: one thread makes the runs, one after the other, and all browsers see the same line."""

from __future__ import annotations

import contextvars
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from PIL import Image

from vlmteacher.errors import InputError, OutputError, first_line
from vlmteacher.files import claimed, replacing
from vlmteacher.queries import QuerySet
from vlmteacher.runs.folder import RECORD, checked
from vlmteacher.settings import Keywords

if TYPE_CHECKING:
    import numpy as np

    from vlmteacher.pipeline import TeacherPipeline

log = logging.getLogger(__name__)

State: TypeAlias = Literal["waiting", "at work", "finished", "stopped", "failed"]
MOST_WAITING = 8
FIRST_FRAME = "first_frame.png"  # beside the files of a run, which do not hold it


class Stopped(KeyboardInterrupt):
    """The page asked a run to stop: like Ctrl-C, it ends the run where its state is whole."""


@dataclass
class Job:
    """A piece of work for the models.

    Attributes:
        title: for those who wait.
        stopping: the work ends at its next opportunity.
        message: why it failed, in one line.
    """

    title: str
    state: State = "waiting"
    stopping: bool = False
    message: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    def work(self, pipe: TeacherPipeline) -> None:
        raise NotImplementedError


@dataclass
class WriteQueries(Job):
    """The Teacher writes the queries of a task."""

    image: Image.Image | None = None
    queries: QuerySet | None = None

    def work(self, pipe: TeacherPipeline) -> None:
        self.queries = pipe.write_queries(self.title, self.image)


@dataclass
class Run(Job):
    """One run of the pipeline, recorded in its folder; its title is the prompt.

    Attributes:
        folder: of the run; image: the first frame; queries: None where the Teacher writes them.
        calls: further keywords of the call; settings: those that differ from the pipeline's.
        resume: the interrupted run in `folder` goes on.
        rows: of the steps so far. strip: frames of the last one-step prediction, side by side: (h, w, 3) uint8.
        phase: what it does.
    """

    folder: Path = Path()
    image: Image.Image | None = None
    queries: QuerySet | None = None
    seed: int = 0
    calls: dict[str, Any] = field(default_factory=dict)
    settings: Keywords = field(default_factory=Keywords)
    resume: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    strip: np.ndarray | None = None
    phase: str = "preparing"

    def work(self, pipe: TeacherPipeline) -> None:
        self._check_stop()
        if self.queries is None:
            self.phase = "the questions"
        self._keep_first_frame()
        try:
            pipe(
                self.title,
                self.image,
                queries=self.queries,
                generator=torch.Generator().manual_seed(self.seed),
                callback_on_step_end=self._step,
                progress=False,
                run_dir=self.folder,
                resume=self.resume,
                **self.calls,
                **self.settings,
            )
        finally:
            if not (self.folder / RECORD).exists():  # it was refused
                (self.folder / FIRST_FRAME).unlink(missing_ok=True)
                if self.folder.is_dir() and not any(self.folder.iterdir()):
                    self.folder.rmdir()

    def _keep_first_frame(self) -> None:
        if self.image is None or self.resume:
            return
        with claimed(checked(self.folder)), replacing(self.folder / FIRST_FRAME) as temporary:
            self.image.save(temporary, "PNG")

    def _step(self, pipe: TeacherPipeline, step: int, row: dict[str, Any]) -> None:
        assert pipe.loop is not None
        if (strip := pipe.loop.predictions.get(step)) is not None:
            self.strip = strip.cpu().numpy()
        self.queries = pipe.loop.objective.queries
        self.rows.append(row)
        self.phase = "the videos" if pipe.loop.stopped else "the steps"
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stopping:
            raise Stopped


class Worker:
    """The thread that has the models, and the line of jobs before it; the first one is at work."""

    def __init__(self, pipe: TeacherPipeline) -> None:
        self.pipe = pipe
        self.version = 0  # counts what joins, starts and leaves the line
        self._line: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        context = contextvars.copy_context()  # of the command line, for run.json
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="vlmteacher-runs", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the line. Raises InputError where the line is full or closed."""
        with self._changed:
            if self._closed:
                raise InputError("the program ends: start it again")
            if len(self._line) > MOST_WAITING:
                raise InputError(f"{MOST_WAITING} runs are waiting already: try again when one has ended")
            self._line.append(job)
            self._notify()

    def ahead(self, job: Job) -> int:
        """The number of jobs before this one in the line."""
        with self._changed:
            return self._line.index(job) if job in self._line else 0

    def line(self) -> list[Job]:
        """The jobs that are at work or wait, in their order."""
        with self._changed:
            return list(self._line)

    def stop(self, job: Job) -> None:
        """Take a waiting job out of the line; one that is at work ends after its present step."""
        with self._changed:
            job.stopping = True
            if job.state == "waiting" and job in self._line:
                self._leave(job, "stopped")

    def close(self, seconds: float | None = None) -> None:
        """Stop all jobs and wait for the one at work, which keeps its state."""
        with self._changed:
            self._closed = True
            for job in list(self._line):
                self.stop(job)
            self._notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if not self._line:
                    return
                job = self._line[0]
                job.state = "at work"
                self._notify()
            state = self._outcome(job)
            with self._changed:
                self._leave(job, state)

    def _outcome(self, job: Job) -> State:
        try:
            job.work(self.pipe)
            return "finished"
        except KeyboardInterrupt:
            return "stopped"
        except (InputError, OutputError, ArithmeticError) as error:
            job.message = " ".join(str(error).split())
        except Exception as error:  # the page goes on with the next job; what broke stands on the terminal
            log.exception("a run failed")
            job.message = f"{type(error).__name__}: {first_line(error)}; the terminal of vlmteacher ui says more"
        return "failed"

    def _leave(self, job: Job, state: State) -> None:
        self._line.remove(job)
        job.state = state
        job.ended.set()
        self._notify()

    def _notify(self) -> None:
        self.version += 1
        self._changed.notify_all()
