"""Stage ``encoder``: the features of the video distance, trained to predict the facts of rendered videos.

The videos are of the same kinds as the Teacher's: right ones and all corruptions. Some are blurred or noisy, to a
degree that the features must predict too, so that they depend on the quality of a video and not only on its content.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.microworld.teacher.data import draw_track
from recipes.microworld.teacher.grounding import STATE, by_color
from recipes.microworld.training import Run, train
from vlmteacher.evaluation.video_distance import FEATURES, VideoEncoder
from vlmteacher.microworld import world
from vlmteacher.microworld.facts import Facts, facts_of
from vlmteacher.microworld.scene import Scene

NOISE = 0.1  # standard deviation of the strongest


class Heads(nn.Module):
    """Training-only linear readouts of the facts of every frame."""

    FLAGS: ClassVar = ("touching", "jumped", "intact")

    def __init__(self) -> None:
        super().__init__()
        colors = len(world.COLORS)
        self.sizes = {"states": colors * STATE, "there": colors, "flags": len(self.FLAGS)}
        self.facts = nn.Linear(FEATURES, world.NUM_FRAMES * sum(self.sizes.values()))
        self.harm = nn.Linear(FEATURES, 2)

    def losses(
        self, features: Tensor, scenes: Sequence[Scene], facts: Sequence[Facts], harm: Tensor
    ) -> dict[str, Tensor]:
        """A loss for each kind of fact; `harm` (B, 2) in [0, 1] is the amount of blur and of noise."""
        predicted = self.facts(features).unflatten(1, (world.NUM_FRAMES, -1)).split(list(self.sizes.values()), -1)
        by_name = dict(zip(self.sizes, predicted, strict=True))
        frames = range(world.NUM_FRAMES)
        states, there = (torch.stack(x) for x in zip(*map(by_color, scenes, facts, repeat(frames)), strict=True))
        flags = np.stack([np.stack([f.touching, f.jumped.any(1), f.intact], -1) for f in facts])
        visible = ~states.isnan()
        return {
            "states": (by_name["states"].view_as(states) - states)[visible].square().mean() * 16,
            "there": F.binary_cross_entropy_with_logits(by_name["there"], there),
            "flags": F.binary_cross_entropy_with_logits(by_name["flags"], torch.from_numpy(flags).float()),
            "harm": (self.harm(features) - harm).square().mean(),
        }


def sample(rng: np.random.Generator) -> tuple[Tensor, Scene, Facts, Tensor]:
    """Draw a video (F, 3, H, W) in [0, 1], its scene and facts, and the amount of blur and noise (2,)."""
    scene, track = draw_track(rng)
    video = torch.from_numpy(world.draw(track)).permute(0, 3, 1, 2)
    harm = rng.uniform(size=2) * (rng.random(2) < 0.5)
    soft = F.avg_pool2d(video, 5, 1, 2, count_include_pad=False)
    noise = torch.from_numpy(rng.normal(scale=NOISE, size=video.shape)).float()
    video = (video.lerp(soft, float(harm[0])) + float(harm[1]) * noise).clamp(0, 1)
    return video, scene, facts_of(scene, track), torch.from_numpy(harm).float()


def train_encoder(run: Run) -> None:
    """Stage ``encoder``: write ``encoder.safetensors`` (half precision)."""
    config = run.config
    torch.manual_seed(config["seed"])
    encoder, heads = VideoEncoder(), Heads()

    def draw(rng: np.random.Generator) -> tuple[Tensor, list[Scene], list[Facts], Tensor]:
        videos, scenes, facts, harm = zip(*(sample(rng) for _ in range(config["batch"])), strict=True)
        return torch.stack(videos), list(scenes), list(facts), torch.stack(harm)

    def step(index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        videos, scenes, facts, harm = draw(rng)
        losses = heads.losses(encoder(videos), scenes, facts, harm)
        return torch.stack(list(losses.values())).sum(), {name: float(x.detach()) for name, x in losses.items()}

    train({"encoder": encoder, "heads": heads}, step, run, ema=0.99)
    calibrate(encoder, [draw(np.random.default_rng([config["seed"], 0, k]))[0] for k in range(8)])
    state = {name: x.half() if x.is_floating_point() else x for name, x in encoder.state_dict().items()}
    save_file(state, run.out / "encoder.safetensors")


@torch.no_grad()
def calibrate(encoder: VideoEncoder, batches: list[Tensor]) -> None:
    """Measure the mean and variance of the features again: those of the training belong to other weights."""
    encoder.standard.reset_running_stats()
    encoder.standard.momentum = None  # a plain mean over batches
    encoder.train()
    for videos in batches:
        encoder(videos)
    encoder.eval()
