"""A sweep loses no result to dead processes, failing instances, full disks and damaged files."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.test_tables import pair  # noqa: F401 (a fixture)
from vlmteacher.cli import main
from vlmteacher.errors import InputError, OutputError, TaskFailed
from vlmteacher.evaluation import sweep
from vlmteacher.evaluation.microworld import Bench, run_benchmark
from vlmteacher.evaluation.tables import Table, run_table


def without_seconds(results: dict[str, Any]) -> dict[str, Any]:
    rows = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in results["instances"]]
    return {k: v for k, v in results.items() if not k.endswith("seconds_mean")} | {"instances": rows}


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(pair: Path, tmp_path: Path) -> None:  # noqa: F811
    alone = run_benchmark("base", 4, 1, tmp_path / "alone", pair=str(pair))
    log = tmp_path / "together/instances.jsonl"

    def kill_one() -> None:
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    together = run_benchmark("base", 4, 1, tmp_path / "together", workers=2, pair=str(pair))
    killer.join(1)
    assert not killer.is_alive()
    assert without_seconds(together) == without_seconds(alone)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_failing_instance_is_set_aside(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    work, tried = sweep._work, []

    def fail(bench: Bench, job: Any) -> Any:
        if job.instance.index == 1:
            tried.append(job.method.name)
            raise FloatingPointError("the loss is NaN")
        return work(bench, job)

    out, table = tmp_path / "out", tmp_path / "table"
    small = Table(main=("base",), others=("steps@0", "steps@1"), against=("base",))
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_work", fail)
        with pytest.raises(TaskFailed, match=r"1 of the instances failed, id 1 first \(FloatingPointError"):
            run_benchmark("base", 3, 1, out, pair=str(pair))
        assert tried == ["base"] * 3
        kept = json.loads((out / "results.json").read_text())
        assert [row["index"] for row in kept["instances"]] == [0, 2]
        (poison,) = map(json.loads, (out / "poison.jsonl").read_text().splitlines())
        assert (poison["methods"], poison["split"], poison["index"]) == (["base"], "id", 1)
        assert poison["failure"] == "FloatingPointError: the loss is NaN"
        with pytest.raises(TaskFailed):
            run_table(small, Bench(pair=str(pair)), 2, 1, table)
        content = json.loads((table / "table.json").read_text())  # of the scenes that all methods have
        assert content["left_out"] == {"": 2} and {entry["n"] for entry in content["methods"].values()} == {2}
        assert json.loads((table / "steps@0/results.json").read_text())["n"] == 2
        with pytest.raises(TaskFailed):  # nothing is left to write
            run_benchmark("base", 2, 1, tmp_path / "none", pair=str(pair), chosen=["maze"], resume=True)

    done = []
    monkeypatch.setattr(sweep, "_work", lambda bench, job: done.append(job.instance.index) or work(bench, job))
    assert run_benchmark("base", 3, 1, out, pair=str(pair), resume=True)["n"] == 3
    assert done == [1] and not (out / "poison.jsonl").exists()
    assert run_table(small, Bench(pair=str(pair)), 2, 1, table, resume=True)["methods"]["steps@1"]["n"] == 4


def test_the_command_line_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(bench: Bench, job: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(sweep, "_work", fail)
    command = ["bench", "microworld", "--method", "base", "--limit", "2", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "error: 2 of the instances failed, " in capsys.readouterr().err
    assert not (tmp_path / "out/results.json").exists()


def test_a_full_disk_stops_the_sweep(pair: Path, tmp_path: Path) -> None:  # noqa: F811
    first = run_benchmark("base", 1, 1, tmp_path / "one", pair=str(pair))
    log, before = tmp_path / "one/instances.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size * 5 // 2, before[1]))
    try:
        with pytest.raises(OutputError, match=r"instances\.jsonl cannot be written \(File too large\)"):
            run_benchmark("base", 4, 1, tmp_path / "one", resume=True, pair=str(pair))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert log.read_text().count("\n") == 2  # and a third row, cut off
    again = run_benchmark("base", 4, 1, tmp_path / "one", resume=True, pair=str(pair))
    assert again["n"] == 4 and again["instances"][0] == first["instances"][0]


def test_damaged_results_are_named(pair: Path, tmp_path: Path) -> None:  # noqa: F811
    run_benchmark("base", 1, 1, tmp_path / "good", pair=str(pair))
    for name, content, message in (
        ("instances.jsonl", b'{"method": "base"}\n', "is not a row"),
        ("instances.jsonl", b"[1, 2}\n", "is not a row"),
        ("instances.jsonl", b"\xff\xfe}\n", "is not a row"),
        ("settings.json", b"[" * 100_000, "nested too deep"),
        ("settings.json", b"", "not JSON"),
    ):
        bad = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", bad)
        (bad / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            run_benchmark("base", 1, 1, bad, resume=True, pair=str(pair))
        assert (bad / name).read_bytes() == content
        shutil.rmtree(bad)


def test_workers_must_be_some(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers must be at least 0, not -1"):
        run_benchmark("base", 1, 1, tmp_path / "out", workers=-1)


def test_a_second_sweep_in_one_folder_is_refused(pair: Path, tmp_path: Path) -> None:  # noqa: F811
    from vlmteacher.files import LOCK, claimed

    small = Table(main=("base",), others=(), against=("base",))
    for name in ("sweep", "table", "table/base"):
        with claimed(tmp_path / name), pytest.raises(InputError, match="being written to by another process"):
            if name == "sweep":
                run_benchmark("base", 1, 1, tmp_path / name, pair=str(pair))
            else:
                run_table(small, Bench(pair=str(pair)), 1, 1, tmp_path / "table", resume=True)
    run_benchmark("base", 1, 1, tmp_path / "sweep", pair=str(pair))
    assert not list(tmp_path.rglob(LOCK))
