"""`vlmteacher train grpo`: Flow-GRPO (arXiv 2505.05470), one LoRA for many instances by the Teacher's verdict alone.

The sampler "renoise" is already a Gaussian policy: from latents x at level s it goes to
x' ~ N((1 - s') x0(x, s), s'^2 I) at the next level s', so nothing has to be converted. The last prediction draws
nothing and is not trained. The reward of a video is -L, the method's objective as a number; a video's advantage is that
over the other videos of its group, which share prompt, first frame and first noise. There is no KL term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmteacher.baselines.shared_lora import SharedSettings, SharedTraining, run_training
from vlmteacher.distillation.flow_matching import counted
from vlmteacher.errors import InputError
from vlmteacher.optimization.frames import teacher_frame_indices
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, Noise
from vlmteacher.trackers import Trackers


@dataclass(frozen=True)
class FlowGRPOSettings(SharedSettings):
    """Settings of Flow-GRPO. Raises InputError.

    Attributes:
        group_size: videos of a prompt, at least 2; an update takes `batch_size` groups.
        updates: updates on the videos of a step; only in the first one does the policy equal the one that sampled.
        clip: c of the ratio's clipping to [1 - c, 1 + c].
        advantage_eps: added to the standard deviation of a group's rewards.
    """

    group_size: int = 8
    updates: int = 2
    clip: float = 1e-4
    advantage_eps: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in {"group_size": 2, "updates": 1}.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} must be at least {low}, not {getattr(self, name)}")
        for name in ("clip", "advantage_eps"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be greater than 0, not {value}")


# ---------------------------------------------------------------- policy


def gaussian_log_prob(value: Tensor, mean: Tensor, std: float) -> Tensor:
    """The log-density of N(mean, std^2 I) at `value`, both (B, ...), as a mean over dimensions: (B,) float64."""
    square = ((value - mean).double() / std).square().flatten(1).mean(1)
    return -0.5 * square - math.log(std) - 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Transition:
    """One draw of the policy: latents x and x' (1, C, T, h, w) at the levels s and s', and its log-probability (1,)."""

    before: Tensor
    after: Tensor
    level: float
    following: float
    log_prob: Tensor


def policy_mean(reasoner: Reasoner, condition: Condition, latents: Tensor, level: float, following: float) -> Tensor:
    """The mean (1 - s') x0(x, s) of the policy, differentiable."""
    return (1 - following) * reasoner.predict_clean_at(condition, latents, level)


def transition_log_prob(reasoner: Reasoner, condition: Condition, step: Transition) -> Tensor:
    """The log-probability (1,) of a draw under the present weights, differentiable.

    A first latent frame that is given is no part of the draw: it does not depend on the policy.
    """
    mean = policy_mean(reasoner, condition, step.before, step.level, step.following)
    known = condition.first_frame
    return gaussian_log_prob(counted(step.after, known), counted(mean, known), step.following)


@torch.no_grad()
def roll_out(reasoner: Reasoner, condition: Condition, noise: Noise) -> tuple[Tensor, list[Transition]]:
    """Sample as `Reasoner.sample` does; returns the clean latents (1, C, T, h, w) and the draws on the way."""
    sigmas, known = reasoner.settings.sigmas, condition.first_frame
    latents, steps = noise.z1, []
    for (level, following), draw in zip(pairwise(sigmas), noise.steps, strict=True):
        mean = policy_mean(reasoner, condition, latents, level, following)
        after = mean + following * draw
        log_prob = gaussian_log_prob(counted(after, known), counted(mean, known), following)
        steps.append(Transition(latents, after, level, following, log_prob))
        latents = after
    return reasoner.video(reasoner.predict_clean_at(condition, latents, sigmas[-1]), condition), steps


# ---------------------------------------------------------------- objective


def advantages(rewards: Tensor, eps: float) -> Tensor:
    """(r - mean) / (std + eps) of the rewards (G,) of a group; the standard deviation is that of the population."""
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + eps)


