"""`vlmteacher train sft`: supervised fine-tuning of a many-step Reasoner on the videos of a domain.

Flow matching: the network learns noise - x0 at x = (1 - sigma) x0 + sigma noise; the first latent frame is given and
left out of the loss. The prompt is dropped in a share of the draws, as classifier-free guidance requires.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vlmteacher.distillation.dataset import LatentDataset
from vlmteacher.distillation.flow_matching import flow_matching_loss, noised
from vlmteacher.distillation.kinds import check_kinds
from vlmteacher.distillation.trainer import TrainSettings, training_folder
from vlmteacher.distillation.training import Training, begin, build_settings, finish, read_settings
from vlmteacher.errors import InputError
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition
from vlmteacher.reasoners.many_step import sample_many
from vlmteacher.torch_modes import plain_torch
from vlmteacher.trackers import LOGS, Trackers, tracking

if TYPE_CHECKING:
    from accelerate import Accelerator

LEVELS = 8  # noise levels at which every held-out video is validated


@dataclass(frozen=True)
class FineTuningSettings:
    """Settings of a fine-tuning: the entries of its YAML file. Raises InputError.

    Attributes:
        reasoner: directory or hub id of the Reasoner to start from.
        data: folder in VBVR's layout.
        out: folder to write to.
        cache: folder of the encoded instances, in `out` by default; trainings on the same data can share it.
        noise_levels: distribution of sigma before the shift: uniform, or the logistic of a normal draw.
        logit_mean, logit_std: mean and standard deviation of that normal draw.
        shift: s in sigma = s t / (1 + (s - 1) t), as in the Reasoner's settings.
        caption_dropout: share of the draws without the prompt, below 1.
        held_out: number of instances to validate on, spread over the data.
        samples: number of held-out instances whose videos are written at each validation, sampled in `sample_steps`
            Euler steps with `guidance`.
        train: steps, batch size, learning rate, LoRA or full weights, ...
    """

    reasoner: str
    data: str
    out: str
    cache: str | None = None
    noise_levels: Literal["uniform", "logit-normal"] = "logit-normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    caption_dropout: float = 0.1
    held_out: int = 8
    samples: int = 2
    sample_steps: int = 30
    guidance: float = 3.0
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.noise_levels not in ("uniform", "logit-normal"):
            raise InputError(f"noise_levels must be uniform or logit-normal, not {self.noise_levels!r}")
        for name in ("logit_std", "shift"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be greater than 0, not {value}")
        if not math.isfinite(self.logit_mean):
            raise InputError(f"logit_mean must be a number, not {self.logit_mean}")
        if not 0 <= self.caption_dropout < 1:
            raise InputError(f"caption_dropout must lie between 0 and 1, not {self.caption_dropout}")
        if not (self.guidance >= 0 and math.isfinite(self.guidance)):
            raise InputError(f"guidance must be 0 or greater, not {self.guidance}")
        for name, low in {"held_out": 1, "samples": 0, "sample_steps": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise InputError(f"{name} must be a whole number of at least {low}, not {value}")

    def to_dict(self) -> dict[str, Any]:
        """The settings that a resumed run must share, by their names in the YAML file."""
        values = asdict(self)
        return {
            **values.pop("train"),
            **{name: value for name, value in values.items() if name not in ("out", "cache")},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FineTuningSettings:
        """Make settings from the entries of a YAML file, in which those of `TrainSettings` stand beside the others."""
        return build_settings(values, lambda entries: cls(**entries))


def load_settings(path: Path, overrides: dict[str, Any]) -> FineTuningSettings:
    """Read `FineTuningSettings` from a YAML file; `overrides` take precedence over its entries. Raises InputError."""
    return read_settings(path, overrides, lambda entries: FineTuningSettings(**entries))


class FineTuning(Training):
    """The loss and the validation of a fine-tuning."""

    def __init__(
        self, settings: FineTuningSettings, reasoner: Reasoner, data: LatentDataset, accelerator: Accelerator
    ) -> None:
        rest, self.held_out = data.split(settings.held_out)
        super().__init__(reasoner, rest, accelerator, settings.train)
        self.settings, self.empty = settings, data.empty_prompt.to(reasoner.device)
        self.losses = {"student": self.loss}
        self.add_optimizers({"student": settings.train.learning_rate})

    def draw_sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count,) noise levels in (0, 1) on the CPU."""
        settings = self.settings
        if settings.noise_levels == "uniform":
            t = torch.rand(count, generator=generator)
        else:
            t = torch.sigmoid(settings.logit_mean + settings.logit_std * torch.randn(count, generator=generator))
        return settings.shift * t / (1 + (settings.shift - 1) * t)

    def loss(self, condition: Condition, real: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Flow matching on real latents (B, C, T, h, w) at drawn levels, and its metric.

        Must be called inside ``networks.active("student")``.
        """
        dropped = torch.rand(len(real), generator=generator) < self.settings.caption_dropout
        embeds = torch.where(dropped[:, None, None].to(real.device), self.empty, condition.prompt_embeds)
        sigma = self.draw_sigmas(len(real), generator).to(real.device)
        loss = self._flow(replace(condition, prompt_embeds=embeds), real, sigma, generator)
        return loss, {"flow": float(loss.detach())}

    def _flow(self, condition: Condition, real: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(real.shape, generator=generator).to(real.device)
        with self.networks.active("student") as network:
            velocity = self.reasoner.velocity(condition, noised(real, noise, sigma), sigma, transformer=network)
        return flow_matching_loss(velocity, real, noise, condition.first_frame)

    @torch.no_grad()
    def validate(self, step: int, out: Path) -> dict[str, float]:
        """The mean loss on the held-out videos, with the same levels and noise every time; writes ``samples/``."""
        settings, total = self.settings, 0.0
        for index in range(len(self.held_out)):
            generator = torch.Generator().manual_seed(index)
            real, condition = self.held_out.batch([index])
            for level in range(LEVELS):
                sigma = torch.full((1,), (level + 0.5) / LEVELS, device=real.device)
                with self.autocast():
                    total += float(self._flow(condition, real, sigma, generator))
            if index < settings.samples and self.accelerator.is_main_process:
                noise = self.reasoner.noise(condition, generator)
                with self.student(), self.autocast():
                    latents = sample_many(
                        self.reasoner,
                        condition,
                        self.empty,
                        noise,
                        steps=settings.sample_steps,
                        guidance=settings.guidance,
                    )
                self.write_sample(out / "samples" / f"step-{step:06d}-{index}.mp4", latents)
        return {"flow": total / (LEVELS * len(self.held_out))}


@plain_torch()
def run(settings: FineTuningSettings, resume: bool = False, tracker: Trackers = None) -> Path:
    """Fine-tune a Reasoner; returns its pipeline directory, ``pipeline`` in `settings.out`.

    tracker: see `trackers.tracking`.

    Raises:
        InputError: a setting, an instance or the Reasoner cannot be used.
        NonFiniteError: the training broke down; the last good state stays.
    """
    from accelerate import Accelerator

    out = Path(settings.out)
    accelerator = Accelerator()
    with tracking(tracker, out / LOGS), training_folder(out, resume, accelerator):
        source, train = settings.reasoner, settings.train
        reasoner, data, given = begin(source, settings.data, settings.cache, out, train, accelerator)
        reasoner.settings = replace(reasoner.settings, shift=settings.shift)
        tuning = FineTuning(settings, reasoner, data, accelerator)
        shared = settings.to_dict() | given
        return finish(tuning, shared, source, out, resume, lambda step: tuning.validate(step, out))
