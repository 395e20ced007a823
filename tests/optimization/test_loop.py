from __future__ import annotations

import io
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optimization.test_guards import guards
from vlmteacher.errors import InputError, NonFiniteError
from vlmteacher.lora.adapter import lora_state_dict
from vlmteacher.ops.patchify import PatchRows
from vlmteacher.optimization.guards import GUARDS
from vlmteacher.optimization.loop import Optimization
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.settings import Settings


@pytest.fixture
def make(make_loop: Any) -> Any:
    return make_loop


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def test_check_final_goes_on_until_the_few_step_video_is_good_enough_too(make: Any) -> None:
    first = make(max_steps=1).step()["loss"]
    loop = make(threshold=first + 1e-4, check_final=True)
    rows = list(loop)
    assert all("final_loss" in row for row in rows if row["loss"] <= loop.settings.threshold)
    for row in rows[:-1]:
        assert row["grad_norm"] is not None
        assert row["loss"] > loop.settings.threshold or row["final_loss"] > loop.settings.threshold
    if loop.stopped == "threshold":
        assert rows[-1]["final_loss"] <= loop.settings.threshold
    assert rows[0]["final_loss"] == pytest.approx(loop_final(make()), rel=1e-5)


def loop_final(loop: Optimization) -> float:
    """The objective on the few-step video of the untouched Reasoner, computed without the loop."""
    with torch.no_grad():
        video = loop.reasoner.decode(loop.reasoner.sample(loop.condition, loop.noise))[loop.frame_indices]
        losses = loop.teacher.losses(video, loop.frame_indices, loop.reasoner.fps, loop.queries)
    return vqa_objective(losses, 0.5).item()


