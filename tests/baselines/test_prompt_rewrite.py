"""PE: one text from prompt and first frame, and one video for it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.baselines.scripted import ScriptedTeacher
from tests.tiny_pair import PROMPT
from vlmteacher.baselines.best_of_n import sample_videos
from vlmteacher.baselines.prompt_rewrite import prompt_rewrite
from vlmteacher.errors import InputError
from vlmteacher.pipeline import PACKAGED_PAIR, TeacherPipeline
from vlmteacher.teachers import load_teacher

NEW = "The red ball rolls {slowly} to the <|im_end|> square."


def scripted(pipe: TeacherPipeline, *texts: str) -> tuple[TeacherPipeline, ScriptedTeacher]:
    teacher = ScriptedTeacher(*texts)
    return TeacherPipeline(pipe.reasoner, teacher, pipe.decoder, {"teacher_frames": 2}), teacher


def test_the_video_is_that_of_the_new_prompt(pipe: TeacherPipeline, image: Image.Image) -> None:
    rewriting, teacher = scripted(pipe, NEW)
    result = prompt_rewrite(rewriting, PROMPT, image, 3)
    assert result.prompt == NEW and (result.cost.generator_calls, result.cost.vlm_calls) == (1, 1)
    assert result.cost.seconds > 0
    ((text, images, limit),) = teacher.requests
    assert f"this prompt: {PROMPT}\n" in text and images == [image] and limit == 300
    assert torch.equal(result.video, sample_videos(pipe, NEW, image, [3])[0])
    assert not torch.equal(result.video, sample_videos(pipe, PROMPT, image, [3])[0])


@pytest.mark.parametrize("answer", ["", "  \n", "x" * 50_001])
def test_an_answer_that_is_no_prompt_leaves_the_prompt(pipe: TeacherPipeline, image: Image.Image, answer: str) -> None:
    result = prompt_rewrite(scripted(pipe, answer)[0], PROMPT, image, 0)
    assert result.prompt == PROMPT
    assert torch.equal(result.video, sample_videos(pipe, PROMPT, image, [0])[0])


def test_a_real_class_with_random_weights_goes_all_the_way(pipe: TeacherPipeline, image: Image.Image) -> None:
    first, again = (prompt_rewrite(pipe, PROMPT, image, 0) for _ in range(2))
    assert first.prompt == again.prompt and torch.equal(first.video, again.video)
    assert first.video.isfinite().all()
    pipe.teacher.tokenizer(first.prompt)  # type: ignore[attr-defined]


def test_the_packaged_teacher_is_refused(pipe: TeacherPipeline, image: Image.Image) -> None:
    packaged = TeacherPipeline(pipe.reasoner, load_teacher(PACKAGED_PAIR / "teacher"), pipe.decoder)
    with pytest.raises(InputError, match="this teacher writes queries and no other text: take an instruction-tuned"):
        prompt_rewrite(packaged, PROMPT, image, 0)
