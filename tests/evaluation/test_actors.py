"""Sweeps on Ray: the same rows as in this process, actors that die are replaced, nothing is told to anybody."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Run
from tests.evaluation.test_sweep import without_seconds
from tests.evaluation.test_tables import pair  # noqa: F401 (a fixture)
from tests.evaluation.test_workers import command, die, fall_over, find_disk_full, note_process, refuse, square, threads
from vlmteacher.errors import InputError, MissingExtra, Notice, OutputError, TaskFailed
from vlmteacher.evaluation import actors
from vlmteacher.evaluation.actors import Actors
from vlmteacher.evaluation.microworld import Bench
from vlmteacher.evaluation.sweep import run_method
from vlmteacher.evaluation.tables import Table, run_table
from vlmteacher.evaluation.workers import ATTEMPTS, Workers
from vlmteacher.files import claimed
from vlmteacher.interruption import Interrupted, endings_interrupt

pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    """Ray on this machine, with room for two actors beside `workers`; `Actors` leave it on."""
    ray = actors._import()
    before = signal.getsignal(signal.SIGTERM)
    actors._connect(ray, actors.LOCAL, 4)
    assert signal.getsignal(signal.SIGTERM) is before
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def workers(cluster: Any) -> Iterator[Workers]:
    with Actors("", 2) as executor:
        yield Workers(executor)


def test_results_are_those_of_this_process(workers: Workers) -> None:
    assert {task.result() for task in workers.run(square, ((x,) for x in range(9)))} == {x * x for x in range(9)}
    assert workers.finish(workers.submit(threads)) == 1
    assert workers.wait() is None


def test_a_killed_actor_is_replaced_and_its_task_tried_again(workers: Workers, tmp_path: Path) -> None:
    task = workers.submit(die, str(tmp_path), "once", 1)
    others = [workers.submit(square, x) for x in range(4)]
    hopeless = workers.submit(die, str(tmp_path), "always", 99)
    assert {id(each) for each in workers.finish_all()} == {id(each) for each in (task, hopeless, *others)}
    assert (task.result(), task.attempts, task.failure) == ("once", 2, None)
    assert [each.result() for each in others] == [0, 1, 4, 9]
    assert hopeless.attempts == ATTEMPTS == int((tmp_path / "always").read_text())
    with pytest.raises(TaskFailed, match=r"3 times.*the Ray actor died, ActorDiedError"):
        workers.finish(hopeless)
    for pid in {task.result() for task in workers.run(note_process, ((str(tmp_path), str(k)) for k in range(4)))}:
        os.kill(pid, signal.SIGKILL)  # an idle one
    assert workers.finish(workers.submit(square, 5)) == 25


def test_exceptions_are_failures_or_stop_all(workers: Workers, tmp_path: Path) -> None:
    assert workers.finish(workers.submit(fall_over, str(tmp_path), "twice", 2)) == "twice"
    with pytest.raises(InputError, match="the pair is not there"):  # of all instances
        workers.finish(workers.submit(refuse))
    with pytest.raises(OutputError, match=r"results\.json cannot be written"):
        workers.finish(workers.submit(find_disk_full))
    assert workers.finish(workers.submit(square, 3)) == 9


def test_actors_without_room_hold_no_task(cluster: Any) -> None:
    with pytest.warns(Notice, match="room for 4 of 5 workers"), Actors("", 5) as executor:
        assert [task.result() for task in Workers(executor).run(square, ((x,) for x in range(3)))]


def test_a_signal_is_named(cluster: Any) -> None:
    with pytest.raises(Interrupted) as stop, endings_interrupt(), Actors("", 1) as executor:
        workers = Workers(executor)
        workers.submit(time.sleep, 600)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        workers.wait()
    assert stop.value.status == 143


@pytest.mark.slow(days=28)
def test_an_actor_killed_in_the_middle_changes_nothing(pair: Path, tmp_path: Path) -> None:  # noqa: F811
    bench, log = Bench(pair=str(pair)), tmp_path / "together/instances.jsonl"
    alone = run_method("base", bench, ["id"], 4, 1, tmp_path / "alone")
    killed = []

    def kill_one() -> None:
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        victim = next(one for one in psutil.process_iter() if "ray::_Served" in command(one))
        victim.kill()
        killed.append(victim.pid)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    together = run_method("base", bench, ["id"], 4, 1, tmp_path / "together", 2, ray="")
    killer.join(1)
    assert killed and without_seconds(together) == without_seconds(alone)
    with claimed(tmp_path / "held"), pytest.raises(InputError, match="being written to by another process"):
        run_method("base", bench, ["id"], 4, 1, tmp_path / "held", 2, ray="")


@pytest.mark.slow
def test_a_table_is_that_of_this_process(pair: Path, tmp_path: Path) -> None:  # noqa: F811
    small = Table(tuning=True, main=("base", "pass@2"), others=("steps@1",), against=("base",))
    tables = []
    for name, ray in (("alone", None), ("ray", "")):
        run_table(small, Bench(pair=str(pair)), 2, 1, tmp_path / name, 2 if ray is not None else 0, ray=ray)
        tables.append(json.loads((tmp_path / name / "table.json").read_text()))
        for method in tables[-1]["methods"].values():
            del method["seconds_mean"]
    assert tables[0] == tables[1]
    for path in (tmp_path / "alone").glob("*/results.json"):
        other = tmp_path / "ray" / path.relative_to(tmp_path / "alone")
        assert without_seconds(json.loads(path.read_text())) == without_seconds(json.loads(other.read_text()))


def test_the_example_sweeps_in_actors(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--lr", "3e-4", "--limit", "1", "--steps", "0", "--workers", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sweep_on_ray.py", *flags])
    runpy.run_path(str(Path(__file__).parents[2] / "examples/sweep_on_ray.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "0.0003"
    results = json.loads((tmp_path / "lr-0.0003/results.json").read_text())
    assert results["n"] == 1 and results["splits"]["validation"]["n"] == 1 and results["learning_rate"] == 3e-4


def test_no_telemetry_no_dashboard(cluster: Any) -> None:
    from ray._common.usage import usage_lib

    assert not usage_lib.usage_stats_enabled()
    assert not cluster._private.worker._global_node.webui_url
    processes = psutil.Process().children(recursive=True)
    (raylet,) = (one for one in processes if "raylet/raylet" in command(one))  # hands its environment on
    assert raylet.environ()["RAY_USAGE_STATS_ENABLED"] == "0"
    here = {address.address for group in psutil.net_if_addrs().values() for address in group}
    for process in processes:
        connections = []
        with suppress(psutil.NoSuchProcess):  # an actor of an earlier test ends
            connections = process.net_connections("inet")
        for connection in connections:
            assert not connection.raddr or connection.raddr.ip.removeprefix("::ffff:") in here


def test_ray_is_missing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'vlmteacher\[ray\]'"):
        Actors("")
    command = ["bench", "microworld", "--method", "base", "--limit", 1, "--out", tmp_path / "out", "--ray"]
    status, _, err = run(*command)
    assert status == 2 and "error: workers on Ray need the package ray" in err and not (tmp_path / "out").exists()
    status, _, err = run(*command, "--workers", 0)
    assert status == 2 and "at least 1, not 0" in err and not (tmp_path / "out").exists()
