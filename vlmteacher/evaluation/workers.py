"""Independent tasks on workers that may die: a lost or failed task is tried again, and nothing else is lost.

`Workers` is the driver: it feeds tasks, counts attempts and replaces dead workers. An `Executor` runs them: in this
process or in processes of their own (`evaluation/processes.py`), or as Ray actors (`evaluation/actors.py`).
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vlmteacher.errors import InputError, MissingExtra, NonFiniteFrames, OutOfMemory, OutputError, TaskFailed
from vlmteacher.progress import listening

ATTEMPTS = 3  # at a task, before it counts as failed


class Reply(NamedTuple):
    """The outcome of an attempt at a task.

    error: a description of what failed in this attempt, or an exception that every other task would meet too.
    """

    value: Any = None
    error: str | Exception | None = None


@dataclass(eq=False)
class Task:
    """A call `work(*given)`, its result or failure once it is `done`, and the number of attempts."""

    work: Callable[..., Any]
    given: tuple[Any, ...]
    attempts: int = 0
    done: bool = False
    failure: str | None = None
    _value: Any = field(default=None, repr=False)

    def result(self) -> Any:
        """Return the call's result. Raises TaskFailed if the task failed."""
        if self.failure is not None:
            raise TaskFailed(f"a task was tried {self.attempts} times and failed ({self.failure})")
        return self._value

    def settle(self, reply: Reply) -> None:
        """Take the outcome of an attempt. Raises an error that every task would meet."""
        self.attempts += 1
        if isinstance(reply.error, Exception):
            raise reply.error
        self._value, self.failure = reply.value, reply.error
        self.done = reply.error is None or self.attempts >= ATTEMPTS


class End(NamedTuple):
    """The end of an attempt, the death of a worker, or both.

    Attributes:
        task, reply: of the attempt; None if the worker died without a task.
        dead: the worker, for `Executor.replace`.
    """

    task: Task | None
    reply: Reply
    dead: Any = None


class Executor(ABC):
    """Workers that run one task each at a time.

    count: the number of workers.
    """

    count: int

    @property
    @abstractmethod
    def idle(self) -> int:
        """Number of workers that have started and have no task."""

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Give a task to an idle worker. If that worker is dead, `wait` reports it."""

    @abstractmethod
    def wait(self) -> End | None:
        """Wait for a worker's next end of a task, or its death. None: another worker has started and is idle."""

    @abstractmethod
    def replace(self, dead: Any) -> None:
        """Start another worker in the place of a dead one; it is idle once it has started."""

    @abstractmethod
    def close(self) -> None:
        """End all workers and their tasks."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Alone(Executor):
    """Runs the tasks in this process, in their order."""

    count = 1

    def __init__(self) -> None:
        self._task: Task | None = None

    @property
    def idle(self) -> int:
        return int(self._task is None)

    def submit(self, task: Task) -> None:
        self._task = task

    def wait(self) -> End:
        task, self._task = self._task, None
        assert task is not None
        return End(task, attempt(task.work, task.given))

    def replace(self, dead: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._task = None


class Workers:
    """Runs tasks on the workers of an executor.

    A worker that dies (SIGKILL, out of memory, a lost node) is replaced. Its task is tried again, as is one that raised
    an exception; after `ATTEMPTS` failures a task is done without a result (`Task.failure`). Errors that every task
    would meet stop all: `wait` raises the InputError, MissingExtra or OutputError of a task, and TaskFailed when the
    workers die before they have started.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._waiting: deque[Task] = deque()
        self._source: Iterator[Task] = iter(())
        self._running = 0
        self._failed_starts = 0  # since a worker has started

    def submit(self, work: Callable[..., Any], *given: Any) -> Task:
        """Queue a call of `work`, a module-level function, with arguments that can be pickled."""
        task = Task(work, given)
        self._waiting.append(task)
        self._hand_out()
        return task

    def run(self, work: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Task]:
        """Yield a task `work(*call)` for each of `calls`, in the order in which they are done.

        A call is drawn when a worker is idle, and one more in advance: the number of calls costs no memory.
        """
        self._source = (Task(work, given) for given in calls)
        return self.finish_all()

    def wait(self) -> Task | None:
        """Wait for the next task to be done and return it; None when there are no more."""
        self._hand_out()
        while self._running or self._waiting:
            task = self._receive()
            self._hand_out()
            if task is not None and task.done:
                return task
        return None

    def finish_all(self) -> Iterator[Task]:
        """Yield all tasks in the order in which they are done."""
        while task := self.wait():
            yield task

    def finish(self, task: Task) -> Any:
        """Wait for one task and return its result. Raises TaskFailed if it failed."""
        while not task.done:
            self.wait()
        return task.result()

    def _hand_out(self) -> None:
        """Give tasks to the idle workers."""
        while self._waiting or self._draw():
            if not self._executor.idle:
                return
            self._executor.submit(self._waiting.popleft())
            self._running += 1

    def _draw(self) -> bool:
        """Queue the next task of `run`, if there is one."""
        task = next(self._source, None)
        if task is not None:
            self._waiting.append(task)
        return task is not None

    def _receive(self) -> Task | None:
        """Wait for a worker; replace it if it died, and return its task."""
        end = self._executor.wait()
        if end is None:
            self._failed_starts = 0
            return None
        if end.dead is not None:
            if end.task is None:
                self._failed_starts += 1
                if self._failed_starts >= ATTEMPTS * self._executor.count:
                    raise TaskFailed(f"the workers end before they have a task ({end.reply.error})")
            self._executor.replace(end.dead)
        task = end.task
        if task is not None:
            self._running -= 1
            task.settle(end.reply)
            if not task.done:
                self._waiting.append(task)
        return task


def attempt(work: Callable[..., Any], given: tuple[Any, ...]) -> Reply:
    """Make an attempt at a task in this process."""
    try:
        return Reply(work(*given))
    except Exception as error:
        return Reply(error=error if _stops(error) else describe(error))


def question(task: Task) -> bytes:
    """Return a task for `answer`, pickled."""
    return pickle.dumps((task.work, task.given))


def answer(message: bytes) -> bytes:
    """Make an attempt at a pickled task in a worker; return its `Reply`, pickled. The worker shows no progress."""
    try:
        work, given = pickle.loads(message)
        with listening():
            return pickle.dumps(attempt(work, given))
    except Exception as error:
        return pickle.dumps(Reply(error=error if _stops(error) else describe(error)))


def describe(error: Exception) -> str:
    """Return an error's type and message in a line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _stops(error: Exception) -> bool:
    """Whether every other task would meet the same error."""
    if isinstance(error, (OutOfMemory, NonFiniteFrames)):  # InputErrors that depend on the instance
        return False
    return isinstance(error, (InputError, MissingExtra, OutputError))
