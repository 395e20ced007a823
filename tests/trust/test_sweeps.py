"""A sweep whose workers, driver or both are killed, and one that is interrupted, ends with `--resume` as if whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.evaluation.test_sweep import without_seconds
from tests.evaluation.test_tables import pair  # noqa: F401 (a fixture)
from tests.evaluation.test_workers import command, runs, wait_for
from tests.trust.forking import ROOT, Forks, Result
from tests.trust.report import count

LIMIT = 6
Bench = Callable[..., list[str]]


@pytest.fixture(scope="module")
def bench(pair: Path) -> Bench:  # noqa: F811
    """Arguments of a small sweep that starts or goes on."""

    def bench(out: Path, *flags: str) -> list[str]:
        what = flags if "--table" in flags else ("--method", "base", *flags)
        return ["bench", "microworld", *what, "--limit", str(LIMIT), "--pair", str(pair), "--out", str(out), "--resume"]

    return bench


@pytest.fixture(scope="module")
def whole(forks: Forks, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Result]:
    """The results of a sweep that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = forks.run(bench(folder))
    assert result.status == 0, result.err
    return results(folder), result


def results(folder: Path) -> dict[str, Any]:
    return without_seconds(json.loads((folder / "results.json").read_text()))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow(days=28)) for seed in range(1, 14))])
def test_signals_at_random(
    forks: Forks, bench: Bench, whole: tuple[dict[str, Any], Result], tmp_path: Path, seed: int
) -> None:
    draw, kills, out = random.Random(seed), 0, tmp_path / "run"
    while True:
        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
        result = forks.run(bench(out), signals=[(draw.uniform(0, 1.1 * whole[1].seconds), number)])
        if result.status == 0:
            break
        kills += 1
        assert result.status == 128 + number, result.err
        if number != signal.SIGKILL and result.err:
            assert result.err.splitlines()[-1].startswith("interrupted") and "Traceback" not in result.err
    if not (out / "results.json").exists():  # the signal came when all was done
        assert forks.run(bench(out)).status == 0
    assert results(out) == whole[0]
    count("SIGKILL, SIGTERM, SIGHUP and SIGINT of a sweep at random moments", kills, "resumed, equal")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_table_is_interrupted(forks: Forks, bench: Bench, tmp_path: Path, number: int, status: int) -> None:
    out = tmp_path / "table"
    log = out / "base/instances.jsonl"
    result = forks.run(bench(out, "--table", "remedies"), when=str(log), signals=[(0.5, number)])
    assert result.status == status and "Traceback" not in result.err
    assert result.err.splitlines()[-1] == "interrupted; the same with --resume goes on"
    assert {json.loads(line)["method"] for line in log.read_text().splitlines()} <= {"base"}
    assert not (out / "table.json").exists() and not list(out.rglob(".lock"))


class Started:
    """The command line in a process of its own, and the processes that are its workers."""

    def __init__(self, arguments: list[str], worker: str) -> None:
        self.log, self.worker = Path(arguments[arguments.index("--out") + 1]) / "instances.jsonl", worker
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.driver = subprocess.Popen([sys.executable, "-m", "vlmteacher", *arguments], cwd=ROOT, env=environment)

    def workers(self) -> list[psutil.Process]:
        return [one for one in psutil.Process(self.driver.pid).children(recursive=True) if self.worker in command(one)]

    def wait_for_a_row(self) -> None:
        rows = self.rows()
        while self.rows() == rows:
            assert self.driver.poll() is None
            time.sleep(0.01)

    def rows(self) -> int:
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "worker"), [(("--workers", "2"), "spawn_main"), (("--ray", "--workers", "2"), "ray::_Served")]
)
def test_workers_driver_and_both_are_killed(
    flags: tuple[str, ...], worker: str, bench: Bench, whole: tuple[dict[str, Any], Result], tmp_path: Path
) -> None:
    arguments = bench(tmp_path / "run", *flags)
    for both in (False, True):
        sweep = Started(arguments, worker)
        sweep.wait_for_a_row()
        victims = sweep.workers()
        assert len(victims) == 2
        if both:
            victims[0].kill()
            sweep.driver.kill()
        else:
            victims[0].kill()  # in the middle of an instance
            sweep.wait_for_a_row()
            sweep.driver.kill()
        assert sweep.driver.wait() == -signal.SIGKILL and 0 < sweep.rows() < LIMIT
        for one in victims:
            wait_for(lambda pid=one.pid: not runs(pid), 30)
    assert Started(arguments, worker).driver.wait() == 0
    assert results(tmp_path / "run") == whole[0]
    count("SIGKILL of a worker, of the driver and of both in a sweep", 3, "resumed, equal")
