"""Workers that are Ray actors, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vlmteacher.errors import InputError, MissingExtra, Notice, first_line
from vlmteacher.evaluation.workers import End, Executor, Reply, Task, answer, describe, question

LOCAL = "local"  # Ray's address of a cluster that is started here and ends with this process
OBJECT_STORE = 100 * 2**20  # bytes; rows are small and pass beside it
PATIENCE = 60.0  # seconds without any actor after which a notice says what is waited for


class Actors(Executor):
    """`count` actors with one task each, which Ray never restarts by itself: the driver knows which task an actor had.

    An actor has one GPU and its share of the processors of a machine with GPUs; in a cluster without GPUs one processor
    and one thread. Actors that the cluster has no room for start when it has; they hold no task until then.

    Args:
        address: of a cluster, as ``ray.init`` takes it; "": the one that RAY_ADDRESS names, or `LOCAL`.
        count: None: as many as there are GPUs, or processors in a cluster without GPUs.

    Raises:
        MissingExtra: Ray is not installed.
        InputError: there is no such cluster.
    """

    def __init__(self, address: str, count: int | None = None) -> None:
        self._ray = _import()
        self._idle: list[_Actor] = []
        self._calls: dict[Any, _Actor] = {}  # by the reference of the call that the actor is at
        self._answered: deque[Any] = deque()
        self._started = False
        self._connected = not self._ray.is_initialized()
        if self._connected:
            _connect(self._ray, address or os.environ.get("RAY_ADDRESS") or LOCAL, count)
        try:
            self._needs, room = _share(self._ray)
            self.count = count or room
            if self.count > room:
                warnings.warn(
                    f"the Ray cluster has room for {room} of {self.count} workers: the others wait for room",
                    Notice,
                    stacklevel=2,
                )
            remote = self._ray.remote(max_restarts=0, max_task_retries=0, enable_task_events=False, **self._needs)
            self._class = remote(_Served)
            for _ in range(self.count):
                self._start()
        except BaseException:
            self.close()
            raise

    @property
    def idle(self) -> int:
        return len(self._idle)

    def submit(self, task: Task) -> None:
        actor = self._idle.pop()
        actor.task = task
        self._calls[actor.handle.answer.remote(question(task))] = actor

    def wait(self) -> End | None:
        while not self._answered:
            self._answered.extend(self._ready())
        reference = self._answered.popleft()
        actor = self._calls.pop(reference)
        task, actor.task = actor.task, None
        try:
            message = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:  # the actor or its node is lost, or the reply with its node
            return End(task, Reply(error=f"the Ray actor died, {describe(error)}"), actor)
        self._started = True
        self._idle.append(actor)
        return None if task is None else End(task, pickle.loads(message))

    def replace(self, dead: _Actor) -> None:
        self._ray.kill(dead.handle)
        self._start()

    def close(self) -> None:
        for actor in (*self._idle, *self._calls.values()):
            with suppress(Exception):  # the connection may be lost
                self._ray.kill(actor.handle)
        self._idle.clear()
        self._calls.clear()
        self._answered.clear()
        if self._connected:
            with _handlers_kept():
                self._ray.shutdown()

    def _start(self) -> None:
        actor = _Actor(self._class.remote(int(self._needs["num_cpus"])))
        self._calls[actor.handle.start.remote()] = actor

    def _ready(self) -> list[Any]:
        """Wait for the first calls that have ended."""
        calls = list(self._calls)
        ready, _ = self._ray.wait(calls, timeout=None if self._started else PATIENCE)
        if not ready:
            warnings.warn(f"Ray has started no worker yet; one needs {self._needs}", Notice, stacklevel=2)
        elif len(calls) > 1:  # one wait costs by all calls, not by those that have ended
            ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        return ready


class _Actor:
    """An actor's handle and its task."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.task: Task | None = None


class _Served:
    """What runs in an actor."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def start(self) -> int:
        """Return the process id, once the actor has started."""
        return os.getpid()

    def answer(self, message: bytes) -> bytes:
        return answer(message)


def _import() -> Any:
    """Import Ray, which then reports nothing about its use. Raises MissingExtra."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without a GPU: no warning about it
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("workers on Ray need the package ray: pip install 'vlmteacher[ray]'") from error
    return ray


def _connect(ray: Any, address: str, count: int | None) -> None:
    """Connect to a cluster, or start one on this machine. Raises InputError."""
    own: dict[str, Any] = {}
    if address == LOCAL:
        own = {"num_cpus": count, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    try:
        with _handlers_kept():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"no Ray cluster at {address} ({first_line(error)}): start one with 'ray start --head',"
            " or leave the address out"
        ) from error


def _share(ray: Any) -> tuple[dict[str, float], int]:
    """Return the resources of one actor, and how many actors the cluster has room for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if with_gpus:
        cpus = max(1, int(min(node.get("CPU", 1) / node["GPU"] for node in with_gpus)))
        return {"num_gpus": 1, "num_cpus": cpus}, sum(int(node["GPU"]) for node in with_gpus)
    return {"num_cpus": 1}, sum(int(node.get("CPU", 0)) for node in nodes)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep this process's signal handlers: Ray puts its own for SIGTERM in the place of ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
