"""Pass@N: sample N videos and keep the one with the lowest Teacher objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.torch_modes import plain_torch


@dataclass(frozen=True)
class BestOfN:
    """N samples and their losses.

    Attributes:
        videos: N tensors (F, 3, H, W) in [0, 1].
        losses: the Teacher's objective on each video.
        best: index of the lowest loss.
    """

    videos: list[Tensor]
    losses: list[float]
    best: int


@plain_torch()
@torch.no_grad()
def sample_videos(pipe: TeacherPipeline, prompt: str, image: Image.Image | None, seeds: Sequence[int]) -> list[Tensor]:
    """Sample one video (F, 3, H, W) in [0, 1] per seed, in the Reasoner's own size."""
    reasoner = pipe.reasoner
    size = {"num_frames": reasoner.num_frames, "height": reasoner.height, "width": reasoner.width}
    pipe.need("text_encoder", "vae")
    condition = reasoner.encode(prompt, image, **size)
    noises = (reasoner.noise(condition, torch.Generator().manual_seed(seed)) for seed in seeds)
    return [pipe.sample(condition, noise) for noise in noises]


@plain_torch()
def objective(pipe: TeacherPipeline, video: Tensor, queries: QuerySet) -> float:
    """The Teacher's objective on a video (F, 3, H, W) in [0, 1]."""
    indices = teacher_frame_indices(len(video), pipe.defaults.teacher_frames)
    return vqa_objective(pipe.judge(video, indices, queries), pipe.defaults.goal_weight).item()


def best_of_n(
    pipe: TeacherPipeline, prompt: str, image: Image.Image | None, seeds: Sequence[int], queries: QuerySet | None = None
) -> BestOfN:
    """Sample one video per seed and compute the Teacher's objective on each.

    queries: None: the Teacher writes them.
    """
    teacher_frame_indices(pipe.reasoner.num_frames, pipe.defaults.teacher_frames)  # raises before the first sample
    queries = queries or pipe.write_queries(prompt, image)
    videos = sample_videos(pipe, prompt, image, seeds)
    losses = [objective(pipe, video, queries) for video in videos]
    return BestOfN(videos, losses, min(range(len(losses)), key=losses.__getitem__))
