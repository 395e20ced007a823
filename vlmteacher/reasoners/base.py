"""What a Reasoner is: a few-step video model that the Teacher corrects at test time."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.reasoners import few_step

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Condition:
    """What the video must answer, encoded once for the instance.

    Attributes:
        prompt_embeds: (B, L, D), zero beyond the prompt's own tokens; B = 1 but in training.
        first_frame: (B, C, 1, h, w) normalised latents of the given image where the model keeps them as the video's
            first latent frame, or None (text only, or the image comes in by `inputs`).
        num_frames, height, width: size of the video in frames and pixels.
        inputs: what else the family's transformer is given, by name: masks, image features, a second text; (B, ...).
        negative: the same instance with the negative prompt, for models that need guidance; None for the others.
    """

    prompt_embeds: Tensor
    first_frame: Tensor | None
    num_frames: int
    height: int
    width: int
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    negative: Condition | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        return self.num_frames, self.height, self.width


@dataclass(frozen=True)
class Noise:
    """Every random draw of an instance, so that "the same noise" holds for the whole sampler.

    Attributes:
        z1: (B, C, T, h, w) float32, the latents at t = 1.
        steps: one draw like `z1` for each later sampler step, which puts noise back on the clean prediction.
    """

    z1: Tensor
    steps: tuple[Tensor, ...]


@dataclass(frozen=True)
class Settings:
    """How a Reasoner samples; `reasoner.json` beside `model_index.json` overrides any of it.

    Attributes:
        timesteps: where the few-step sampler predicts, from 1000 (pure noise) downwards.
        shift: s in sigma = s t / (1 + (s - 1) t) with t = timestep / 1000.
        guidance_scale: g in v_negative + g (v - v_negative), in sampling and in the one-step prediction; 1 is none,
            what distilled models need.
        num_frames, height, width, fps: the video made when the caller does not say.
        max_sequence_length: prompt tokens, padded or cut to this length.
    """

    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 1.0
    guidance_scale: float = 1.0
    num_frames: int = 89
    height: int = 704
    width: int = 1280
    fps: float = 24.0
    max_sequence_length: int = 512

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise levels of `timesteps`, warped by `shift`; the first is 1."""
        ts = [timestep / 1000 for timestep in self.timesteps]
        return tuple(self.shift * t / (1 + (self.shift - 1) * t) for t in ts)

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read a `reasoner.json`; InputError names the entry that cannot be used."""
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            unknown = sorted(set(values) - {field.name for field in fields(cls)})
            if unknown:
                raise ValueError(f"unknown entry {unknown[0]!r}")
            settings = cls(**values | {"timesteps": tuple(values.get("timesteps", cls.timesteps))})
            ts = settings.timesteps
            if not ts or ts[0] != 1000 or ts[-1] <= 0 or any(a <= b for a, b in pairwise(ts)):
                raise ValueError(f"timesteps must fall from 1000 and stay above 0, not {list(ts)}")
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} cannot be used: {error}") from error
        return settings


class Reasoner(ABC):
    """A family of video models behind the five calls of the method (encode, noise, predict_clean, sample, decode).

    Velocity convention (flow matching): x = (1 - sigma) x0 + sigma noise, v = noise - x0, so x0 = x - sigma v.
    """

    transformer: nn.Module  # the LoRA goes on this one
    settings: Settings
    device: torch.device
    dtype: torch.dtype  # of the transformer; latents between its calls are float32
    latent_channels: int
    temporal_stride: int  # frames per latent frame: F = temporal_stride * (T - 1) + 1
    spatial_stride: int  # pixels per latent cell
    latents_mean: Tensor  # (1, C, 1, 1, 1) float32: latents = (vae latents - mean) / std
    latents_std: Tensor
    patch: tuple[int, int]  # latent cells per token, down and across

    @property
    def num_frames(self) -> int:
        return self.settings.num_frames

    @property
    def height(self) -> int:
        return self.settings.height

    @property
    def width(self) -> int:
        return self.settings.width

    @property
    def fps(self) -> float:
        return self.settings.fps

    def check(self, num_frames: int, height: int, width: int) -> None:
        """Raise InputError, with the two nearest values that can be taken, unless the model can make this size."""
        rows, columns = (self.spatial_stride * side for side in self.patch)
        step = self.temporal_stride
        for name, value, multiple, offset, rule in (
            ("num_frames", num_frames, step, 1, f"{step}k + 1, k at least 1"),
            ("height", height, rows, 0, f"a multiple of {rows}"),
            ("width", width, columns, 0, f"a multiple of {columns}"),
        ):
            k, rest = divmod(value - offset, multiple)
            if rest or k < 1:
                near = max(k, 1) * multiple + offset
                raise InputError(f"{name} must be {rule}, not {value}: the nearest are {near} and {near + multiple}")

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """(1, C, T, h, w) of a video of this size."""
        stride = self.spatial_stride
        return 1, self.latent_channels, (num_frames - 1) // self.temporal_stride + 1, height // stride, width // stride

    def noise(self, condition: Condition, generator: torch.Generator | None = None) -> Noise:
        """Draw z1 and every later sampler draw, in this order, in float32 on the generator's device."""
        one = self.latent_shape(condition.num_frames, condition.height, condition.width)
        shape = (len(condition.prompt_embeds), *one[1:])
        where = generator.device if generator is not None else torch.device("cpu")
        z1, *steps = (
            torch.randn(shape, generator=generator, device=where).to(self.device) for _ in self.settings.timesteps
        )
        return Noise(z1, tuple(steps))

    @abstractmethod
    def encode(self, prompt: str, image: Image | None, num_frames: int, height: int, width: int) -> Condition:
        """Encode the instance once, without gradient. Raises InputError for what the model cannot take."""

    @abstractmethod
    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """The model's v (B, C, T, h, w) float32 at noise level `sigma`, a number or (B,), for noisy `latents`.

        Without guidance. transformer: other weights of the same class, to be run in the place of the Reasoner's own.
        """

    def guided_velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """v_negative + g (v - v_negative) where the condition brings a negative one, else v."""
        velocity = self.velocity(condition, latents, sigma, transformer=transformer)
        if condition.negative is None:
            return velocity
        without = self.velocity(condition.negative, latents, sigma, transformer=transformer)
        return without.lerp(velocity, self.settings.guidance_scale)

    def predict_clean_at(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """x0 = x - sigma v, guided where the model needs it, with the known first latent frame put back."""
        velocity = self.guided_velocity(condition, latents, sigma, transformer=transformer)
        scale = sigma.view(-1, 1, 1, 1, 1) if isinstance(sigma, Tensor) else sigma
        return with_first_frame(latents - scale * velocity, condition.first_frame)

    def predict_clean(self, condition: Condition, noise: Noise) -> Tensor:
        """One-step clean latents z0 = z1 - u(z1, t = 1, c): one differentiable call (method, step 3)."""
        return self.predict_clean_at(condition, noise.z1, 1.0)

    @torch.no_grad()
    def sample(self, condition: Condition, noise: Noise) -> Tensor:
        """The few-step sampler from the same noise (see ``few_step.py``)."""
        return few_step.sample(partial(self.predict_clean_at, condition), self.settings.sigmas, noise)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (1, C, T, h, w) -> frames (F, 3, H, W) float32 in [0, 1] by the standard VAE, without gradient."""

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """ "transformer", "vae" and "text_encoder": what can be moved for itself while it is not needed."""

    @abstractmethod
    def to(self, device: torch.device | str, *, networks: bool = True) -> Reasoner:
        """Work on `device` (the dtype is chosen when loading); `networks=False` leaves the networks where they are."""


def with_first_frame(latents: Tensor, first_frame: Tensor | None) -> Tensor:
    """(1 - m) first_frame + m latents, where the mask m is 0 on the first latent frame only."""
    return latents if first_frame is None else torch.cat([first_frame, latents[:, :, 1:]], 2)


def collate(conditions: Sequence[Condition]) -> Condition:
    """One condition of a batch, of videos of one size, all with a first frame or all without."""
    first = conditions[0]
    known = [c.first_frame for c in conditions if c.first_frame is not None]
    if len(known) not in (0, len(conditions)) or any(c.size != first.size for c in conditions):
        raise ValueError("conditions of several sizes, or some with and some without a first frame, are no batch")
    negatives = [c.negative for c in conditions if c.negative is not None]
    return replace(
        first,
        prompt_embeds=torch.cat([c.prompt_embeds for c in conditions]),
        first_frame=torch.cat(known) if known else None,
        inputs={name: torch.cat([c.inputs[name] for c in conditions]) for name in first.inputs},
        negative=collate(negatives) if negatives else None,
    )
