"""The frames that the Teacher sees of a video, and the windows of a long one that it judges by themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.ops.patchify import PatchRows
from vlmteacher.queries import QuerySet

if TYPE_CHECKING:
    from vlmteacher.settings import Settings
    from vlmteacher.teachers.base import Teacher


def teacher_frame_indices(num_frames: int, count: int) -> list[int]:
    """Spread `count` frame indices uniformly over 0..num_frames-1, both ends included, strictly rising.

    Raises InputError: `count` is not in 1..num_frames.
    """
    if not 1 <= count <= num_frames:
        raise InputError(f"the Teacher cannot see {count} frames of a video of {num_frames}: give 1 to {num_frames}")
    return [round(k * (num_frames - 1) / max(count - 1, 1)) for k in range(count)]


def uniform_indices(num_frames: int, settings: Settings) -> list[int]:
    """The frames of all windows, uniform over the video. Raises InputError where it has not as many."""
    count = settings.windows * settings.teacher_frames
    if settings.windows > 1 and count > num_frames:
        raise InputError(
            f"windows {settings.windows} of teacher_frames {settings.teacher_frames} need {count} frames, the video has"
            f" {num_frames}: give fewer of either"
        )
    return teacher_frame_indices(num_frames, count)


def indices_by_change(latents: Tensor, stride: int, lead: int, num_frames: int, count: int) -> list[int]:
    """Spread `count` frame indices over 0..num_frames-1, both ends included, strictly rising, by the video's change.

    latents: (1, C, T, h, w) of the video. stride: frames of a latent frame. lead: frames that the latents decode to
    before the video's. Between two frames of the result lies the same amount of time and change
    together: each frame counts by the mean absolute difference of its latent frame from the one before, over that of
    the whole video, plus one, so that a video without changes has uniform indices.
    """
    changes = latents.float().diff(dim=2).abs().mean((0, 1, 3, 4)).tolist()
    mean = sum(changes) / len(changes) or 1.0
    latent = [min((lead + frame - 1) // stride, len(changes) - 1) for frame in range(1, num_frames)]
    places = [0.0, *accumulate(changes[k] / mean + 1 for k in latent)]
    indices: list[int] = []
    for k, target in enumerate(places[-1] * k / max(count - 1, 1) for k in range(count)):
        nearest = min(range(num_frames), key=lambda frame: abs(places[frame] - target))
        least = indices[-1] + 1 if indices else 0
        indices.append(min(max(nearest, least), num_frames - count + k))
    return indices


def window_losses(
    teacher: Teacher,
    frames: Tensor | PatchRows,
    indices: Sequence[int],
    fps: float,
    queries: QuerySet,
    settings: Settings,
    check: bool = True,
) -> Tensor:
    """`Teacher.losses` (1+M,) on the frames of a video, by `settings.windows` of it where there are several.

    The goal query is judged on as many frames as a window has, uniform over all of them; the process queries on each
    window by itself. Their losses are averaged ("mean", the geometric mean of P(Yes)), or averaged by the largest
    ("softmax": log mean exp of the losses, the harmonic mean of P(Yes), which a window with a low P(Yes) decides).
    """
    if settings.windows == 1:
        return teacher.losses(frames, indices, fps, queries, check=check)
    assert isinstance(frames, Tensor)  # patch rows cannot be taken apart

    def judge(places: Sequence[int], asked: QuerySet) -> Tensor:
        part = torch.stack([frames[place] for place in places])  # no index of the host's, for CUDA graphs
        return teacher.losses(part, [indices[place] for place in places], fps, asked, check=check)

    count = settings.teacher_frames
    goal = judge(teacher_frame_indices(len(indices), count), QuerySet(queries.goal))
    if not queries.process:
        return goal
    process = QuerySet(queries.process[0], queries.process[1:])
    starts = range(0, len(indices), count)
    losses = torch.stack([judge(range(start, start + count), process) for start in starts])
    by_query = losses.mean(0) if settings.window_loss == "mean" else losses.logsumexp(0) - math.log(len(losses))
    return torch.cat([goal, by_query])
