"""Tasks in processes of their own: dead ones are replaced, failing tasks set aside, none outlives its parent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vlmteacher.errors import InputError, OutOfMemory, OutputError, TaskFailed
from vlmteacher.evaluation.workers import ATTEMPTS, Workers


def square(x: int) -> int:
    return x * x


def note(folder: str, name: str) -> int:
    """Count the calls with these arguments."""
    path = Path(folder) / name
    count = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(count))
    return count


def die(folder: str, name: str, times: int) -> str:
    """Die by SIGKILL, as by the out-of-memory killer, a number of times before it works."""
    if note(folder, name) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def fall_over(folder: str, name: str, times: int) -> str:
    if note(folder, name) <= times:
        raise ZeroDivisionError("a number\nby nothing")
    return name


def run_out_of_memory() -> None:
    raise OutOfMemory("a step does not fit")


def refuse() -> None:
    raise InputError("the pair is not there: give another")


def find_disk_full() -> None:
    raise OutputError("results.json", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def leave(code: int) -> None:
    os._exit(code)


def threads() -> int:
    return torch.get_num_threads()


def linger(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as workers:
        yield workers


def test_results_are_those_of_this_process(workers: Workers) -> None:
    tasks = [workers.submit(square, x) for x in range(9)]
    assert {id(task) for task in workers.finish_all()} == {id(task) for task in tasks}
    with Workers(0) as alone:
        here = [alone.submit(square, x) for x in range(9)]
        assert list(alone.finish_all()) == here  # in order
    assert [task.result() for task in tasks] == [task.result() for task in here] == [x * x for x in range(9)]
    assert workers.finish(workers.submit(threads)) == 1
    assert workers.wait() is None


def test_a_killed_process_is_replaced_and_its_task_tried_again(workers: Workers, tmp_path: Path) -> None:
    task = workers.submit(die, str(tmp_path), "once", 1)
    others = [workers.submit(square, x) for x in range(4)]
    hopeless = workers.submit(die, str(tmp_path), "always", 99)
    assert {id(each) for each in workers.finish_all()} == {id(each) for each in (task, hopeless, *others)}
    assert (task.result(), task.attempts, task.failure) == ("once", 2, None)
    assert [each.result() for each in others] == [0, 1, 4, 9]
    assert hopeless.attempts == ATTEMPTS == int((tmp_path / "always").read_text())
    with pytest.raises(TaskFailed, match=r"3 times.*died, signal SIGKILL"):
        workers.finish(hopeless)
    gone = workers.submit(leave, 7)
    with pytest.raises(TaskFailed, match="died, exit status 7"):
        workers.finish(gone)
    assert workers.finish(workers.submit(square, 5)) == 25


@pytest.mark.parametrize("count", [0, 2])
def test_exceptions_are_failures_or_stop_all(count: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    workers = Workers(0) if count == 0 else request.getfixturevalue("workers")
    assert workers.finish(workers.submit(fall_over, str(tmp_path), "twice", 2)) == "twice"
    with pytest.raises(TaskFailed, match="ZeroDivisionError: a number by nothing"):
        workers.finish(workers.submit(fall_over, str(tmp_path), "always", 99))
    with pytest.raises(TaskFailed, match="OutOfMemory: a step does not fit"):  # of this instance
        workers.finish(workers.submit(run_out_of_memory))
    with pytest.raises(InputError, match="the pair is not there"):  # of all instances
        workers.finish(workers.submit(refuse))
    with pytest.raises(OutputError, match=r"results\.json cannot be written"):
        workers.finish(workers.submit(find_disk_full))
    assert workers.finish(workers.submit(square, 3)) == 9


DRIVER = """
import sys
from tests.evaluation.test_workers import linger
from vlmteacher.evaluation.workers import Workers
if __name__ == "__main__":
    with Workers(2) as workers:
        for _ in range(2):
            workers.submit(linger, sys.argv[1])
        workers.wait()
"""


def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    pids = tmp_path / "pids"
    pids.mkdir()
    root = str(Path(__file__).parents[2])
    driver = subprocess.Popen([sys.executable, str(script), str(pids)], env={**os.environ, "PYTHONPATH": root})
    try:
        wait_for(lambda: len(list(pids.iterdir())) == 2, 120)
    finally:
        driver.kill()
        driver.wait()
    for file in pids.iterdir():
        wait_for(lambda file=file: not runs(int(file.name)), 10)


def wait_for(condition, seconds: float) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
