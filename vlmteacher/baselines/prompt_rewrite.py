"""PE, prompt enhancement: the VLM rewrites the prompt once, from prompt and first frame, and one video is sampled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image
from torch import Tensor

from vlmteacher.baselines.best_of_n import sample_videos
from vlmteacher.baselines.cost import Cost
from vlmteacher.errors import InputError
from vlmteacher.media import ImageInput
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.prompts import check_prompt

PROMPT_TOKENS = 300  # at most, of a prompt that the VLM writes
Rewriter: TypeAlias = Callable[[str, Sequence[ImageInput], int], str]
"""Answers a request as `Teacher.answer` does: text, images, limit of tokens."""

REWRITE = """\
A video model will be given this prompt: {prompt}
If there is an image, it is the first frame of the video.
Rewrite the prompt so that the video carries out the task. Work out the solution of the task, and describe the video \
that shows it: what moves, from where, which way, to where and in which order, what stays as it is, and what the last \
frame looks like. Name things by their colour, shape and place in the image. Keep the objects and the goal of the task.
Write at most 200 words of plain text. Answer only with the new prompt."""


@dataclass(frozen=True)
class PromptRewrite:
    """The video (F, 3, H, W) in [0, 1], the prompt that it was sampled for, and the cost."""

    video: Tensor
    prompt: str
    cost: Cost


def ask_for_prompt(rewriter: Rewriter, request: str, images: Sequence[ImageInput], prompt: str) -> str:
    """Ask a VLM for a new prompt of at most `PROMPT_TOKENS` tokens.

    Returns `prompt`, the present one, where the answer is empty or no text that a Reasoner takes.
    """
    answer = rewriter(request, images, PROMPT_TOKENS)
    try:
        check_prompt(answer)
    except InputError:
        return prompt
    return answer


def prompt_rewrite(
    pipe: TeacherPipeline, prompt: str, image: Image.Image | None, seed: int, rewriter: Rewriter | None = None
) -> PromptRewrite:
    """Let a VLM rewrite the prompt once, and sample one video for it in the Reasoner's own size.

    seed: of the noise. rewriter: the VLM; None: the Teacher. Raises InputError where the Teacher is to rewrite and
    writes no free text (see `Teacher.answer`).
    """
    began = time.perf_counter()
    images = [] if image is None else [image]
    written = ask_for_prompt(rewriter or pipe.answer, REWRITE.format(prompt=prompt), images, prompt)
    (video,) = sample_videos(pipe, written, image, [seed])
    return PromptRewrite(video, written, Cost(time.perf_counter() - began, generator_calls=1, vlm_calls=1))
