"""`vlmteacher distill reasoner`: a few-step Reasoner from a many-step one, by one of three methods.

The methods are ``dmd2`` (the default, ``dmd2.py``), ``consistency`` (``consistency.py``), and ``few-timesteps``: plain
flow matching on the videos at the few timesteps only, which distils nothing and serves as a baseline.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmteacher.distillation import consistency, dmd2
from vlmteacher.distillation.adapters import Role
from vlmteacher.distillation.dataset import LatentDataset
from vlmteacher.distillation.flow_matching import flow_matching_loss, grid_levels, noised
from vlmteacher.distillation.kinds import check_kinds
from vlmteacher.distillation.trainer import TrainSettings, training_folder
from vlmteacher.distillation.training import Training, begin, build_settings, finish, read_settings
from vlmteacher.errors import InputError
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition
from vlmteacher.reasoners.sampling import relative_rms
from vlmteacher.torch_modes import plain_torch
from vlmteacher.trackers import LOGS, Trackers, tracking

if TYPE_CHECKING:
    from accelerate import Accelerator

METHODS = ("dmd2", "consistency", "few-timesteps")


@dataclass(frozen=True)
class DistillSettings:
    """Settings of a distillation: the entries of its YAML file. Raises InputError.

    Attributes:
        reasoner: directory or hub id of the many-step Reasoner.
        data: folder in VBVR's layout: first frames, prompts, and videos for the methods that use them.
        out: folder to write to.
        cache: folder of the encoded instances, in `out` by default; trainings on the same data can share it.
        method: one of `METHODS`.
        timesteps, shift: schedule of the few-step sampler (see the Reasoner's settings).
        offload: with full weights, keep idle networks in main memory.
        train: steps, batch size, learning rate, LoRA or full weights, ...; a step is one update of the student.
        dmd2, consistency: settings of the method.
    """

    reasoner: str
    data: str
    out: str
    cache: str | None = None
    method: str = "dmd2"
    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 1.0
    offload: bool = False
    train: TrainSettings = field(default_factory=TrainSettings)
    dmd2: dmd2.DMD2Settings = field(default_factory=dmd2.DMD2Settings)
    consistency: consistency.ConsistencySettings = field(default_factory=consistency.ConsistencySettings)

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}: choose from {', '.join(METHODS)}")
        ts = self.timesteps
        if not ts or ts[0] != 1000 or ts[-1] <= 0 or any(a <= b for a, b in pairwise(ts)):
            raise InputError(f"timesteps must fall from 1000 and stay above 0, not {list(ts)}")
        if not (self.shift > 0 and math.isfinite(self.shift)):
            raise InputError(f"shift must be greater than 0, not {self.shift}")

    def to_dict(self) -> dict[str, Any]:
        """The settings that a resumed run must share, by their names in the YAML file; only those of the method."""
        values = asdict(self)
        for name in ("dmd2", "consistency"):
            own = values.pop(name)
            if name == self.method:
                values |= {f"{name}.{entry}": value for entry, value in own.items()}
        return {
            **values.pop("train"),
            **{name: value for name, value in values.items() if name not in ("out", "cache")},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillSettings:
        """Make settings from the entries of a YAML file, in which those of `TrainSettings` stand beside the others."""
        return build_settings(values, cls._build)

    @classmethod
    def _build(cls, values: dict[str, Any]) -> DistillSettings:
        for name, part in (("dmd2", dmd2.DMD2Settings), ("consistency", consistency.ConsistencySettings)):
            if name in values:
                values[name] = part(**(values[name] or {}))
        if isinstance(values.get("timesteps"), list):
            values["timesteps"] = tuple(values["timesteps"])
        return cls(**values)


def load_settings(path: Path, overrides: dict[str, Any]) -> DistillSettings:
    """Read `DistillSettings` from a YAML file; `overrides` take precedence over its entries. Raises InputError."""
    return read_settings(path, overrides, DistillSettings._build)


class Distillation(Training):
    """The networks and losses of a distillation; a step updates the fake score, where there is one, and the student."""

    def __init__(
        self, settings: DistillSettings, reasoner: Reasoner, data: LatentDataset, accelerator: Accelerator
    ) -> None:
        train = settings.train
        roles: tuple[Role, ...] = ("student", "fake") if settings.method == "dmd2" else ("student",)
        super().__init__(reasoner, data, accelerator, train, roles, settings.offload)
        empty = data.empty_prompt.to(reasoner.device)
        rates: dict[Role, float] = {"student": train.learning_rate}
        if settings.method == "dmd2":
            method = dmd2.DMD2(reasoner, self.networks, empty, settings.dmd2, train.seed)
            if method.critic is not None:
                self.modules["fake"] = nn.ModuleList([self.modules["fake"], method.critic])
            self.losses = {"fake": method.fake_loss, "student": lambda c, real, g: method.student_loss(c, g)}
            self.times["fake"], rates["fake"] = settings.dmd2.fake_updates, settings.dmd2.fake_learning_rate
        elif settings.method == "consistency":
            follower = consistency.Consistency(reasoner, self.networks, empty, settings.consistency)
            self.losses = {"student": follower.student_loss}
        else:
            self.losses = {"student": self._few_timesteps_loss}
        self.add_optimizers(rates)

    def _few_timesteps_loss(
        self, condition: Condition, real: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Flow matching on real latents (B, C, T, h, w) at the levels of the few-step grid."""
        sigma, _ = grid_levels(self.reasoner.settings.sigmas, len(real), generator)
        noise, sigma = torch.randn(real.shape, generator=generator).to(real.device), sigma.to(real.device)
        with self.networks.active("student") as network:
            x = noised(real, noise, sigma)
            velocity = self.reasoner.velocity(condition, x, sigma, transformer=network)
        loss = flow_matching_loss(velocity, real, noise, condition.first_frame)
        return loss, {"flow": float(loss.detach())}

    @torch.no_grad()
    def validate(self, step: int, out: Path, count: int = 4) -> dict[str, float]:
        """The relative RMS between one-step and few-step videos of the first instances; writes ``samples/``."""
        distances = []
        for index in range(min(count, len(self.data))):
            _, condition = self.data.batch([index])
            noise = self.reasoner.noise(condition, torch.Generator().manual_seed(index))
            with self.student():
                one, few = self.reasoner.predict_clean(condition, noise), self.reasoner.sample(condition, noise)
            distances.append(relative_rms(one, few, condition.first_frame))
            self.write_sample(out / "samples" / f"step-{step:06d}-{index}.mp4", few)
        return {"relative_rms": sum(distances) / len(distances)}


@plain_torch()
def run(settings: DistillSettings, resume: bool = False, tracker: Trackers = None) -> Path:
    """Distil a Reasoner; returns its pipeline directory, ``pipeline`` in `settings.out`.

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
        reasoner.settings = replace(
            reasoner.settings,
            timesteps=settings.timesteps,
            shift=settings.shift,
            sampler="renoise",  # the sampler that the losses train for; the student needs no guidance
            guidance_scale=1.0,
            guidance_scale_2=None,
        )
        distillation = Distillation(settings, reasoner, data, accelerator)
        shared = settings.to_dict() | given
        return finish(distillation, shared, source, out, resume, lambda step: distillation.validate(step, out))
