"""Tables of several seeds become one table over all their scenes, and the log counts the runs of each seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools import pool_seeds
from tools.pool_seeds import METHOD, count_run, pooled
from tools.results_tables import full, short
from vlmteacher.errors import InputError
from vlmteacher.evaluation.formats import write_table
from vlmteacher.evaluation.microworld import Bench
from vlmteacher.evaluation.tables import describe_table, find_table
from vlmteacher.files import write_json

SUCCESS = {"base": [0, 0, 1, 0], "goal-only": [0, 1, 1, 0], "teacher": [1, 1, 1, 0]}  # of the scenes of a split


def row(method: str, split: str, index: int, success: bool) -> dict[str, Any]:
    return {
        **{"method": method, "split": split, "index": index, "noise": 0, "task": ("move", "maze")[index % 2]},
        **{"success": success, "score": float(success), "subscores": {}, "updates": 3 * (method != "base")},
        **{"seconds": 1.0, "query_seconds": 0.1, "generator_calls": 1, "vlm_calls": 1},
    }


def table(folder: Path, seed: int, scenes: int = 4) -> Path:
    rows = {
        method: [row(method, split, k, bool(won[k])) for split in ("id", "ood") for k in range(scenes)]
        for method, won in SUCCESS.items()
    }
    folder.mkdir()
    content = describe_table(find_table("paper"), Bench(seed=seed), rows, {})
    write_table(content | {"limit": scenes, "noises": 1, "left_out": {}}, folder)
    for method, instances in rows.items():
        (folder / method).mkdir()
        write_json(folder / method / "results.json", {"instances": instances})
    return folder


def test_scenes_of_all_seeds_count(tmp_path: Path) -> None:
    folders = [table(tmp_path / str(seed), seed) for seed in (11, 12, 13)]
    content = pooled(folders)
    teacher, goal = content["methods"]["teacher"], content["methods"]["goal-only"]
    assert content["seeds"] == [11, 12, 13] and teacher["n"] == 24 and teacher["success_rate"] == 0.75
    one = json.loads((folders[0] / "table.json").read_text())["methods"]["teacher"]
    assert teacher["high"] - teacher["low"] < one["high"] - one["low"]  # the scenes of each seed are others
    assert (teacher["against"]["base"]["wins"], teacher["against"]["base"]["losses"]) == (12, 0)
    assert (goal["against"][METHOD]["wins"], goal["against"][METHOD]["losses"]) == (0, 6)
    part = content["tasks"]["ood/move"]
    assert (part["n"], part["base"], part["teacher"], part["wins"], part["sign_p"]) == (6, 0.5, 1.0, 3, 0.25)
    assert "| teacher | .75 [" in short(content["methods"]) and "`goal-only`" in full(content["methods"])


def test_only_runs_of_one_command_are_pooled(tmp_path: Path) -> None:
    first, same, fewer = table(tmp_path / "a", 11), table(tmp_path / "b", 11), table(tmp_path / "c", 12, scenes=2)
    for folders, message in (((first, same), "same seed"), ((first, fewer), "differs from .* in limit")):
        with pytest.raises(InputError, match=message):
            pooled(folders)
    shutil.rmtree(same)
    with pytest.raises(InputError, match=r"table\.json"):
        pooled((first, same))


def test_runs_of_a_seed_are_counted(tmp_path: Path) -> None:
    log = tmp_path / "seeds.json"
    shutil.copy(pool_seeds.LOG, log)
    for _ in range(2):
        content = count_run([99_999], ["base", "teacher"], "a test", log)
    assert content["99999"]["runs"] == 2 and json.loads(log.read_text()) == content
    assert content["1"]["runs"] is None  # looked at before the log began
