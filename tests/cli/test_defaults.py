"""`solve --config FILE` and `solve --plan FILE`: flags from a file, and a run repeated by its run.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.conftest import Run
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.cli import parser


def parsed(*arguments: str) -> Any:
    return parser().parse_args(["solve", *arguments])


def test_the_command_line_takes_precedence(tmp_path: Path) -> None:
    values = {"prompt": PROMPT, "seed": 3, "teacher-frames": 4, "lr": "5e-3", "preserve": True, "keep": "best"}
    values |= {"queries": QUERIES, "transformer": ["a", "b"], "reward": "temporal_smoothness=1", "offload": True}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    for place in (["--config", str(file), "--seed", "0"], ["--seed", "0", f"--config={file}"]):
        got = parsed(*place, "--out", "x", "--no-preserve")
        assert (got.prompt, got.seed, got.teacher_frames, got.learning_rate) == (PROMPT, 0, 4, 0.005)
        assert (got.preserve, got.keep, got.offload, got.transformer) == (False, "best", True, ["a", "b"])
        assert got.queries == QUERIES and got.reward == ["temporal_smoothness=1"]
    assert parsed("--config", str(file), "--out", "x").seed == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: -1", "seed cannot be -1"),
        ("seeds: 1", "there is no flag 'seeds': did you mean seed?"),
        ("keep: worst", "keep must be last or best, not 'worst'"),
        ("rank: 2.5", "rank cannot be 2.5"),
        ("offload: 3", "offload must be true or false, not 3"),
        ("num_frames: [5, 9]", "num_frames must be a text or a number, not [5, 9]"),
        ("- 1", "must be a mapping of `flag: value`"),
        ("config: a.yaml", "there is no flag 'config'"),
        ("{config: 1, models: {}, prompt: x}", "is not run.json of a run"),
        ("seed: &a 1", None),
    ],
)
def test_files_that_are_refused(run: Run, tmp_path: Path, content: str, message: str | None) -> None:
    (tmp_path / "a.yaml").write_text(content)
    status, out, err = run("solve", "--config", tmp_path / "a.yaml", "--out", tmp_path / "run")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert (message or "--prompt") in err
    assert not (tmp_path / "run").exists()


def test_a_run_is_repeated_by_its_record(run: Run, solve: Any, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "first.png")
    image = ["--image", tmp_path / "first.png"]
    given = solve(out=tmp_path / "one", max_steps=2, seed=3, preserve=None)
    assert run(*given, *image, "--reward", "temporal_smoothness=0.25", "--num-inference-steps", 2)[0] == 0
    again = ["solve", "--config", tmp_path / "one/run.json", "--out", tmp_path / "two"]
    status, _, err = run(*again)
    assert status == 2 and "give --image" in err and not (tmp_path / "two").exists()
    assert run(*again, *image)[0] == 0
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert one["config"] == two["config"] and one["models"] == two["models"] and one["queries"] == two["queries"]
    assert [row["loss"] for row in one["steps"]] == [row["loss"] for row in two["steps"]]


@pytest.mark.slow
def test_a_plan_s_settings_are_solved_with(run: Run, tmp_path: Path) -> None:
    pair = ["--reasoner", "packaged", "--teacher", "packaged"]
    flags = ["--teacher-frames", 6, "--rank", 4, "--dtype", "float32"]
    status, out, _ = run("plan", *pair, *flags, "-o", tmp_path / "plan.json")
    assert status == 0 and "solve --plan" in out and "seconds of a step" in out and "H100" in out
    got = parsed("--plan", str(tmp_path / "plan.json"), "--prompt", PROMPT, "--out", "x")
    assert (got.teacher_frames, got.rank, got.dtype, got.num_frames, got.activations) == (6, 4, "float32", 13, "all:5")
    assert got.reasoner is None and got.decoder is None and not got.offload
    real = [
        "--reasoner",
        "wan2.1-t2v-1.3b",
        "--teacher",
        "qwen3-vl-2b",
        "--num-frames",
        5,
        "--height",
        64,
        "--width",
        64,
    ]
    assert run("plan", *real, "--text-encoder", "cpu", "-o", tmp_path / "real.json")[0] == 0
    got = parsed("--plan", str(tmp_path / "real.json"), "--prompt", PROMPT, "--out", "x")
    assert (
        got.reasoner == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        and got.teacher == "Qwen/Qwen3-VL-2B-Instruct"
        and got.offload
    )
    status, _, err = run("plan", *real, "--memory", 1, "-o", tmp_path / "none.json")
    assert status == 2 and "--memory 1 is below the floor, " in err and not (tmp_path / "none.json").exists()
    status, _, err = run("solve", "--plan", tmp_path / "plan.json/x", "--prompt", PROMPT, "--out", tmp_path / "run")
    assert status == 2 and err.count("\n") == 1
