"""The two samplers of a Reasoner, few-step and Euler, and their settings.

Every random draw is made before sampling (`Noise`), so that the same noise gives the same video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from vlmteacher import arguments
from vlmteacher.errors import InputError
from vlmteacher.files import check_number, check_text, read_json
from vlmteacher.prompts import LONGEST_PROMPT
from vlmteacher.reasoners.condition import Noise

Sampler = Literal["renoise", "euler"]
Predict = Callable[[Tensor, float], Tensor]  # noisy latents and their noise level -> x0, both (B, C, T, h, w)
Velocity = Callable[[Tensor, float, float], Tensor]  # noisy latents, their noise level and the next one -> v


def even_timesteps(steps: int) -> tuple[float, ...]:
    """`steps` timesteps, evenly spaced from 1000 down to 1000 / steps. Raises InputError unless 1 <= steps <= 1000."""
    if not 1 <= steps <= 1000:
        raise InputError(f"num_inference_steps must lie between 1 and 1000, not {steps}")
    return tuple(1000 * (steps - k) / steps for k in range(steps))


@dataclass(frozen=True)
class SamplerSettings:
    """How a Reasoner samples: a preset, or the ``reasoner.json`` beside a ``model_index.json``.

    Attributes:
        timesteps: the timesteps of the predictions, falling from 1000 (pure noise).
        shift: s in sigma = s t / (1 + (s - 1) t) with t = timestep / 1000.
        sampler: "renoise" predicts x0 and adds new noise, as models distilled by DMD are trained; "euler" follows the
            ODE without further noise.
        guidance_scale: g in v_negative + g (v - v_negative), in sampling and in the one-step prediction; 1, for
            distilled models, is no guidance.
        guidance_scale_2: g of the low-noise expert of a model with two; None is `guidance_scale`.
        embedded_guidance: the guidance scale that a guidance-distilled transformer takes as an input, at no further
            cost; None is the family's own, and for transformers without.
        negative_prompt: the prompt of v_negative.
        num_frames, height, width, fps: the default size of the video, in frames, pixels and frames per second.
        max_sequence_length: the number of prompt tokens, to which prompts are padded or cut.
    """

    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 1.0
    sampler: Sampler = "renoise"
    guidance_scale: float = 1.0
    guidance_scale_2: float | None = None
    embedded_guidance: float | None = None
    negative_prompt: str = ""
    num_frames: int = 89
    height: int = 704
    width: int = 1280
    fps: float = 24.0
    max_sequence_length: int = 512

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise levels of `timesteps`, shifted by `shift`; the first is 1."""
        ts = [timestep / 1000 for timestep in self.timesteps]
        return tuple(self.shift * t / (1 + (self.shift - 1) * t) for t in ts)

    @property
    def sampling(self) -> dict[str, Any]:
        """The entries that determine the video of given noise: all but sizes, frame rate and text length."""
        without = {"num_frames", "height", "width", "fps", "max_sequence_length"}
        if self.embedded_guidance is None:  # runs of earlier releases do not have it
            without.add("embedded_guidance")
        return {name: value for name, value in asdict(self).items() if name not in without}

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is used at any noise level."""
        return self.guidance_scale != 1 or self.guidance_scale_2 not in (None, 1)

    def check(self) -> None:
        """Raise InputError for the first invalid entry."""
        if not isinstance(self.timesteps, tuple):
            raise InputError(f"timesteps must be a list of numbers, not {self.timesteps!r:.40}")
        for timestep in self.timesteps:
            check_number(timestep, "timesteps", above=0)
        check_number(self.shift, "shift", above=0)
        check_number(self.fps, "fps", above=0)
        for name in ("num_frames", "height", "width", "max_sequence_length"):
            check_number(getattr(self, name), name, whole=True, least=1)
        check_number(self.guidance_scale, "guidance_scale")
        for name in ("guidance_scale_2", "embedded_guidance"):
            if (scale := getattr(self, name)) is not None:
                check_number(scale, name)
        ts = self.timesteps
        if not ts or ts[0] != 1000 or ts[-1] <= 0 or any(a <= b for a, b in pairwise(ts)):
            raise InputError(f"timesteps must fall from 1000 and stay above 0, not {list(ts)}")
        if self.sampler not in get_args(Sampler):
            raise InputError(f"sampler must be {' or '.join(get_args(Sampler))}, not {self.sampler!r}")
        for name in ("guidance_scale", "guidance_scale_2", "embedded_guidance"):
            scale = getattr(self, name)
            if scale is not None and not 1 <= scale <= arguments.LARGEST_NUMBER:
                most = f"{arguments.LARGEST_NUMBER:g}"
                raise InputError(f"{name} must be 1 (no guidance) or more, at most {most}, not {scale}")
        check_text(arguments.text("negative_prompt", self.negative_prompt), "negative_prompt", LONGEST_PROMPT)

    @classmethod
    def load(cls, path: Path) -> SamplerSettings:
        """Read a ``reasoner.json``. Raises InputError, which names the invalid entry."""
        try:
            values = read_json(path, "file")
            if not isinstance(values, dict):
                raise ValueError("it is no JSON object")
            unknown = sorted(set(values) - {field.name for field in fields(cls)})
            if unknown:
                raise ValueError(f"unknown entry {unknown[0]!r}")
            timesteps = values.get("timesteps", cls.timesteps)
            settings = cls(**values | {"timesteps": tuple(timesteps) if isinstance(timesteps, list) else timesteps})
            settings.check()
        except ValueError as error:
            raise InputError(f"{path} cannot be used: {error}") from error
        return settings


def sample(predict: Predict, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Sample x0 (B, C, T, h, w) by a prediction at each of the falling noise levels `sigmas`, the first of which is 1.

    Between two predictions, noise of the next level is added: x = (1 - sigma) x0 + sigma noise.
    """
    last = len(sigmas) - 1
    return predict(trajectory(predict, sigmas, noise, last), sigmas[last])


def trajectory(predict: Predict, sigmas: Sequence[float], noise: Noise, stop: int) -> Tensor:
    """The noisy latents (B, C, T, h, w) on which `sample` makes prediction number `stop`, counted from 0."""
    latents = noise.z1
    for level, following, draw in zip(sigmas[:stop], sigmas[1:], noise.steps, strict=False):
        latents = (1 - following) * predict(latents, level) + following * draw
    return latents


def euler(velocity: Velocity, sigmas: Sequence[float], latents: Tensor) -> Tensor:
    """Integrate dx / dsigma = v by Euler steps over the falling noise levels `sigmas` and 0, from `latents` on."""
    for level, following in pairwise((*sigmas, 0.0)):
        latents = latents + (following - level) * velocity(latents, level, following)
    return latents


def relative_rms(one: Tensor, few: Tensor, known: Tensor | None) -> float:
    """RMS of the difference of two clean latents (1, C, T, h, w), relative to the RMS of `few`.

    0 where the one-step prediction is the few-step result; about 1.4 for unrelated latents. known: the first latent
    frame, which is then not counted.
    """
    first = 0 if known is None else 1
    difference, size = ((x[:, :, first:].float().square().mean().sqrt()) for x in (one - few, few))
    return float(difference / size)