def clipped_loss(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(r A, clip(r, 1 - c, 1 + c) A), elementwise."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


@dataclass(frozen=True)
class Sampled:
    """A video of a group: its condition, its draws, its reward and its advantage."""

    condition: Condition
    steps: list[Transition]
    reward: Tensor
    advantage: Tensor


class FlowGRPO(SharedTraining):
    """Groups of videos, their rewards, and updates of the policy. Raises InputError for a sampler without draws."""

    settings: FlowGRPOSettings

    def __init__(self, settings: FlowGRPOSettings, *others: Any) -> None:
        super().__init__(settings, *others)
        if not self.reasoner.draws_later:
            sampler = self.reasoner.settings
            raise InputError(
                f"Flow-GRPO needs a Reasoner that draws noise after the first step, which this one, of sampler"
                f" {sampler.sampler!r} with {len(sampler.timesteps)} steps, does not: distil it to a few steps first"
            )

    def learn(self, index: int, generator: torch.Generator) -> dict[str, float]:
        settings, reasoner = self.settings, self.reasoner
        videos: list[Sampled] = []
        spread = 0.0
        for _ in range(self.train.batch_size):
            condition, queries = self.draw(generator)
            noises = reasoner.noise(condition, generator, settings.group_size).samples()
            rolled = [roll_out(reasoner, condition, noise) for noise in noises]
            rewards = torch.stack([self.reward(latents, queries) for latents, _ in rolled])
            spread += rewards.std(correction=0).item() / self.train.batch_size
            better = advantages(rewards, settings.advantage_eps)
            videos += [
                Sampled(condition, steps, *pair) for (_, steps), *pair in zip(rolled, rewards, better, strict=True)
            ]
        self.cost.add(generator_calls=len(videos), vlm_calls=len(videos))
        values = {"reward": sum(video.reward.item() for video in videos) / len(videos), "reward_std": spread}
        for k in range(settings.updates):
            values |= self.improve(videos, "first" if k == 0 else "last")
            values["grad_norm"] = self.update(index)
        return values

    def improve(self, videos: list[Sampled], name: str) -> dict[str, float]:
        """Leave the gradient of the clipped objective on the LoRA; returns metrics of the ratios under `name`."""
        ratios = []
        count = sum(len(video.steps) for video in videos)
        for video in videos:
            for step in video.steps:
                ratio = (transition_log_prob(self.reasoner, video.condition, step) - step.log_prob).exp()
                (clipped_loss(ratio, video.advantage, self.settings.clip).sum() / count).backward()
                ratios.append(ratio.detach())
        away = (torch.cat(ratios) - 1).abs()
        clipped = (away > self.settings.clip).double().mean().item()
        return {f"ratio_{name}": away.mean().item(), f"clipped_{name}": clipped}

    @torch.no_grad()
    def reward(self, latents: Tensor, queries: QuerySet) -> Tensor:
        """-L of a video from its latents (1, C, T, h, w), seen through the surrogate decoder as the method sees it."""
        reasoner, frames = self.reasoner, self.method.teacher_frames
        indices = teacher_frame_indices(reasoner.num_frames, frames)
        pixels = self.pipe.decoder.decode(latents, reasoner.decoded_indices(indices), None, check=False)
        losses = self.pipe.teacher.losses(pixels, indices, reasoner.fps, queries, check=False)
        return -vqa_objective(losses, self.method.goal_weight).double().cpu()


def load_settings(path: Path, overrides: dict[str, Any]) -> FlowGRPOSettings:
    """Read `FlowGRPOSettings` from a YAML file; `overrides` take precedence over its entries. Raises InputError."""
    return FlowGRPOSettings.load(path, overrides)


def run(settings: FlowGRPOSettings, resume: bool = False, tracker: Trackers = None) -> Path:
    """Train the LoRA (see `run_training`); returns its file."""
    return run_training(settings, FlowGRPO, resume, tracker)
