"""A picture of the goal: from the call to the Teacher's questions, in the record, in plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Run
from tests.test_pipeline import FAST, seed
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher import InputError, QuerySet, TeacherPipeline


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def test_the_goal_reaches_the_teacher_and_the_record(pipe: TeacherPipeline, tmp_path: Path) -> None:
    def call(goal: Any, **keywords: Any) -> Any:
        same = {"generator": seed(), "queries": QUERIES, "output_type": "pt", **FAST}
        return pipe(PROMPT, goal_image=goal, **same, **keywords)

    run = tmp_path / "run"
    output, without = call(picture(0), run_dir=run), call(None)
    indices = [round(k * (len(output.frames) - 1) / 3) for k in range(4)]
    with torch.no_grad():
        for judge, result in ((pipe.teacher.with_goal(picture(0)), output), (pipe.teacher, without)):
            losses = judge.losses(result.frames[indices], indices, pipe.reasoner.fps, QuerySet.from_dict(QUERIES))
            assert losses.neg().exp().tolist() == pytest.approx(result.p_yes_after, rel=1e-4)
    assert output.history[0]["loss"] != pytest.approx(without.history[0]["loss"], rel=1e-3)
    assert output.history[0]["grad_norm"] > 0 and getattr(pipe.teacher, "goal", None) is None
    config = json.loads((run / "run.json").read_text())["config"]
    assert config["goal_image"] and config["image"] is None and without.config["goal_image"] is None
    for other in (picture(1), None):
        with pytest.raises(InputError, match="holds a run with another goal_image"):
            call(other, run_dir=run, resume=True)
    assert call(picture(0), run_dir=run, resume=True).lora == output.lora
    with pytest.raises(InputError, match="the goal_image is 32x32 pixels, the video 48x32"):
        call(picture(0).crop((0, 0, 32, 32)))


def test_on_the_command_line(run: Run, solve: Any, tmp_path: Path) -> None:
    picture(0).resize((96, 64)).save(tmp_path / "goal.png")
    assert run(*solve(out=tmp_path / "run", goal_image=tmp_path / "goal.png", max_steps=1))[0] == 0
    record = tmp_path / "run" / "run.json"
    assert json.loads(record.read_text())["config"]["goal_image"]
    status, _, err = run("solve", "--config", record, "--out", tmp_path / "again")
    assert status == 2 and "give --goal-image" in err
    status, _, err = run(*solve(out=tmp_path / "other", goal_image=tmp_path / "none.png"))
    assert status == 2 and "none.png does not exist" in err


@pytest.mark.slow
def test_a_plan_counts_its_tokens(run: Run) -> None:
    plan = ["plan", "--reasoner", "packaged", "--teacher", "packaged", "--json"]
    with_goal, without = (json.loads(run(*plan, *more)[1]) for more in (["--goal-image"], []))
    frame = (64 // 16) ** 2  # visual tokens of one picture of the packaged pair's size, 8 pixels a patch, 2x2 merged
    more = with_goal["teacher_tokens"] - without["teacher_tokens"]
    assert frame < more < frame + 40  # and the words about it
    assert with_goal["ours"]["flops"] > without["ours"]["flops"]
    assert with_goal["goal_image"] and not without["goal_image"]
