"""Tasks in processes of their own: dead ones are replaced, failing tasks set aside, none outlives its parent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import psutil
import pytest
import torch

from vlmteacher.errors import InputError, OutOfMemory, OutputError, TaskFailed
from vlmteacher.evaluation.processes import Processes
from vlmteacher.evaluation.workers import ATTEMPTS, Alone, Workers
from vlmteacher.placement import visible_gpus


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


def device() -> tuple[int, str, int]:
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], torch.get_num_threads()


def note_process(folder: str, name: str) -> int:
    note(folder, name)
    return os.getpid()


def linger(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Processes(2) as executor:
        yield Workers(executor)


def test_results_are_those_of_this_process(workers: Workers) -> None:
    tasks = [workers.submit(square, x) for x in range(9)]
    assert {id(task) for task in workers.finish_all()} == {id(task) for task in tasks}
    alone = Workers(Alone())
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
    workers = Workers(Alone()) if count == 0 else request.getfixturevalue("workers")
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


def test_calls_are_drawn_as_workers_become_idle(workers: Workers) -> None:
    drawn = []

    def calls() -> Iterator[tuple[int]]:
        for x in range(1000):
            drawn.append(x)
            yield (x,)

    results = set()
    for done, task in enumerate(workers.run(square, calls()), 1):
        results.add(task.result())
        assert len(drawn) <= done + 2 + 1  # what the two are at, and one in advance
    assert results == {x * x for x in range(1000)} and workers.wait() is None


def test_an_idle_worker_that_dies_is_replaced(workers: Workers, tmp_path: Path) -> None:
    pids = [task.result() for task in workers.run(note_process, ((str(tmp_path), str(k)) for k in range(4)))]
    for pid in set(pids):
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: not runs(pid), 10)
    tasks = list(workers.run(square, ((x,) for x in range(4))))
    assert sorted(task.result() for task in tasks) == [0, 1, 4, 9]


def test_each_process_has_a_gpu() -> None:
    with Processes(2, ["7", "GPU-5"]) as executor:
        workers = Workers(executor)
        gpus: dict[int, str] = {}  # by process
        killed = 0
        for task in workers.run(device, repeat(())):
            pid, gpu, threads = task.result()
            gpus[pid] = gpu
            assert threads == max(1, (os.cpu_count() or 1) // 2)
            if len(gpus) == 2 and not killed:
                assert sorted(gpus.values()) == ["7", "GPU-5"]
                killed = next(pid for pid, gpu in gpus.items() if gpu == "GPU-5")
                os.kill(killed, signal.SIGKILL)
            if len(gpus) == 3:
                break
        assert gpu == "GPU-5"  # of the one that took the place


@pytest.mark.parametrize(("given", "count", "expected"), [(None, 2, ["0", "1"]), ("3,1", 2, ["3", "1"]), ("", 0, [])])
def test_visible_gpus(given: str | None, count: int, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == expected


def test_workers_that_never_start(tmp_path: Path) -> None:
    """A script without the guard of its main module starts itself in every worker, which multiprocessing refuses."""
    script = tmp_path / "script.py"
    script.write_text(
        "from vlmteacher.evaluation.processes import Processes\n"
        "from vlmteacher.evaluation.workers import Workers\n"
        "with Processes(1) as executor:\n"
        "    workers = Workers(executor)\n"
        "    workers.finish(workers.submit(print))\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "the workers end before they have a task (the process died, exit status 1)" in result.stderr


DRIVER = """
import sys
from tests.evaluation.test_workers import linger
from vlmteacher.evaluation.processes import Processes
from vlmteacher.evaluation.workers import Workers
if __name__ == "__main__":
    with Processes(2) as executor:
        workers = Workers(executor)
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


def command(process: psutil.Process) -> str:
    """The process's command line; of one that has ended, nothing."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
