"""`solve` is killed, at random and at every change of a name in its folder; `--resume` ends equal to the bit."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Solve
from tests.trust.forking import Forks, Result
from tests.trust.report import count
from vlmteacher.runs.folder import RECORD

STEPS = 8


@pytest.fixture(scope="module")
def whole(forks: Forks, solve: Solve, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = forks.run(solve(folder, max_steps=STEPS), folder=str(folder), renames=True)
    assert result.status == 0, result.err
    return folder, result


def same(folder: Path, other: Path) -> None:
    """Both hold the same finished run."""
    assert {file.name for file in folder.iterdir()} == {file.name for file in other.iterdir()}
    for name in ("lora.safetensors", "queries.json", "before.mp4", "after.mp4"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    records: Any = [json.loads((each / RECORD).read_text()) for each in (folder, other)]
    for record in records:
        for name in ("seconds", "memory", "command"):
            record.pop(name, None)
        for row in record["steps"]:
            del row["seconds"]
    assert records[0] == records[1]


def take_up(forks: Forks, solve: Solve, folder: Path, whole: Path) -> None:
    """What a killed run left opens in one of two ways, and ends as if nothing had happened."""
    if (folder / RECORD).exists():
        refused = forks.run(solve(folder, max_steps=STEPS))
        assert refused.status == 2 and "already holds a run" in refused.err and "--resume" in refused.err
        assert len(refused.err.splitlines()) == 1
        resumed = forks.run(solve(folder, "--resume", max_steps=STEPS))
    else:  # it counts as empty
        resumed = forks.run(solve(folder, max_steps=STEPS))
    assert resumed.status == 0, resumed.err
    same(folder, whole)


def kill_and_resume(
    forks: Forks, solve: Solve, whole: tuple[Path, Result], folder: Path, signals: list[int], seed: int
) -> int:
    """Kill a run at random until it has ended; how often."""
    draw = random.Random(seed)
    kills = 0
    while True:
        flags = ["--resume"] if (folder / RECORD).exists() else []
        number = draw.choice(signals)
        moment = (draw.uniform(0, 1.1 * whole[1].seconds), number)
        result = forks.run(solve(folder, *flags, max_steps=STEPS), signals=[moment])
        if result.status == 0:
            break
        kills += 1
        assert result.status == 128 + number, result.err
        if number != signal.SIGKILL and result.err.splitlines():
            assert result.err.splitlines()[-1].startswith("interrupted")
        assert "Traceback" not in result.err
    take_up(forks, solve, folder, whole[0])
    return kills


@pytest.mark.slow
def test_a_kill_at_every_rename(forks: Forks, solve: Solve, whole: tuple[Path, Result], tmp_path: Path) -> None:
    assert whole[1].changes > STEPS
    for nth in range(1, whole[1].changes + 1):
        folder = tmp_path / str(nth)
        killed = forks.run(solve(folder, max_steps=STEPS), folder=str(folder), nth=nth, renames=True)
        assert killed.status == 128 + signal.SIGKILL
        take_up(forks, solve, folder, whole[0])
    count("SIGKILL of solve before the n-th rename, for every n", whole[1].changes, "resumed, equal to the bit")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow(days=28)) for seed in range(1, 130))])
def test_kills_at_random(forks: Forks, solve: Solve, whole: tuple[Path, Result], tmp_path: Path, seed: int) -> None:
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    kills = kill_and_resume(forks, solve, whole, tmp_path / "run", signals, seed)
    count("SIGKILL, SIGTERM, SIGHUP and SIGINT of solve at random moments", kills, "resumed, equal to the bit")
