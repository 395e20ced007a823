"""VideoTPO: 2R videos by fixed seeds, four texts between two rounds, and the pick among all videos."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from tests.baselines.scripted import ScriptedTeacher
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.baselines import video_tpo as module
from vlmteacher.baselines.best_of_n import sample_videos
from vlmteacher.baselines.video_tpo import video_tpo
from vlmteacher.errors import InputError
from vlmteacher.media import read_image
from vlmteacher.pipeline import PACKAGED_PAIR, TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import load_teacher

SECOND, THIRD = "The ball {rolls}.", "The red ball rolls to the green square and stops."
SCRIPT = ("critique 1", "loss 1", "gradient 1", SECOND, "critique 2", "loss 2", "gradient 2", THIRD)
SEEDS = (7, 8)


def run(pipe: TeacherPipeline, image: Image.Image, teacher: ScriptedTeacher, rounds: int = 3, **kw: Any) -> Any:
    scripted = TeacherPipeline(pipe.reasoner, teacher, pipe.decoder, {"teacher_frames": 2})
    return video_tpo(scripted, PROMPT, image, SEEDS, rounds, **kw)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_r_rounds_make_2r_videos(
    pipe: TeacherPipeline, image: Image.Image, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    sampled = []
    sample = TeacherPipeline.sample
    monkeypatch.setattr(TeacherPipeline, "sample", lambda *args: sampled.append(1) or sample(*args))
    teacher = ScriptedTeacher(*SCRIPT)
    result = run(pipe, image, teacher, rounds)
    assert len(sampled) == len(teacher.judged) == result.cost.generator_calls == 2 * rounds
    assert len(result.rounds) == rounds and len(teacher.requests) == 4 * (rounds - 1)
    assert result.cost.vlm_calls == len(teacher.requests) + len(teacher.judged) and result.cost.seconds > 0


def test_every_text_leads_to_the_next(pipe: TeacherPipeline, image: Image.Image) -> None:
    teacher = ScriptedTeacher(*SCRIPT)
    result = run(pipe, image, teacher)
    assert [one.prompt for one in result.rounds] == [PROMPT, SECOND, THIRD]
    assert [(one.critique, one.loss, one.gradient) for one in result.rounds] == [SCRIPT[:3], SCRIPT[4:7], ("", "", "")]
    for number, prompt in enumerate((PROMPT, SECOND)):
        critique, loss, gradient, update = teacher.requests[4 * number : 4 * number + 4]
        for text, _, limit in (critique, loss, gradient, update):
            assert PROMPT in text and prompt in text and limit == 300
        for request, given in zip((loss, gradient, update), SCRIPT[4 * number :], strict=False):
            assert given in request[0] and request[1] == []
        videos = sample_videos(pipe, prompt, image, SEEDS)
        assert "The first 4 images are frames of video A" in critique[0]
        frames = [video[i] for video in videos for i in module.teacher_frame_indices(len(video), 4)]
        assert [shown.tobytes() for shown in critique[1]] == [read_image(frame).tobytes() for frame in frames]


def test_the_pick_is_the_lowest_objective_by_the_queries_of_the_original_prompt(
    pipe: TeacherPipeline, image: Image.Image
) -> None:
    teacher = ScriptedTeacher(*SCRIPT)
    result = run(pipe, image, teacher)
    assert teacher.written_for == PROMPT and {queries for queries, _ in teacher.judged} == {QuerySet.from_dict(QUERIES)}
    losses = [loss for one in result.rounds for loss in one.losses]
    assert losses == pytest.approx([loss for _, loss in teacher.judged]) and len(set(losses)) == 6
    videos = [video for prompt in (PROMPT, SECOND, THIRD) for video in sample_videos(pipe, prompt, image, SEEDS)]
    assert result.loss == min(losses) and torch.equal(result.video, videos[losses.index(min(losses))])
    given = QuerySet("Is it done?")
    run(pipe, image, other := ScriptedTeacher(*SCRIPT), queries=given)
    assert {queries for queries, _ in other.judged} == {given}


def test_empty_texts_leave_the_prompt(pipe: TeacherPipeline, image: Image.Image) -> None:
    result = run(pipe, image, ScriptedTeacher(*[""] * 8))
    assert [one.prompt for one in result.rounds] == [PROMPT] * 3 and result.cost.generator_calls == 6


@pytest.mark.slow
def test_a_real_class_with_random_weights_goes_all_the_way(pipe: TeacherPipeline, image: Image.Image) -> None:
    asked = QuerySet.from_dict(QUERIES)
    first, again = (video_tpo(pipe, PROMPT, image, SEEDS, 2, asked) for _ in range(2))
    assert first.rounds == again.rounds and torch.equal(first.video, again.video)
    assert first.rounds[0].critique and first.rounds[1].prompt != PROMPT


def test_bad_input_is_refused_before_the_first_video(
    pipe: TeacherPipeline, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TeacherPipeline, "sample", lambda *_: pytest.fail("a video was sampled"))
    with pytest.raises(InputError, match="rounds must be a whole number of at least 1, not 0"):
        run(pipe, image, ScriptedTeacher(), 0)
    packaged = TeacherPipeline(pipe.reasoner, load_teacher(PACKAGED_PAIR / "teacher"), pipe.decoder)
    with pytest.raises(InputError, match="writes queries and no other text"):
        video_tpo(packaged, PROMPT, image, SEEDS, 2)
