"""Workers that are processes of this machine, with a pipe to each."""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process

from vlmteacher.evaluation.workers import End, Executor, Reply, Task, answer, question

ENDING = 5.0  # seconds that an idle process has to end by itself
_CONTEXT = get_context("spawn")  # a fork would share the parent's threads, locks and CUDA context


class Processes(Executor):
    """`count` processes. They end with `close`, and within seconds of the end of this process, even if it was killed.

    gpus: entries of CUDA_VISIBLE_DEVICES, one for each process in turn, which then has its share of the processor's
    threads. Without GPUs a process has one thread.
    """

    def __init__(self, count: int, gpus: Sequence[str] = ()) -> None:
        self.count = count
        self._threads = max(1, (os.cpu_count() or 1) // count) if gpus else 1
        self._selector = selectors.DefaultSelector()  # kept, because waiting on n pipes anew costs n each time
        self._idle: list[_Process] = []
        self._answered: deque[_Process] = deque()
        try:
            for number in range(count):
                self._start(gpus[number % len(gpus)] if gpus else None)
        except BaseException:
            self.close()
            raise

    @property
    def idle(self) -> int:
        return len(self._idle)

    def submit(self, task: Task) -> None:
        self._idle.pop().begin(task)

    def wait(self) -> End | None:
        while not self._answered:
            self._answered.extend(key.data for key, _ in self._selector.select())
        process = self._answered.popleft()
        task, process.task = process.task, None
        try:
            message = process.pipe.recv_bytes()
        except (EOFError, OSError):
            if process in self._idle:
                self._idle.remove(process)
            return End(task, Reply(error=f"the process died, {process.death()}"), process)
        self._idle.append(process)
        return None if task is None else End(task, pickle.loads(message))

    def replace(self, dead: _Process) -> None:
        self._selector.unregister(dead.pipe)
        dead.end()
        self._start(dead.gpu)

    def close(self) -> None:
        processes = [key.data for key in self._selector.get_map().values()]
        self._selector.close()
        for process in processes:
            process.pipe.close()  # all idle ones end at the same time
        for process in processes:
            process.end()
        self._idle.clear()
        self._answered.clear()

    def _start(self, gpu: str | None) -> None:
        process = _Process(self._threads, gpu)
        self._selector.register(process.pipe, selectors.EVENT_READ, process)


class _Process:
    """One process, the pipe to it and its task."""

    def __init__(self, threads: int, gpu: str | None) -> None:
        self.task: Task | None = None
        self.gpu = gpu
        self.pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, threads, gpu), daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe closes when the process ends

    def begin(self, task: Task) -> None:
        self.task = task
        message = question(task)
        with suppress(OSError):  # it died: `wait` meets the closed pipe
            self.pipe.send_bytes(message)

    def death(self) -> str:
        """Describe how the process ended, after its pipe closed."""
        self._process.join(5)
        code = self._process.exitcode
        if code is None:
            return "its pipe closed"
        return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def end(self) -> None:
        """End an idle process by closing its pipe, so that it gives its semaphores back; kill a busy one."""
        self.pipe.close()
        if self.task is None:
            self._process.join(ENDING)
        self._process.kill()
        self._process.join()
        self._process.close()


def _serve(pipe: connection.Connection, threads: int, gpu: str | None) -> None:
    """Run a worker: say that it has started, then answer every task until the pipe closes.

    Tasks arrive through the pipe and not as arguments of the process: unpickling them imports much, and `_watch_parent`
    must run before.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_watch_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA is first used
    import torch

    torch.set_num_threads(threads)
    with suppress(EOFError, OSError):  # the parent is gone
        pipe.send_bytes(b"started")
        while True:
            pipe.send_bytes(answer(pipe.recv_bytes()))


def _watch_parent() -> None:
    """End this process at once when its parent ends."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
