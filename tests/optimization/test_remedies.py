"""Options against videos that please only the Teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import lora_parameters, remove_lora
from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.optimization.guards import frame_statistics, statistics_change
from vlmteacher.optimization.loop import Optimization
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import MAX_QUERIES, QuerySet, QueryStyle
from vlmteacher.settings import Settings

STEPS = 6


@pytest.fixture
def make(make_loop: Any) -> Any:
    return lambda **settings: make_loop(**{"max_steps": STEPS, "learning_rate": 0.03} | settings)


def distance(loop: Optimization, pipe: TeacherPipeline) -> float:
    """Mean squared distance of the latents from those without a LoRA."""
    with torch.no_grad():
        now = pipe.reasoner.predict_clean(loop.condition, loop.noise)
        remove_lora(pipe.reasoner.transformer)
        return (now - pipe.reasoner.predict_clean(loop.condition, loop.noise)).square().mean().item()


def test_pull_holds_the_latents_and_is_no_part_of_the_loss(make: Any, pipe: TeacherPipeline) -> None:
    loop = make()
    free = list(loop)
    far = distance(loop, pipe)
    loop = make(pull=100.0)
    held = list(loop)
    assert held[0]["loss"] == free[0]["loss"] and held[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=1e-4)
    assert held[-1]["loss"] > free[-1]["loss"]
    assert distance(loop, pipe) < 0.2 * far


def test_statistics_of_frames_are_held_and_are_no_part_of_the_loss(make: Any) -> None:
    def change(loop: Optimization) -> float:
        with torch.no_grad():
            latents = loop.reasoner.predict_clean(loop.condition, loop.noise)
            now = frame_statistics(loop.decoder.decode(latents, loop.frame_indices))
        return statistics_change(now, first).item()

    loop = make(frame_statistics=300.0)
    held = list(loop)
    first = loop.objective.statistics
    assert first.shape == (len(loop.frame_indices), 4, 3) and loop.state_dict()["statistics"] is first
    kept = change(loop)
    loop = make()
    free = list(loop)
    assert held[0]["loss"] == pytest.approx(free[0]["loss"], rel=1e-4) and held[-1]["loss"] > free[-1]["loss"]
    assert kept < 0.5 * change(loop)


def test_statistics_do_not_see_motion() -> None:
    """A disc that moves changes none; fading does."""
    frames = torch.full((2, 3, 32, 32), 0.9)
    frames[0, :, 4:12, 4:12] = frames[1, :, 15:23, 11:19] = 0.2
    one, two = frame_statistics(frames)
    assert torch.allclose(one, two, atol=1e-6)
    faded = frame_statistics(0.5 * frames + 0.45)
    assert statistics_change(faded, frame_statistics(frames)) > 0.05


@pytest.mark.parametrize(
    "settings", [{"pull": 3.0}, {"frame_statistics": 3.0}, {"frame_jitter": 3}, {"lora_decay": 2.0}]
)
def test_resuming_changes_no_bit(make: Any, settings: dict[str, Any]) -> None:
    loop = make(**settings)
    for _ in range(3):
        loop.step()
    state = loop.state_dict()
    expected = [row["loss"] for row in loop]
    again = make(**settings)
    again.load_state_dict(state)
    assert [row["loss"] for row in again] == expected and len(expected) == STEPS - 3


def test_jitter_shifts_all_frames_as_the_step_says(make: Any) -> None:
    loop = make(frame_jitter=3)
    frames = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    shifts = set()
    for step in range(8):
        shifted = loop.objective._jittered(frames, step)
        assert shifted.shape == frames.shape and torch.equal(shifted, loop.objective._jittered(frames, step))
        matches = [
            (down, across)
            for down in range(-3, 4)
            for across in range(-3, 4)
            if torch.equal(shifted[..., 3:-3, 3:-3], frames.roll((-down, -across), (-2, -1))[..., 3:-3, 3:-3])
        ]
        assert len(matches) == 1
        shifts.update(matches)
        assert set(shifted.detach().flatten().tolist()) <= set(frames.detach().flatten().tolist())
    assert len(shifts) > 4
    (gradient,) = torch.autograd.grad(shifted.sum(), frames)
    assert gradient.sum().item() == pytest.approx(frames.numel())
    assert make().step()["loss"] != make(frame_jitter=3).step()["loss"]


def test_decay_keeps_the_lora_small(make: Any, pipe: TeacherPipeline) -> None:
    norms = []
    for decay in (0.0, 5.0):
        list(make(lora_decay=decay))
        norms.append(sum(p.square().sum().item() for p in lora_parameters(pipe.reasoner.transformer)))
    assert norms[1] < 0.8 * norms[0]


def test_preserve_adds_one_question(pipe: TeacherPipeline) -> None:
    asked = QuerySet.from_dict(QUERIES)
    question = QueryStyle().preservation_query
    values: dict[str, Any] = {"max_steps": 1, "rank": 2, "teacher_frames": 4, "progress": False}
    outs = [
        pipe(PROMPT, queries=queries, preserve=True, generator=torch.Generator().manual_seed(0), **values)
        for queries in (asked, asked.plus(question))
    ]
    for out in outs:
        assert out.queries.process == (*asked.process, question) and len(out.history[0]["p_yes"]) == 4
    without = pipe(PROMPT, queries=asked, generator=torch.Generator().manual_seed(0), **values)
    assert without.queries == asked and without.history[0]["p_yes"] == pytest.approx(outs[0].history[0]["p_yes"][:3])
    many = QuerySet("Goal?", tuple(f"Question {k}?" for k in range(MAX_QUERIES - 1)))
    with pytest.raises(InputError, match="at most 8"):
        pipe(PROMPT, queries=many, preserve=True, **values)


def test_a_run_with_all_remedies_resumes(pipe: TeacherPipeline, tmp_path: Any) -> None:
    values: dict[str, Any] = {"max_steps": 3, "rank": 2, "teacher_frames": 4, "progress": False, "preserve": True}
    values |= {"frame_jitter": 1, "lora_decay": 1.0, "pull": 1.0, "queries": QuerySet.from_dict(QUERIES)}
    values |= {"final_samples": 3}
    whole = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **values)

    def stop(_: object, step: int, __: object) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(
            PROMPT,
            generator=torch.Generator().manual_seed(0),
            run_dir=tmp_path / "run",
            callback_on_step_end=stop,
            **values,
        )
    assert pipe.loop is None
    again = pipe(PROMPT, run_dir=tmp_path / "run", resume=True, **values)
    assert again.lora == whole.lora and (again.sample, again.loss_after) == (whole.sample, whole.loss_after)


@pytest.mark.parametrize(
    "bad",
    [
        {"frame_jitter": -1},
        {"frame_jitter": 0.5},
        {"lora_decay": -1.0},
        {"pull": float("nan")},
        {"target": "x"},
        {"final_samples": 0},
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Settings(**bad)


def test_a_recorded_step_cannot_jitter() -> None:
    with pytest.raises(InputError, match="frame_jitter"):
        Settings(engine="cuda_graph", frame_jitter=1)


def test_of_the_final_samples_the_teacher_picks_one(pipe: TeacherPipeline, make: Any) -> None:
    """The samples share z1, on which alone the optimisation depends, and differ in the noise of the later steps."""
    values: dict[str, Any] = {"max_steps": 2, "threshold": 1e-6, "learning_rate": 0.03, "rank": 2, "teacher_frames": 4}
    asked = {"queries": QuerySet.from_dict(QUERIES), "output_type": "pt", "progress": False}
    one, out = (
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), final_samples=count, **values, **asked)
        for count in (1, 6)
    )
    assert [row["loss"] for row in one.history] == [row["loss"] for row in out.history]
    assert torch.equal(one.frames_before, out.frames_before) and one.sample == 0

    loop, reasoner = make(**values), pipe.reasoner
    loop.objective.noise = reasoner.noise(loop.condition, torch.Generator().manual_seed(0), 6)
    list(loop)
    with torch.no_grad():
        videos = [reasoner.decode(reasoner.sample(loop.condition, noise)) for noise in loop.noise.samples()]
        losses = [pipe.judge(video, loop.frame_indices, loop.queries) for video in videos]
    objectives = [vqa_objective(of_sample).item() for of_sample in losses]
    assert all(torch.equal(noise.z1, loop.noise.z1) for noise in loop.noise.samples()) and len(set(objectives)) == 6
    best = objectives.index(min(objectives))
    assert best > 0  # so that the choice matters
    video, of_best = loop.final_video()
    assert torch.equal(video, videos[best]) and torch.equal(of_best, losses[best])
    assert out.sample == best and torch.equal(out.frames, video) and torch.equal(one.frames, videos[0])
    assert out.loss_after == min(objectives) and one.loss_after == objectives[0]


def test_final_samples_are_sampled_without_an_update_too(pipe: TeacherPipeline) -> None:
    asked = {"queries": QuerySet.from_dict(QUERIES), "output_type": "pt", "progress": False, "teacher_frames": 4}
    out = pipe(PROMPT, generator=torch.Generator().manual_seed(0), final_samples=6, max_steps=0, **asked)
    condition = pipe.reasoner.encode(PROMPT, None, pipe.reasoner.num_frames, pipe.reasoner.height, pipe.reasoner.width)
    noise = pipe.reasoner.noise(condition, torch.Generator().manual_seed(0), 6)
    indices = teacher_frame_indices(pipe.reasoner.num_frames, 4)
    videos = [pipe.sample(condition, draws, pipe.reasoner) for draws in noise.samples()]
    objectives = [vqa_objective(pipe.judge(video, indices, asked["queries"])).item() for video in videos]
    best = objectives.index(min(objectives))
    # Equal to rounding: the call samples with a LoRA, through the operators of the optimisation.
    assert out.updates == 0 and out.sample == best > 0 and out.loss_after == pytest.approx(min(objectives), rel=1e-4)
    torch.testing.assert_close(out.frames, videos[best], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.frames_before, videos[0], atol=1e-4, rtol=0)


def test_a_default_of_several_samples_gives_way_to_a_sampler_that_makes_one(pipe: TeacherPipeline) -> None:
    several = TeacherPipeline(pipe.reasoner, pipe.teacher, pipe.decoder, {"final_samples": 4, "teacher_frames": 4})
    out = several(PROMPT, num_inference_steps=1, max_steps=0, queries=QuerySet.from_dict(QUERIES), progress=False)
    assert out.config["final_samples"] == 1 and out.sample == 0
    with pytest.raises(InputError, match="final_samples must be a whole number of at least 1, not 0"):
        several(PROMPT, num_inference_steps=1, final_samples=0, queries=QuerySet.from_dict(QUERIES), progress=False)


def test_final_samples_need_noise_in_the_later_steps(pipe: TeacherPipeline) -> None:
    with pytest.raises(InputError, match="final_samples 2 needs a Reasoner that draws noise after the first step"):
        pipe(PROMPT, final_samples=2, num_inference_steps=1, queries=QuerySet.from_dict(QUERIES), progress=False)
