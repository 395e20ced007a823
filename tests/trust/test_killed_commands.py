"""Trainings, sweeps and the demo are killed at random; taken up again, they end as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distillation.conftest import data  # noqa: F401 (a fixture)
from tests.trust.forking import Forks, Result
from tests.trust.report import count
from tests.trust.test_kills import same
from vlmteacher.cli import RESUMABLE

TRAINING = {"steps": 6, "batch_size": 2, "learning_rate": 1e-3, "rank": 2, "save_every": 2, "log_every": 3, "seed": 0}
DISTILLING = {**TRAINING, "timesteps": [1000, 500], "validate_every": 3}
DECODER = {"num_frames": 5, "height": 32, "width": 48, "widths": [16, 12, 8, 8], "batch_size": 1, "held_out": 1}
CONFIGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "sft": (["train", "sft"], {**TRAINING, "held_out": 1, "sample_steps": 2, "validate_every": 3, "ema": 0.9}),
    "few-timesteps": (["distill", "reasoner"], {**DISTILLING, "method": "few-timesteps", "full": True}),
    "dmd2": (
        ["distill", "reasoner"],
        {**DISTILLING, "method": "dmd2", "dmd2": {"fake_updates": 2, "guidance": 2.0, "gan_weight": 0.01}},
    ),
    "consistency": (["distill", "reasoner"], {**DISTILLING, "method": "consistency"}),
    "decoder": (["distill", "decoder"], {**TRAINING, **DECODER, "validate_every": 3}),
}
BENCH = ["bench", "microworld", "--limit", "3", "--method"]
SWEEPS = {"base": [*BENCH, "base"], "steps@1": [*BENCH, "steps@1"]}
NAMES = [*CONFIGS, *SWEEPS, "demo"]
SLOW = pytest.mark.slow(days=28)

Make = Callable[[str, Path], list[str]]


@pytest.fixture(scope="module")
def command(models: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:  # noqa: F811
    """The arguments of a command by its name that writes to a folder."""
    configs = tmp_path_factory.mktemp("configs")

    def make(name: str, out: Path) -> list[str]:
        if name not in CONFIGS:
            return [*SWEEPS.get(name, ["demo"]), "--out", str(out)]
        arguments, values = CONFIGS[name]
        source = {"vae" if name == "decoder" else "reasoner": models["reasoner"], "data": str(data)}
        path = configs / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | source))
        return [*arguments, "--config", str(path), "--out", str(out)]

    return make


@pytest.fixture(scope="module")
def whole(
    forks: Forks, command: Make, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Result]]:
    """A run of a command that nothing interrupted, made once."""
    runs: dict[str, tuple[Path, Result]] = {}

    def run(name: str) -> tuple[Path, Result]:
        if name not in runs:
            folder = tmp_path_factory.mktemp("whole") / "run"
            runs[name] = folder, forks.run(command(name, folder), folder=str(folder), renames=True)
            assert runs[name][1].status == 0, runs[name][1].err
        return runs[name]

    return run


def timeless(value: Any) -> Any:
    """Without what is measured: seconds, speeds, memory."""
    if isinstance(value, dict):
        left_out = ("seconds", "second", "seconds_mean", "gigabytes", "query_seconds")
        return {key: timeless(each) for key, each in value.items() if not key.endswith(left_out)} | {
            key: None for key in value if key == "seconds_per_step"
        }
    return [timeless(each) for each in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """The content of a file without what is measured, and without the folder's name."""
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [
            {k: v for k, v in timeless(json.loads(row)).items() if k != "seconds_per_step"}
            for row in path.read_text().splitlines()
        ]
    return path.read_bytes()


def check_same(name: str, folder: Path, other: Path) -> None:
    """Check that both folders hold the same results; only states, which also hold how they were reached, may differ."""
    if name == "demo":
        return same(folder, other)
    files, expected = (
        {str(file.relative_to(each)): file for file in each.rglob("*") if file.is_file() and file.name != "state.pt"}
        for each in (folder, other)
    )
    assert files.keys() == expected.keys()
    for file in files:
        assert content(files[file]) == content(expected[file]), file


def take_up(forks: Forks, arguments: list[str], out: Path, **how: Any) -> Result:
    """Run a command, with --resume where its folder holds something to resume."""
    begun = any((out / file).exists() for file in RESUMABLE)
    return forks.run([*arguments, *(["--resume"] if begun else [])], **how)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow(days=28)
def test_killed_at_random(
    forks: Forks, command: Make, whole: Callable[[str], tuple[Path, Result]], tmp_path: Path, name: str, seed: int
) -> None:
    """By SIGKILL and the signals that end a program, until it has ended."""
    expected, result = whole(name)
    arguments, draw, kills = command(name, tmp_path / "run"), random.Random(f"{name} {seed}"), 0
    while True:
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        moment = draw.uniform(0.2, 1.0) * result.seconds
        ended = take_up(forks, arguments, tmp_path / "run", signals=[(moment, number)])
        if ended.status == 0:
            break
        kills += 1
        assert ended.status == 128 + number, ended.err
        assert "Traceback" not in ended.err, ended.err
        if kills == 3:
            ended = take_up(forks, arguments, tmp_path / "run")
            assert ended.status == 0, ended.err
            break
    check_same(name, tmp_path / "run", expected)
    count(f"SIGKILL, SIGTERM and SIGINT of {' '.join(arguments[:2])} at random moments", kills, "resumed, equal")


@pytest.mark.parametrize("name", ["sft", *(pytest.param(name, marks=SLOW) for name in NAMES if name != "demo")])
def test_killed_before_a_rename(
    forks: Forks,
    command: Make,
    whole: Callable[[str], tuple[Path, Result]],
    tmp_path: Path,
    name: str,
    request: pytest.FixtureRequest,
) -> None:
    """Whatever file is not yet under its name; all of them behind the marker."""
    expected, result = whole(name)
    all_of_them = request.node.get_closest_marker("slow")
    places = range(1, result.changes + 1) if all_of_them else (1, result.changes // 2)
    for nth in places:
        out = tmp_path / str(nth)
        arguments = command(name, out)
        killed = forks.run(arguments, folder=str(out), nth=nth, renames=True)
        assert killed.status == 128 + signal.SIGKILL, killed.err
        ended = take_up(forks, arguments, out)
        assert ended.status == 0, ended.err
        check_same(name, out, expected)
        shutil.rmtree(out)
    count(f"SIGKILL of {' '.join(arguments[:2])} before the n-th rename", len(places), "resumed, equal")
