"""Processes that work off independent tasks; the death of one costs its task another attempt, and nothing else."""

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

ATTEMPTS = 3  # of a task, before it is set aside
_CONTEXT = get_context("spawn")  # a fork would share the parent's threads, locks and CUDA context


@dataclass(eq=False)
class Task:
    """A call `work(*given)`, its outcome once it is `done`, and how often it was tried."""

    work: Callable[..., Any]
    given: tuple[Any, ...]
    attempts: int = 0
    done: bool = False
    failure: str | None = None
    _value: Any = field(default=None, repr=False)

    def result(self) -> Any:
        """What the call returned. Raises TaskFailed for a task that was set aside."""
        if self.failure is not None:
            raise TaskFailed(f"a task was tried {self.attempts} times and failed ({self.failure})")
        return self._value

    def run(self) -> None:
        """Try it in this process. Raises what stops all tasks."""
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
    """`count` processes, each with one thread and one task at a time; for 0 the tasks run in this process.

    A process that dies (SIGKILL, out of memory) is replaced. Its task is tried again, as is one that raised an
    exception; after `ATTEMPTS` failures a task is done without a result (`Task.failure`). What every task would meet
    stops all: `wait` raises InputError, MissingExtra and OutputError of a task. The processes end with the block, and
    within seconds of this process's own end, however it ended.
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
        """Queue a call of `work`, a function of a module, as are `given` things that can be pickled."""
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
        """All tasks, each when it is done."""
        while task := self.wait():
            yield task

    def finish(self, task: Task) -> Any:
        """The result of one task, waited for. Raises TaskFailed when it was set aside."""
        while not task.done:
            self.wait()
        return task.result()

    def close(self) -> None:
        """End the processes, and what they are at."""
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
            worker.begin(task)  # one that died meanwhile is found out by `_receive`
            self._busy.append(worker)

    def _receive(self) -> Task:
        """The task of a worker that answers, or that died and is replaced; waits for the first."""
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
        theirs.close()  # so that the pipe ends with the process

    def begin(self, task: Task) -> None:
        self.task = task
        data = pickle.dumps((task.work, task.given))
        with suppress(OSError):  # it died, which the end of the pipe tells `_receive`
            self.pipe.send_bytes(data)

    def death(self) -> str:
        """How the process, which has closed its pipe, ended."""
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
    """The life of a worker: answer each (work, given) until the pipe ends.

    They come as bytes by the pipe, not as arguments of the process, so that `_watch_parent` runs before all the imports
    that reading them brings.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_watch_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _watch_parent() -> None:
    """End this process when its parent ends, whatever this process is at."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _answer(message: bytes) -> bytes:
    """(True, result), (False, what went wrong) or (False, an exception that stops all), pickled."""
    try:
        work, given = pickle.loads(message)
        return pickle.dumps((True, work(*given)))
    except Exception as error:
        return pickle.dumps((False, error if _stops(error) else _describe(error)))


def _stops(error: Exception) -> bool:
    """Whether every other task would meet the same."""
    if isinstance(error, (OutOfMemory, NonFiniteFrames)):  # InputErrors that are one instance's
        return False
    return isinstance(error, (InputError, MissingExtra, OutputError))


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
