"""Processes that run independent tasks; if one dies, its task is tried again and nothing else is lost."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from typing import Any

from vlmteacher.errors import InputError, MissingExtra, NonFiniteFrames, OutOfMemory, OutputError, TaskFailed

ATTEMPTS = 3  # at a task, before it counts as failed
_CONTEXT = get_context("spawn")  # a fork would share the parent's threads, locks and CUDA context


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

    def run(self) -> None:
        """Make an attempt in this process. Raises errors that every task would meet."""
        self.attempts += 1
        try:
            self.succeed(self.work(*self.given))
        except Exception as error:
            if _stops(error):
                raise
            self.fail(_describe(error))

    def succeed(self, value: Any) -> None:
        self._value, self.failure, self.done = value, None, True

    def fail(self, reason: str) -> None:
        self.failure, self.done = reason, self.attempts >= ATTEMPTS


class Workers:
    """`count` processes, each with one thread and one task at a time; with 0 the tasks run in this process.

    A process that dies (SIGKILL, out of memory) is replaced. Its task is tried again, as is one that raised an
    exception; after `ATTEMPTS` failures a task is done without a result (`Task.failure`). Errors that every task would
    meet stop all: `wait` raises the InputError, MissingExtra or OutputError of a task. The processes end with the
    block, and within seconds of the end of this process, even if it was killed.
    """

    def __init__(self, count: int) -> None:
        self._alone = count == 0
        self._waiting: deque[Task] = deque()
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        try:
            for _ in range(count):
                self._idle.append(_Worker())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, work: Callable[..., Any], *given: Any) -> Task:
        """Queue a call of `work`, a module-level function, with arguments that can be pickled."""
        task = Task(work, given)
        self._waiting.append(task)
        self._hand_out()
        return task

    def wait(self) -> Task | None:
        """Wait for the next task to be done and return it; None when there are no more."""
        while self._waiting or self._busy:
            self._hand_out()
            task = self._run() if self._alone else self._receive()
            if task.done:
                self._hand_out()
                return task
            self._waiting.append(task)
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

    def close(self) -> None:
        """End the processes and their tasks."""
        for worker in (*self._idle, *self._busy):
            worker.end()
        self._idle.clear()
        self._busy.clear()
        self._waiting.clear()

    def _run(self) -> Task:
        task = self._waiting.popleft()
        task.run()
        return task

    def _hand_out(self) -> None:
        while self._idle and self._waiting:
            worker, task = self._idle.pop(), self._waiting.popleft()
            worker.begin(task)  # `_receive` notices one that died meanwhile
            self._busy.append(worker)

    def _receive(self) -> Task:
        """Wait for the first worker that answers, or that dies and is replaced; return its task."""
        pipes = connection.wait([worker.pipe for worker in self._busy])
        worker = next(worker for worker in self._busy if worker.pipe in pipes)
        self._busy.remove(worker)
        task = worker.task
        assert task is not None
        task.attempts += 1
        try:
            good, value = pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            task.fail(f"the process died, {worker.death()}")
            self._idle.append(_Worker())
            return task
        self._idle.append(worker)
        if good:
            task.succeed(value)
        elif isinstance(value, Exception):
            raise value
        else:
            task.fail(value)
        return task


class _Worker:
    """One process, the pipe to it and its latest task."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe closes when the process ends

    def begin(self, task: Task) -> None:
        self.task = task
        data = pickle.dumps((task.work, task.given))
        with suppress(OSError):  # it died: `_receive` meets the closed pipe
            self.pipe.send_bytes(data)

    def death(self) -> str:
        """Describe how the process ended, after its pipe closed."""
        self._process.join(5)
        code = self._process.exitcode
        self.end()
        if code is None:
            return "its pipe closed"
        return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self.pipe.close()


def _serve(pipe: connection.Connection) -> None:
    """Run a worker: answer every (work, given) until the pipe closes.

    They arrive through the pipe and not as arguments of the process: unpickling them imports much, and `_watch_parent`
    must run before.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_watch_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _watch_parent() -> None:
    """End this process at once when its parent ends."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _answer(message: bytes) -> bytes:
    """Run a task; return (True, result), (False, description) or (False, exception that stops all tasks), pickled."""
    try:
        work, given = pickle.loads(message)
        return pickle.dumps((True, work(*given)))
    except Exception as error:
        return pickle.dumps((False, error if _stops(error) else _describe(error)))


def _stops(error: Exception) -> bool:
    """Whether every other task would meet the same error."""
    if isinstance(error, (OutOfMemory, NonFiniteFrames)):  # InputErrors that depend on the instance
        return False
    return isinstance(error, (InputError, MissingExtra, OutputError))


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
