"""Pass@N: sample N videos and keep the one with the lowest Teacher objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vlmteacher.optimization.objective import teacher_frame_indices
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
def best_of_n(
    pipe: TeacherPipeline, prompt: str, image: Image.Image | None, seeds: list[int], queries: QuerySet | None = None
) -> BestOfN:
    """Sample one video per seed in the Reasoner's own size and compute the Teacher's objective on each.

    queries: None: the Teacher writes them.
    """
    reasoner, settings = pipe.reasoner, pipe.defaults
    size = {"num_frames": reasoner.num_frames, "height": reasoner.height, "width": reasoner.width}
    indices = teacher_frame_indices(size["num_frames"], settings.teacher_frames)
    queries = queries or pipe.write_queries(prompt, image)
    pipe.need("text_encoder", "vae")
    condition = reasoner.encode(prompt, image, **size)
    videos, losses = [], []
    for seed in seeds:
        noise = reasoner.noise(condition, torch.Generator().manual_seed(seed))
        video = pipe.sample(condition, noise)
        query_losses = pipe.judge(video, indices, queries)
        videos.append(video)
        losses.append(vqa_objective(query_losses, settings.goal_weight).item())
    return BestOfN(videos, losses, min(range(len(losses)), key=losses.__getitem__))
