"""Few-step videos of one instance and the Teacher's answers about them; the one from before is made when needed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vlmteacher.errors import InputError
from vlmteacher.instance import Instance
from vlmteacher.lora.adapter import add_lora, load_lora_state, lora_state_dict, remove_lora
from vlmteacher.ops import sdpa
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.output import Before, convert
from vlmteacher.placement import peak_memory
from vlmteacher.progress import reporting
from vlmteacher.queries import QuerySet
from vlmteacher.rewards import Rewards

if TYPE_CHECKING:
    from vlmteacher.frozen_models import FrozenModels
    from vlmteacher.reasoners.condition import Condition, Noise

PARTS = {"queries": "writing queries", "before": "sampling the video before", "after": "sampling the final video"}


@dataclass(frozen=True)
class Sample:
    """A few-step video (F, 3, H, W) in [0, 1], -log P(Yes) (1+M,) of the queries on it, its index among the samples.

    objective: what the optimisation minimises, (). rewards: the losses (R,) of the rewards.
    """

    video: Tensor
    losses: Tensor
    objective: Tensor
    rewards: Tensor | None = None
    index: int = 0


class FirstVideo:
    """The few-step video with the LoRA as it is at first, and the Teacher's answers; made when it is asked for, once.

    rewards: judge it too, where there are any. seconds, memory: of the call, which the making is added to.
    """

    rewards: Rewards | None = None

    def __init__(
        self,
        models: FrozenModels,
        instance: Instance,
        condition: Condition,
        noise: Noise,
        queries: QuerySet,
        usage: tuple[dict[str, float], dict[str, int]],
    ) -> None:
        self.models, self.instance, self.queries = models, instance, queries
        self.condition, self.noise = condition, noise
        self.seconds, self.memory = usage
        self.fused = models.models.get("fused")
        self.start: dict[str, Tensor] | None = None  # the LoRA, while it is on the transformer
        self._made: Sample | None = None

    def add_lora(self) -> None:
        """Put the LoRA on the transformer: a fresh one, which changes nothing yet, or the one to start from."""
        instance = self.instance
        add_lora(
            instance.reasoner.transformer,
            instance.settings.rank,
            seed=instance.seed,
            start=instance.lora,
            fused=instance.settings.fused_lora,
            blocks=instance.settings.lora_blocks,
        )

    def sample(self, noise: Noise, index: int = 0) -> Sample:
        """A few-step video of the LoRA as it is now."""
        instance, same = self.instance, self.instance.reasoner.ranks.same
        video = same(self.models.sample(self.condition, noise, instance.reasoner))
        indices, settings = instance.frame_indices, instance.settings
        losses = same(self.models.judge(video, indices, self.queries, instance.teacher, settings))
        teacher = vqa_objective(losses, instance.settings.goal_weight)
        if self.rewards is None:
            return Sample(video, losses, teacher, index=index)
        with torch.no_grad():
            rewards = same(self.rewards.losses(video[instance.frame_indices]))
            return Sample(video, losses, self.rewards.total(teacher, rewards), rewards, index)

    def __call__(self) -> Sample:
        """The video, at once if it was made before. Raises InputError where the Reasoner has changed since the call."""
        if self._made is None:
            if self.models.models.get("fused") != self.fused:
                raise InputError("the video from before cannot be made any more: a LoRA was fused after the call")
            deterministic = self.instance.settings.deterministic
            self._made = self.models.at_work(self._make, deterministic=deterministic)
        return self._made

    def shown(self, output_type: Literal["pil", "np", "pt"]) -> Before:
        """The video in an output type, and the answers about it."""
        sample = self()
        loss = vqa_objective(sample.losses, self.instance.settings.goal_weight).item()
        return Before(convert(sample.video, output_type), sample.losses.neg().exp().tolist(), loss)

    def _make(self) -> Sample:
        reasoner, transformer = self.instance.reasoner, self.instance.reasoner.transformer
        attention = sdpa.chosen(self.instance.settings.attention, reasoner.device)
        with attention, timed("before", self.seconds, self.memory, self.models):
            if self.start is None:
                self.add_lora()
                try:
                    return self.sample(self.noise)
                finally:
                    remove_lora(transformer)
                    self.models.need()
            now = lora_state_dict(transformer)
            load_lora_state(transformer, self.start)
            try:
                return self.sample(self.noise)
            finally:
                load_lora_state(transformer, now)


@contextmanager
def timed(
    name: str, seconds: dict[str, float], memory: dict[str, int], models: FrozenModels, shown: bool = True
) -> Iterator[None]:
    """Add the seconds of a part of a call, and the peak of the memory at its end, to those of the other parts."""
    start = time.perf_counter()
    with reporting(PARTS[name]) if shown else nullcontext():
        yield
    seconds[name] = time.perf_counter() - start
    memory[name] = peak_memory(*models.devices.values())
