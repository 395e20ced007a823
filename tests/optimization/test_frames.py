"""The frames that the Teacher sees, by change, and the windows that it judges one by one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run
from tests.test_pipeline import FAST, seed
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher import InputError, QuerySet, TeacherPipeline
from vlmteacher.optimization.frames import indices_by_change, teacher_frame_indices, uniform_indices, window_losses
from vlmteacher.settings import Settings


def moving(changes: list[float]) -> torch.Tensor:
    """Latents (1, 2, T, 3, 3) whose frames differ by these amounts, one after the other."""
    steps = torch.tensor([0.0, *changes]).cumsum(0)
    return steps.view(1, 1, -1, 1, 1).expand(1, 2, -1, 3, 3)


@pytest.mark.parametrize("count", [1, 2, 5, 24, 81])
def test_a_video_without_changes_has_uniform_frames(count: int) -> None:
    for latents in (moving([0.0] * 20), moving([0.3] * 20)):
        indices = indices_by_change(latents, 4, 0, 81, count)
        expected = teacher_frame_indices(81, count)
        assert max(abs(a - b) for a, b in zip(indices, expected, strict=True)) <= 1


@pytest.mark.parametrize("count", [3, 12, 40, 80, 81])
@pytest.mark.parametrize("at", [0, 9, 19])
def test_frames_are_denser_where_the_video_changes(count: int, at: int) -> None:
    indices = indices_by_change(moving([float(k == at) for k in range(20)]), 4, 0, 81, count)
    assert indices == sorted({*indices}) and len(indices) == count and (indices[0], indices[-1]) == (0, 80)
    inside = sum(4 * at < index <= 4 * at + 4 for index in indices)
    assert inside == 4 if count >= 40 else inside >= (count - 2) // 4
    gaps = [b - a for a, b in pairwise(indices)]
    assert max(gaps) <= 2 * 80 / (count - 1) + 1  # at most twice that of uniform ones


@pytest.mark.parametrize("how", ["mean", "softmax"])
def test_windows_are_passes_of_their_own(pipe: TeacherPipeline, how: Any) -> None:
    settings = Settings(teacher_frames=3, windows=3, window_loss=how)
    indices = uniform_indices(33, settings)
    assert indices == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    frames = torch.rand(9, 3, 32, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    queries, teacher = QuerySet.from_dict(QUERIES), pipe.teacher

    def alone(places: list[int], question: str) -> torch.Tensor:
        return teacher.losses(frames[places], [indices[k] for k in places], 8.0, QuerySet(question))[0]

    expected = [alone([0, 4, 8], queries.goal)]
    for question in queries.process:
        p_yes = torch.stack([alone(list(range(k, k + 3)), question) for k in (0, 3, 6)]).neg().exp()
        expected.append(-p_yes.log().mean() if how == "mean" else (1 / p_yes).mean().log())
    ours = window_losses(teacher, frames, indices, 8.0, queries, settings)
    torch.testing.assert_close(ours, torch.stack(expected))
    weights = torch.tensor([0.5, 0.3, 0.2])
    gradients = [torch.autograd.grad(losses @ weights, frames)[0] for losses in (ours, torch.stack(expected))]
    assert (gradients[0].flatten(1).norm(dim=1) > 0).all()
    torch.testing.assert_close(*gradients, atol=1e-5 * float(gradients[1].abs().max()), rtol=1e-4)
    assert torch.equal(
        window_losses(teacher, frames, indices, 8.0, QuerySet("Is it?"), settings)[0], alone([0, 4, 8], "Is it?")
    )


def test_windows_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="windows 4 of teacher_frames 24 need 96 frames, the video has 81: give fewer"):
        uniform_indices(81, Settings(windows=4))


def test_a_run_by_change_in_windows_is_resumed_to_the_bit(pipe: TeacherPipeline, tmp_path: Path) -> None:
    own = {"teacher_frames": 2, "windows": 2, "teacher_frames_by": "change", "window_loss": "softmax"}
    keywords = {**FAST, "queries": QUERIES, "num_frames": 9, "threshold": 1e-6, **own}

    def stop(pipe: Any, step: int, row: Any) -> None:
        raise KeyboardInterrupt

    whole = pipe(PROMPT, generator=seed(), run_dir=tmp_path / "whole", **keywords)
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    indices = record["teacher_frame_indices"]
    assert len(indices) == 4 and indices == sorted({*indices}) and (indices[0], indices[-1]) == (0, 8)
    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, generator=seed(), run_dir=tmp_path / "cut", callback_on_step_end=stop, **keywords)
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["teacher_frame_indices"] == indices
    resumed = pipe(PROMPT, generator=seed(), run_dir=tmp_path / "cut", resume=True, **keywords)
    assert resumed.lora == whole.lora and len(resumed.history) == len(whole.history) == 2
    assert resumed.p_yes_after == whole.p_yes_after and all(row["grad_norm"] > 0 for row in whole.history)

    record = json.loads((tmp_path / "cut" / "run.json").read_text())
    for wrong in ([0, 8], [0, 5, 3, 8], [0, 3, 5, 9], "0123"):
        (tmp_path / "cut" / "run.json").write_text(json.dumps(record | {"teacher_frame_indices": wrong}))
        with pytest.raises(InputError, match="teacher_frame_indices are not 4 frames of 9 in rising order"):
            pipe(PROMPT, generator=seed(), run_dir=tmp_path / "cut", resume=True, **keywords)


@pytest.mark.slow
def test_a_plan_counts_windows(run: Run) -> None:
    plan = ["plan", "--reasoner", "packaged", "--teacher", "packaged", "--json", "--teacher-frames", 4]
    one, three = (json.loads(run(*plan, "--windows", windows)[1]) for windows in (1, 3))
    assert (one["windows"], three["windows"], three["teacher_frames"]) == (1, 3, 4)
    stages = [{name: stage["flops"] for name, stage in each["ours"]["stages"].items()} for each in (one, three)]
    assert stages[1]["teacher.vision.forward"] == 4 * stages[0]["teacher.vision.forward"]  # the goal's and three
    assert stages[1]["reasoner.forward"] == stages[0]["reasoner.forward"]
    assert 3 * one["teacher_tokens"] < three["teacher_tokens"] < 4 * one["teacher_tokens"]
    peaks = [each["ours"]["stages"]["teacher.language.forward"]["peak_bytes"] for each in (one, three)]
    assert peaks[1] > peaks[0]
    assert three["stock"]["settings"]["teacher_passes"] == 1 + 3 * 3
    status, _, err = run(*plan, "--windows", 4)
    assert status == 2 and "windows 4 of teacher_frames 4 need 16 frames, the video has 13" in err
