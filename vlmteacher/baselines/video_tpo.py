"""VideoTPO (TiViBench): rounds of two videos, after each of which the VLM criticises them and rewrites the prompt.

The published method does not say which of its videos is the result. Here it is the one with the lowest Teacher
objective, by queries for the original prompt; the first one of equals.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from vlmteacher import arguments
from vlmteacher.baselines.best_of_n import best_of_n
from vlmteacher.baselines.cost import Cost
from vlmteacher.baselines.prompt_rewrite import Rewriter, ask_for_prompt
from vlmteacher.media import read_image, shrink
from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.teachers.base import check_free_text

FRAMES = 4  # of each video that the VLM sees, evenly spaced, both ends included
FRAME_PIXELS = 512 * 512  # at most, of such a frame
TEXT_TOKENS = 300  # at most, of a text that leads to the new prompt

CRITIQUE = """\
A video model made two videos, A and B, for this task: {task}
Its prompt was: {prompt}
The first {count} images are frames of video A in the order of time, the other {count} are frames of video B.
Compare the videos with the task, not with each other alone. Name the strengths and the weaknesses of video A, then \
those of video B: whether the goal is reached at the end, whether things move as they should on the way, and whether \
anything changes that should stay. Name things by their colour, shape and place. Be brief."""
LOSS = """\
A video model made two videos for this task: {task}
Its prompt was: {prompt}
A critic wrote about the videos: {critique}
Judge the prompt by this critique: which weaknesses of the videos can come from its wording, from what it leaves out, \
or from what can be understood in two ways? Which of its parts led to the strengths? Be brief."""
GRADIENT = """\
A prompt for a video model is being improved. The task is: {task}
The prompt is: {prompt}
An assessment of the prompt says: {loss}
List the changes to the prompt that would remove the weaknesses and keep the strengths: what to add, what to say more \
exactly, what to drop. Do not write the new prompt yet. Be brief."""
UPDATE = """\
A prompt for a video model is being improved. The task is: {task}
The prompt is: {prompt}
Make these changes to it: {gradient}
Keep the objects and the goal of the task. Write at most 200 words of plain text. Answer only with the new prompt."""


@dataclass(frozen=True)
class Round:
    """One round: its prompt, the objective on its two videos, and the texts that lead to the next prompt.

    The texts are empty in the last round.
    """

    prompt: str
    losses: list[float]
    critique: str = ""
    loss: str = ""
    gradient: str = ""


@dataclass(frozen=True)
class VideoTPO:
    """The result of R rounds.

    Attributes:
        video: (F, 3, H, W) in [0, 1], the one with the lowest objective of all 2R.
        loss: its objective.
        rounds: R rounds.
        cost: 2R generator calls; 2R videos judged, and four texts after each round but the last.
    """

    video: Tensor
    loss: float
    rounds: list[Round]
    cost: Cost


def video_tpo(
    pipe: TeacherPipeline,
    prompt: str,
    image: Image.Image | None,
    seeds: tuple[int, int],
    rounds: int,
    queries: QuerySet | None = None,
    rewriter: Rewriter | None = None,
) -> VideoTPO:
    """Improve the prompt over `rounds` rounds of two videos, in the Reasoner's own size; pick one of all videos.

    seeds: of the two noises, the same in every round. queries: for the original prompt; None: the Teacher writes them.
    rewriter: the VLM that criticises and rewrites; None: the Teacher, which judges the videos in any case.
    Raises InputError where the Teacher is to rewrite and writes no free text (see `Teacher.answer`).
    """
    arguments.whole("rounds", rounds)
    if rewriter is None:
        check_free_text(pipe.teacher.style, "this teacher")
        rewriter = pipe.answer
    began = time.perf_counter()
    queries = queries or pipe.write_queries(prompt, image)
    done: list[Round] = []
    best: tuple[float, Tensor] | None = None
    present = prompt
    while True:
        drawn = best_of_n(pipe, present, image, seeds, queries)
        lowest = drawn.losses[drawn.best]
        if best is None or lowest < best[0]:
            best = lowest, drawn.videos[drawn.best]
        if len(done) == rounds - 1:
            done.append(Round(present, drawn.losses))
            break
        critique, loss, gradient = _feedback(rewriter, prompt, present, drawn.videos)
        done.append(Round(present, drawn.losses, critique, loss, gradient))
        present = ask_for_prompt(rewriter, UPDATE.format(task=prompt, prompt=present, gradient=gradient), (), present)
    cost = Cost(time.perf_counter() - began, generator_calls=2 * rounds, vlm_calls=2 * rounds + 4 * (rounds - 1))
    return VideoTPO(best[1], best[0], done, cost)


def _feedback(rewriter: Rewriter, task: str, prompt: str, videos: list[Tensor]) -> tuple[str, str, str]:
    """The critique of the two videos of a prompt, the textual loss and the textual gradient."""
    count = min(FRAMES, len(videos[0]))
    indices = teacher_frame_indices(len(videos[0]), count)
    frames = [shrink(read_image(video[index]), FRAME_PIXELS) for video in videos for index in indices]
    critique = rewriter(CRITIQUE.format(task=task, prompt=prompt, count=count), frames, TEXT_TOKENS)
    loss = rewriter(LOSS.format(task=task, prompt=prompt, critique=critique), (), TEXT_TOKENS)
    gradient = rewriter(GRADIENT.format(task=task, prompt=prompt, loss=loss), (), TEXT_TOKENS)
    return critique, loss, gradient
