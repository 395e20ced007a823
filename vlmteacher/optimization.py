"""The loop of test-time optimisation, as an object that can be stopped after any step and taken up again."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vlmteacher.errors import InputError, NonFiniteFrames
from vlmteacher.lora import load_lora_state, lora_parameters, lora_state_dict
from vlmteacher.reward import vqa_objective

if TYPE_CHECKING:
    from vlmteacher.decoders.taehv import TinyVideoDecoder
    from vlmteacher.queries import QuerySet
    from vlmteacher.reasoners.base import Condition, Noise, Reasoner
    from vlmteacher.teachers.base import Teacher

GRADIENT_CLIP = 1.0
REMEDY = "try a lower learning rate or another dtype"


class NonFiniteError(ArithmeticError):
    """The loss or its gradient is not a finite number; the LoRA is left as it was before that step."""


@dataclass(frozen=True)
class Settings:
    """What the loop may be told; the defaults are the paper's (arXiv 2606.02564, section on the implementation).

    max_steps N >= 0; threshold tau > 0 on the loss (0.22 = -ln 0.8); goal_weight lambda in [0, 1]; teacher_frames
    K >= 1, frames that the Teacher sees; rank >= 1 of the LoRA; learning_rate > 0 of AdamW; keep: after N updates
    the "last" LoRA, or the "best" one, which had the lowest loss seen. check_final: where the one-step prediction is
    good enough, look at the few-step video too, and go on while that is not (the paper does not). fused_lora: compute
    the LoRA layers and what is between them by our operators, not by PEFT's and diffusers' expressions; the results
    agree to rounding. Raises InputError.
    """

    max_steps: int = 40
    threshold: float = 0.22
    goal_weight: float = 0.5
    teacher_frames: int = 24
    rank: int = 16
    learning_rate: float = 5e-5
    keep: Literal["last", "best"] = "last"
    check_final: bool = False
    fused_lora: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 0), ("teacher_frames", 1), ("rank", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value}")
        for name in ("threshold", "learning_rate"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be greater than 0, not {value}")
        if not 0 <= self.goal_weight <= 1:
            raise InputError(f"goal_weight must lie between 0 and 1, not {self.goal_weight}")
        if self.keep not in ("last", "best"):
            raise InputError(f'keep must be "last" or "best", not {self.keep!r}')

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def teacher_frame_indices(num_frames: int, count: int) -> list[int]:
    """`count` frame indices spread uniformly over 0..num_frames-1, both ends included, strictly rising.

    Raises InputError when there are fewer frames than asked for.
    """
    if not 1 <= count <= num_frames:
        raise InputError(f"the Teacher cannot see {count} frames of a video of {num_frames}: give 1 to {num_frames}")
    return [round(k * (num_frames - 1) / max(count - 1, 1)) for k in range(count)]


@torch.no_grad()
def frame_guards(frames: Tensor) -> dict[str, float]:
    """Cheap signs of reward hacking, to be watched over the steps (the detectors of UniRL#407).

    frames: (K, 3, H, W) in [0, 1]. Returns brightness and dark_fraction (luma below 0.1), edge_density (share of pixels
    whose luma differs from a neighbour's by more than 0.1), colour_entropy (bits, of 64 colour bins: 0..6) and
    temporal_jump (largest mean absolute change between two neighbouring frames), all measured on about 128x128 pixels.
    """
    stride = max(1, max(frames.shape[-2:]) // 128)
    frames = frames[..., ::stride, ::stride].float()
    luma = (frames * frames.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    edges = torch.maximum(
        luma[:, 1:, :-1].sub(luma[:, :-1, :-1]).abs(),
        luma[:, :-1, 1:].sub(luma[:, :-1, :-1]).abs(),
    )
    levels = (frames * 4).long().clamp(0, 3)
    bins = torch.bincount((levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2]).flatten(), minlength=64)
    share = bins[bins > 0] / bins.sum()
    jumps = frames.diff(dim=0).abs().mean((1, 2, 3))
    values = torch.stack(
        [
            luma.mean(),
            (luma < 0.1).float().mean(),
            (edges > 0.1).float().mean(),
            -(share * share.log2()).sum() + 0.0,
            jumps.max() if len(jumps) else luma.new_zeros(()),
        ]
    ).tolist()
    names = ("brightness", "dark_fraction", "edge_density", "colour_entropy", "temporal_jump")
    return dict(zip(names, values, strict=True))


class Optimization:
    """Test-time optimisation of the LoRA on `reasoner.transformer` for one instance (method, Algorithm 1, step 3).

    Iterating yields the history row of each step until `stopped` is set; `step()` does one. A row is
    `{"step", "loss", "p_yes": [1+M floats], "grad_norm": float | None, "guards": {...}, "seconds"}`; loss and P(Yes)
    are measured before the step's update, and grad_norm is None where no update followed. Nothing in a step is drawn
    at random, so that `state_dict()` / `load_state_dict()` between any two steps change no bit of the result.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        decoder: TinyVideoDecoder,
        teacher: Teacher,
        condition: Condition,
        noise: Noise,
        queries: QuerySet,
        settings: Settings,
    ) -> None:
        self.reasoner, self.decoder, self.teacher = reasoner, decoder, teacher
        self.condition, self.noise, self.queries, self.settings = condition, noise, queries, settings
        self.frame_indices = teacher_frame_indices(condition.num_frames, settings.teacher_frames)
        self.parameters = list(lora_parameters(reasoner.transformer))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.0)
        self.history: list[dict[str, Any]] = []
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.stopped: Literal["threshold", "max_steps"] | None = None if settings.max_steps else "max_steps"

    @property
    def updates(self) -> int:
        """How often the LoRA was updated."""
        return sum(row["grad_norm"] is not None for row in self.history)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.stopped is None:
            yield self.step()

    def step(self) -> dict[str, Any]:
        """Look at the one-step prediction through the Teacher; stop if it is good enough, else update the LoRA.

        Raises NonFiniteError; the state is then what it was before the step.
        """
        start = time.perf_counter()
        latents = self.reasoner.predict_clean(self.condition, self.noise)
        if latents.isnan().any():  # the decoder refuses them
            raise NonFiniteError(
                f"the prediction of step {len(self.history)} holds NaN: try a lower learning rate or another dtype"
            )
        frames = self.decoder.decode(latents, self.frame_indices)
        try:
            losses = self.teacher.losses(frames, self.frame_indices, self.reasoner.fps, self.queries)
        except NonFiniteFrames as error:
            raise NonFiniteError(f"step {len(self.history)}: {error}") from error
        loss = vqa_objective(losses, self.settings.goal_weight)
        row = {"step": len(self.history), "loss": loss.item(), "p_yes": losses.detach().neg().exp().tolist()}
        if not math.isfinite(row["loss"]):
            raise NonFiniteError(
                f"the loss of step {row['step']} is {row['loss']}: try a lower learning rate or another dtype"
            )

        best = self.best
        if self.settings.keep == "best" and (best is None or row["loss"] < best[0]):
            best = row["loss"], lora_state_dict(self.reasoner.transformer)
        stop = row["loss"] <= self.settings.threshold
        if stop and self.settings.check_final:
            row["final_loss"] = self._final_loss()
            stop = row["final_loss"] <= self.settings.threshold
        row["grad_norm"] = None if stop else self._update(loss, row["step"])

        row["guards"] = frame_guards(frames)
        row["seconds"] = time.perf_counter() - start
        self.best = best
        self.history.append(row)
        if stop:
            self.stopped = "threshold"
        elif len(self.history) >= self.settings.max_steps:
            self.stopped = "max_steps"
        return row

    @torch.no_grad()
    def _final_loss(self) -> float:
        """The objective on the few-step video that the adapted Reasoner would give now."""
        video = self.reasoner.decode(self.reasoner.sample(self.condition, self.noise))
        frames = video[self.frame_indices]
        losses = self.teacher.losses(frames, self.frame_indices, self.reasoner.fps, self.queries)
        return vqa_objective(losses, self.settings.goal_weight).item()

    def _update(self, loss: Tensor, step: int) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP).item()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of step {step} is not finite: try a lower learning rate or another dtype"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def finish(self) -> None:
        """Leave on the transformer the LoRA that `settings.keep` asks for."""
        if self.settings.keep == "best" and self.best is not None:
            load_lora_state(self.reasoner.transformer, self.best[1])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the coming steps depend on; `torch.load(weights_only=True)` takes it."""
        return {
            "lora": lora_state_dict(self.reasoner.transformer),
            "optimizer": None if self.stopped else copy.deepcopy(self.optimizer.state_dict()),
            "history": copy.deepcopy(self.history),
            "best": self.best,
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a run of the same instance and settings where `state_dict()` left it."""
        load_lora_state(self.reasoner.transformer, state["lora"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.history = copy.deepcopy(state["history"])
        self.best, self.stopped = state["best"], state["stopped"]