@pytest.mark.parametrize(
    "bad",
    [
        {"max_steps": -1},
        {"threshold": 0},
        {"threshold": math.nan},
        {"rank": 0},
        {"teacher_frames": 0},
        {"learning_rate": -1e-3},
        {"goal_weight": 1.5},
        {"keep": "first"},
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Settings(**bad)


def test_steps_lower_the_loss_and_touch_only_the_lora(make: Any, pipe: TeacherPipeline) -> None:
    loop = make(max_steps=8, learning_rate=0.03)
    frozen = {n: p.clone() for n, p in pipe.reasoner.transformer.named_parameters() if "lora" not in n}
    rows = list(loop)
    assert loop.stopped == "max_steps" and loop.updates == 8
    assert all(after["loss"] < before["loss"] for before, after in pairwise(rows))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.02
    parameters = dict(pipe.reasoner.transformer.named_parameters())
    assert all(torch.equal(parameters[n], p) for n, p in frozen.items())
    models = [*pipe.decoder.parameters(), *pipe.teacher.model.parameters(), *(parameters[n] for n in frozen)]
    assert all(p.grad is None for p in models)


def test_a_row_holds_the_metrics_before_the_update(make: Any, pipe: TeacherPipeline) -> None:
    loop = make()
    with torch.no_grad():
        latents = pipe.reasoner.predict_clean(loop.condition, loop.noise)
        frames = pipe.decoder.decode(latents)[loop.frame_indices]
        losses = pipe.teacher.losses(frames, loop.frame_indices, 8.0, loop.queries)
    row = loop.step()
    assert row["step"] == 0 and row["seconds"] > 0 and row["grad_norm"] > 0
    assert row["p_yes"] == pytest.approx(losses.neg().exp().tolist(), rel=1e-4)
    assert row["loss"] == pytest.approx(vqa_objective(losses, 0.5).item(), rel=1e-5)
    assert row["guards"] == pytest.approx(guards(frames), abs=1e-3)


def test_stops_before_the_update(make: Any, pipe: TeacherPipeline) -> None:
    loop = make()
    first = loop.step()["loss"]
    loop = make(threshold=first)  # "at most": equal is enough
    start = lora_state_dict(pipe.reasoner.transformer)
    (row,) = loop
    assert loop.stopped == "threshold" and loop.updates == 0 and row["grad_norm"] is None
    assert all(torch.equal(start[n], value) for n, value in lora_state_dict(pipe.reasoner.transformer).items())


def test_no_steps_at_all(make: Any) -> None:
    loop = make(max_steps=0)
    assert list(loop) == [] and loop.stopped == "max_steps"
    loop.finish()


def test_keep_best_is_the_lora_of_the_lowest_loss(make: Any, pipe: TeacherPipeline) -> None:
    loop = make(max_steps=3, learning_rate=2.0, keep="best")  # so high that the loss jumps
    losses, loras = [], []
    while loop.stopped is None:
        loras.append(lora_state_dict(pipe.reasoner.transformer))
        losses.append(loop.step()["loss"])
    best = losses.index(min(losses))
    assert best == 1 and losses[best] < losses[-1] - 0.01
    loop.finish()
    assert all(torch.equal(loras[best][n], v) for n, v in lora_state_dict(pipe.reasoner.transformer).items())


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("killed_after", [0, 1, 3, 4])
def test_resume_changes_no_bit(make: Any, pipe: TeacherPipeline, killed_after: int, keep: str) -> None:
    whole = make(keep=keep, learning_rate=0.3)
    list(whole)
    whole.finish()
    expected = lora_state_dict(pipe.reasoner.transformer)

    killed = make(keep=keep, learning_rate=0.3)
    for _ in range(killed_after):
        killed.step()
    file = io.BytesIO()
    torch.save(killed.state_dict(), file)
    list(killed)  # later steps do not change the state that was saved
    resumed = make(keep=keep, learning_rate=0.3)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert len(resumed.history) == killed_after
    list(resumed)
    resumed.finish()
    assert without_seconds(resumed.history) == without_seconds(whole.history) and resumed.stopped == whole.stopped
    result = lora_state_dict(pipe.reasoner.transformer)
    assert expected.keys() == result.keys() and all(torch.equal(expected[n], result[n]) for n in expected)


def test_the_state_keeps_its_entries(make: Any) -> None:
    """Run folders of earlier versions resume: an entry that changes needs another `FORM` (`runs/folder.py`)."""
    loop = make(pull=1.0)
    loop.step()
    state = loop.state_dict()
    entries = {"lora", "optimizer", "history", "best", "anchor", "statistics", "first_contrast", "stopped", "rungs"}
    assert state.keys() == entries | {"predictions", "warm_start"}  # which earlier versions did not have
    loop.load_state_dict({name: state[name] for name in entries})
    assert loop.predictions == {} and state["predictions"][0].ndim == 3
    assert state["anchor"].shape == loop.noise.z1.shape
    assert state["optimizer"].keys() == {"state", "param_groups"} and state["best"][0] == state["history"][0]["loss"]
    row = {"step", "loss", "p_yes", "grad_norm", "guards", "seconds"}
    assert state["history"][0].keys() == row and set(state["history"][0]["guards"]) == set(GUARDS)


class Poisoned:
    """The real Teacher with NaN for its losses, or only for their gradient."""

    def __init__(self, teacher: Any, gradient_only: bool) -> None:
        self.teacher, self.gradient_only = teacher, gradient_only
        self.patch_layout = teacher.patch_layout

    def losses(self, frames: Tensor | PatchRows, *rest: Any, **how: Any) -> Tensor:
        losses = self.teacher.losses(frames, *rest, **how)
        if not self.gradient_only:
            return losses * torch.nan
        losses.register_hook(lambda gradient: gradient * torch.nan)
        return losses


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_number_that_is_not_finite_leaves_the_last_good_state(
    make: Any, pipe: TeacherPipeline, gradient_only: bool
) -> None:
    loop = make()
    loop.step()
    good = lora_state_dict(pipe.reasoner.transformer)
    loop.objective.teacher = Poisoned(pipe.teacher, gradient_only)
    with pytest.raises(NonFiniteError, match=r"step 1.*learning rate"):
        loop.step()
    state = loop.state_dict()
    assert len(state["history"]) == 1
    assert all(torch.equal(good[n], state["lora"][n]) for n in good)
    loop.objective.teacher = pipe.teacher
    assert math.isfinite(loop.step()["loss"])


def test_the_hand_over_in_patch_rows_changes_no_loss(make: Any, pipe: TeacherPipeline, monkeypatch: Any) -> None:
    """Patch rows from the decoder and frames that the Teacher cuts give the same losses and LoRA to rounding."""
    loop = make()
    assert pipe.teacher.patch_layout(len(loop.frame_indices), 32, 48) is not None
    with monkeypatch.context() as patch:  # which would give frames
        patch.setattr(type(pipe.decoder), "decode", None)
        rows, lora = [loop.step() for _ in range(2)], lora_state_dict(pipe.reasoner.transformer)
    monkeypatch.setattr(type(pipe.teacher), "patch_layout", lambda *_: None)
    loop = make()
    frames, expected = [loop.step() for _ in range(2)], lora_state_dict(pipe.reasoner.transformer)
    for ours, theirs in zip(rows, frames, strict=True):
        for name in ("loss", "grad_norm", "guards"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), name
    for name, value in expected.items():
        torch.testing.assert_close(lora[name], value, atol=1e-5, rtol=1e-5)


def test_attention_without_a_backward_is_refused(make: Any, monkeypatch: Any) -> None:
    from vlmteacher.reasoners.wan import blocks

    loop, attend = make(), blocks.attend
    monkeypatch.setattr(blocks, "attend", lambda *args, **how: attend(*args, **how).detach())
    before = lora_state_dict(loop.transformer)
    with pytest.raises(InputError, match=r"of the LoRA's \d+ tensors, blocks\.0\.\S+ first, have no gradient"):
        loop.step()
    assert not loop.history
    assert all(torch.equal(before[name], value) for name, value in lora_state_dict(loop.transformer).items())
