"""The objective of test-time optimisation: the Teacher's loss on the Reasoner's prediction, as the LoRA is now.

One evaluation goes through Reasoner, surrogate decoder and Teacher, is differentiable in the LoRA, and reads nothing
from the device: its `Metrics` stay one flat tensor there until an engine reads them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmteacher.lora.adapter import check_gradients, frozen_blocks, lora_parameters
from vlmteacher.ops.patchify import PatchRows
from vlmteacher.optimization.frames import uniform_indices, window_losses
from vlmteacher.optimization.guards import (
    GUARDS,
    frame_contrast,
    frame_guards,
    frame_statistics,
    small_frames,
    statistics_change,
)
from vlmteacher.optimization.reward import pick, vqa_objective
from vlmteacher.reasoners.frozen_front import FrozenFront

if TYPE_CHECKING:
    from vlmteacher.decoders.taehv import SurrogateDecoder
    from vlmteacher.queries import QuerySet
    from vlmteacher.reasoners.base import Reasoner
    from vlmteacher.reasoners.condition import Condition, Noise
    from vlmteacher.rewards import Rewards
    from vlmteacher.settings import Settings
    from vlmteacher.teachers.base import Teacher

GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class Metrics:
    """The metrics of one evaluation, on the host.

    loss: L_VQA, without the pull. latents_nan: whether the predicted latents hold NaN. frames_min, frames_max: extremes
    of the decoded frames. guards: `frame_guards` by name. contrast: `frame_contrast`. p_yes: P(Yes) of each query, goal
    first. grad_norm: the LoRA gradient's norm before clipping, None before the backward. rewards: the loss of each.
    """

    loss: float
    latents_nan: bool
    frames_min: float
    frames_max: float
    guards: dict[str, float]
    contrast: float
    p_yes: list[float]
    rewards: list[float] = field(default_factory=list)
    grad_norm: float | None = None

    @staticmethod
    def pack(
        loss: Tensor, latents: Tensor, frames: Tensor | PatchRows, losses: Tensor, rewards: Tensor | None = None
    ) -> Tensor:
        """Pack the metrics of a forward into one float32 tensor, in the order of the fields.

        loss: scalar. latents: (1, C, T, h, w). frames: (K, 3, H, W), or their patch rows. losses: (1+M,). rewards:
        (R,), or None for R = 0. Returns (5 + len(GUARDS) + 1+M + R,) on the loss's device; the backward appends the
        gradient's norm.
        """
        small = small_frames(frames)
        extremes = frames.aminmax()
        parts = [loss, latents.isnan().any(), *extremes, frame_guards(small), frame_contrast(small), losses.neg().exp()]
        parts += [] if rewards is None else [rewards]
        return torch.cat([part.to(loss.device, torch.float32).view(-1) for part in parts])

    @classmethod
    def unpack(cls, packed: Tensor, queries: int, rewards: int = 0) -> Metrics:
        """Read packed metrics from the device, with or without the gradient's norm; queries: 1+M, rewards: R.

        This is a step's only read of the device.
        """
        loss, nan, low, high, *rest = packed.tolist()
        guards, (contrast, *rest) = rest[: len(GUARDS)], rest[len(GUARDS) :]
        p_yes, own, norm = rest[:queries], rest[queries : queries + rewards], rest[queries + rewards :]
        return cls(loss, bool(nan), low, high, dict(zip(GUARDS, guards, strict=True)), contrast, p_yes, own, *norm)


class Objective:
    """L_VQA of one instance as a function of the LoRA on `reasoner.transformer` (method, Algorithm 1, step 3).

    frame_indices: the frames that the Teacher sees, of all windows; None: uniform ones. parameters: the LoRA's tensors.
    anchor: the latents before the first update, where `settings.pull` draws to them; statistics: `frame_statistics`
    then, likewise. rewards: what is added to the Teacher's loss, if anything. shown: the frames (K, 3, h, w) of the
    last evaluation, before any jitter and at about 128x128 pixels, for the report. The `MemoryLadder` sets
    decoder_chunk, frames that the surrogate decoder computes at a time (None: it chooses), and offload, whether the
    Reasoner's saved activations wait in pinned host memory.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        decoder: SurrogateDecoder,
        teacher: Teacher,
        condition: Condition,
        noise: Noise,
        queries: QuerySet,
        settings: Settings,
        rewards: Rewards | None = None,
        frame_indices: Sequence[int] | None = None,
    ) -> None:
        self.reasoner, self.decoder, self.teacher, self.rewards = reasoner, decoder, teacher, rewards
        self.condition, self.noise, self.queries, self.settings = condition, noise, queries, settings
        self.frame_indices = list(frame_indices or uniform_indices(condition.num_frames, settings))
        self.parameters = lora_parameters(reasoner.transformer)
        self.anchor: Tensor | None = None
        self.statistics: Tensor | None = None
        self.shown: Tensor | None = None
        self.decoder_chunk: int | None = None
        self.offload = False
        frozen = frozen_blocks(reasoner.transformer, settings.lora_blocks)
        if settings.target != "first_step":  # later predictions have other inputs at every step
            frozen = 0
        self._front: AbstractContextManager[object] = (
            FrozenFront(reasoner.transformer, frozen) if frozen else nullcontext()
        )

    def evaluate(self, step: int = 0) -> tuple[Tensor, Tensor]:
        """Return the loss to differentiate (L_VQA plus the pulls, a scalar) and the packed `Metrics`, on the device.

        step: number of the step, which decides how `frame_jitter` shifts the frames.
        """
        offload: Any = torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offload else nullcontext()
        with offload, self._front:
            latents = self.reasoner.predict_target(self.condition, self.noise, self.settings.target)
        frames = self._decode(latents)
        shown = self._jittered(frames, step) if self.settings.frame_jitter else frames
        with torch.set_grad_enabled(self.settings.teacher_weight > 0):
            losses = self._judge(shown, check=False)
        loss, rewards = self.total(losses, frames)
        with torch.no_grad():
            metrics = Metrics.pack(loss, latents, frames, losses, rewards)
            self.shown = small_frames(frames).clone()  # a view would keep the whole graph
        if self.settings.pull:
            if self.anchor is None:
                self.anchor = latents.detach()
            loss = loss + self.settings.pull * (latents - self.anchor).square().mean().to(loss)
        if self.settings.frame_statistics:
            assert isinstance(frames, Tensor)  # see `_decode`
            statistics = frame_statistics(frames)
            if self.statistics is None:
                self.statistics = statistics.detach()
            change = statistics_change(statistics, self.statistics)
            loss = loss + self.settings.frame_statistics * change.to(loss)
        return loss, metrics

    def total(self, losses: Tensor, frames: Tensor | PatchRows) -> tuple[Tensor, Tensor | None]:
        """The objective of the Teacher's losses (1+M,) and the rewards' on frames (K, 3, H, W); and the latter (R,)."""
        loss = vqa_objective(losses, self.settings.goal_weight)
        if self.rewards is None:
            return loss, None
        assert isinstance(frames, Tensor)  # see `_decode`
        rewards = self.rewards.losses(frames)
        return self.rewards.total(loss, rewards), rewards

    def backward(self, loss: Tensor, metrics: Tensor) -> Tensor:
        """Leave the clipped gradient of `loss` on the parameters; append its norm before clipping to `metrics`.

        Raises InputError where a parameter has no gradient.
        """
        loss.backward()
        if any(parameter.grad is None for parameter in self.parameters):
            check_gradients(self.reasoner.transformer)
        self.reasoner.ranks.sum([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        return torch.cat([metrics, norm.to(metrics).view(1)])

    def read(self, metrics: Tensor) -> Metrics:
        """The metrics that `evaluate` or `backward` packed, read from the device; on every rank those of rank 0."""
        metrics = self.reasoner.ranks.same(metrics)
        return Metrics.unpack(metrics, len(self.queries.questions), len(self.rewards.names) if self.rewards else 0)

    def needs_gradient(self, metrics: Metrics) -> bool:
        """Whether an update can follow an evaluation with these metrics."""
        return metrics.loss > self.settings.threshold or self.settings.check_final

    @torch.no_grad()
    def final_video(self) -> tuple[Tensor, Tensor]:
        """Sample the few-step video of the Reasoner with the present LoRA, and decode it by the standard VAE.

        Returns the video (F, 3, H, W) in [0, 1] and the Teacher's losses (1+M,) on it; of several samples
        (`final_samples`) the best. Raises NonFiniteFrames.
        """
        latents = [self.reasoner.sample(self.condition, noise) for noise in self.noise.samples()]
        videos = [self.reasoner.decode(sample) for sample in latents]
        indices, ranks = self.frame_indices, self.reasoner.ranks
        losses = [ranks.same(self._judge(video[indices])) for video in videos]
        best = pick([self.total(one, video[indices])[0] for one, video in zip(losses, videos, strict=True)])
        return videos[best], losses[best]

    @torch.no_grad()
    def final_loss(self) -> float:
        """The objective of `final_video`."""
        video, losses = self.final_video()
        return self.total(losses, video[self.frame_indices])[0].item()

    def _judge(self, frames: Tensor | PatchRows, check: bool = True) -> Tensor:
        """The Teacher's losses (1+M,) on the frames that it sees."""
        fps, settings = self.reasoner.fps, self.settings
        return window_losses(self.teacher, frames, self.frame_indices, fps, self.queries, settings, check)

    def _decode(self, latents: Tensor) -> Tensor | PatchRows:
        """Decode the frames (K, 3, H, W) that the Teacher sees, or its patch rows where it would not resize frames.

        Frames that are to be shifted, measured, shown to rewards, or judged by windows must stay frames.
        """
        height, width = (side * self.decoder.spatial_stride for side in latents.shape[-2:])
        layout = self.teacher.patch_layout(len(self.frame_indices), height, width)
        indices, settings = self.reasoner.decoded_indices(self.frame_indices), self.settings
        as_frames = settings.frame_jitter or settings.frame_statistics or settings.windows > 1 or self.rewards
        if layout is None or as_frames:
            return self.decoder.decode(latents, indices, self.decoder_chunk, check=False)
        return self.decoder.decode_rows(latents, layout, indices, self.decoder_chunk, check=False)

    def _jittered(self, frames: Tensor | PatchRows, step: int) -> Tensor:
        """Shift all frames (K, 3, H, W) alike by at most `frame_jitter` pixels, with edges repeated."""
        assert isinstance(frames, Tensor)  # see `_decode`
        most = self.settings.frame_jitter
        draw = random.Random(step)
        down, across = (most + draw.randint(-most, most) for _ in range(2))
        padded = torch.nn.functional.pad(frames, (most,) * 4, mode="replicate")
        return padded[..., down : down + frames.shape[-2], across : across + frames.shape[-1]]
