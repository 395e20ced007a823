"""The folder of runs: what is listed, and that no name leads out of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmteacher.app.folders import Runs
from vlmteacher.errors import InputError

RECORD: dict[str, Any] = {
    "prompt": "a <b>prompt</b>",
    "config": {"seed": 0, "threshold": 0.22, "check_final": False, "learning_rate": 1e-3, "final_samples": 1},
    "queries": {"goal": "Is it there?", "process": []},
    "models": {},
    "steps": [{"step": 0, "loss": 1.0, "p_yes": [0.4]}],
    "stopped": "interrupted",
}
RESULTS = {"p_yes_before": [0.3], "p_yes_after": [0.9], "loss_before": 1.2, "loss_after": 0.1, "stopped": "threshold"}


def write(folder: Path, name: str, content: object, age: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    os.utime(folder / name, (1e9 - age, 1e9 - age))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    root = tmp_path / "runs"
    write(root / "a", "run.json", RECORD, age=2)
    write(root / "deep/b", "run.json", RECORD | RESULTS, age=1)
    write(root / "broken", "run.json", {"prompt": 1})
    write(root / "sweeps/base", "results.json", {})
    (tmp_path / "secret").mkdir()
    write(tmp_path / "secret", "run.json", RECORD)
    (root / "a/report.html").write_text("page")
    return Runs(root)


def test_the_newest_runs_come_first_and_broken_ones_are_left_out(runs: Runs) -> None:
    assert [(entry.name, entry.outcome) for entry in runs.entries()] == [("deep/b", "solved"), ("a", "unfinished")]
    assert runs.entries()[0].goal == (0.3, 0.9)
    write(runs.root / "a", "run.json", RECORD | RESULTS, age=-5)  # it has ended since
    assert [(entry.name, entry.outcome) for entry in runs.entries()] == [("a", "solved"), ("deep/b", "solved")]


def test_sweeps_are_those_in_the_folder(runs: Runs) -> None:
    assert runs.sweeps() == ["sweeps/base"]
    assert runs.sweep_folders(["sweeps/base"]) == [runs.root / "sweeps/base"]
    for names in ([], ["../secret"], ["a"]):
        with pytest.raises(InputError, match=r"choose one|there is no sweep"):
            runs.sweep_folders(names)


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc", "", "a//b", "a/\0", "none", "x" * 300])
def test_no_name_leads_out(runs: Runs, name: str) -> None:
    assert runs.file(name, "run.json") is None
    with pytest.raises(InputError, match="there is no run"):
        runs.record(name)


def test_files_are_those_of_the_list_and_no_links_out(runs: Runs) -> None:
    assert runs.file("a", "report.html") == runs.root / "a/report.html"
    (runs.root / "a/state.pt").write_text("state")
    (runs.root / "a/after.mp4").symlink_to(runs.root.parent / "secret/run.json")
    (runs.root / "linked").symlink_to(runs.root.parent / "secret")
    assert runs.file("a", "state.pt") is None and runs.file("a", "../../secret/run.json") is None
    assert runs.file("a", "after.mp4") is None and runs.file("linked", "run.json") is None
    assert "linked" not in [entry.name for entry in runs.entries()]


def test_a_first_frame_that_is_missing_is_named(runs: Runs) -> None:
    assert runs.first_frame("a") is None
    write(runs.root / "a", "run.json", RECORD | {"config": {**RECORD["config"], "image": "digest"}})
    with pytest.raises(InputError, match="solve --resume"):
        runs.first_frame("a")
    Image.new("RGB", (4, 4), "red").save(runs.root / "a/first_frame.png")
    frame = runs.first_frame("a")
    assert frame is not None and frame.getpixel((0, 0)) == (255, 0, 0)


def test_new_folders_are_named_after_the_prompt_and_never_twice(runs: Runs) -> None:
    one = runs.new("Move: the <red> ball/../x")
    two = runs.new("Move: the <red> ball/../x", [one])
    assert one != two and one.name.endswith("move-the-red-ball-x") and one.parent == runs.root
    assert len(runs.new("word " * 1000).name) <= 60
