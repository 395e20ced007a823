"""What a Reasoner is: a few-step video model that the Teacher corrects at test time."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmteacher import arguments
from vlmteacher.errors import InputError
from vlmteacher.files import check_number, check_text, read_json
from vlmteacher.media import ImageInput, fit_image
from vlmteacher.prompts import LONGEST_PROMPT
from vlmteacher.reasoners import few_step
from vlmteacher.settings import Target


@dataclass(frozen=True)
class Condition:
    """What the video must answer, encoded once for the instance.

    Attributes:
        prompt_embeds: (B, L, D), zero beyond the prompt's own tokens or masked by `inputs`; B = 1 but in training.
        first_frame: (B, C, 1, h, w) normalised latents of the given image where the model keeps them as the video's
            first latent frame, or None (text only, or the image comes in by `inputs`).
        num_frames, height, width: size of the video in frames and pixels.
        inputs: what else the family's transformer is given, by name: masks, image features, a second text; (B, ...).
        negative: the same instance with the negative prompt, for models that need guidance; None for the others.
        cut: how many tokens of what the text encoder did not get (see `prompts.check_cut`).
    """

    prompt_embeds: Tensor
    first_frame: Tensor | None
    num_frames: int
    height: int
    width: int
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    negative: Condition | None = None
    cut: Mapping[str, int] = field(default_factory=dict)

    @property
    def all_cut(self) -> dict[str, int]:
        """`cut`, that of the negative prompt included."""
        return {**self.cut, **(self.negative.cut if self.negative else {})}

    @property
    def size(self) -> tuple[int, int, int]:
        return self.num_frames, self.height, self.width


@dataclass(frozen=True)
class Noise:
    """Every random draw of an instance, so that "the same noise" holds for the whole sampler.

    Attributes:
        z1: (B, C, T, h, w) float32, the latents at t = 1.
        steps: one draw like `z1` for each later sampler step, which puts noise back on the clean prediction.
        others: further draws like `steps`, for further videos that start from the same z1.
    """

    z1: Tensor
    steps: tuple[Tensor, ...]
    others: tuple[tuple[Tensor, ...], ...] = ()

    def samples(self) -> list[Noise]:
        """This noise, and z1 with each of `others`."""
        return [replace(self, steps=steps, others=()) for steps in (self.steps, *self.others)]


Sampler = Literal["renoise", "euler"]


def even_timesteps(steps: int) -> tuple[float, ...]:
    """`steps` timesteps evenly spaced from 1000 down, the last of which goes to 0: what many-step sampling takes."""
    if not 1 <= steps <= 1000:
        raise InputError(f"num_inference_steps must lie between 1 and 1000, not {steps}")
    return tuple(1000 * (steps - k) / steps for k in range(steps))


@dataclass(frozen=True)
class Settings:
    """How a Reasoner samples: a preset's (see ``presets.py``), or that of `reasoner.json` beside `model_index.json`.

    Attributes:
        timesteps: where the sampler predicts, from 1000 (pure noise) downwards.
        shift: s in sigma = s t / (1 + (s - 1) t) with t = timestep / 1000.
        sampler: "renoise" predicts x0 and puts new noise back, as models distilled by DMD were trained; "euler"
            follows the ODE and draws nothing more.
        guidance_scale: g in v_negative + g (v - v_negative), in sampling and in the one-step prediction; 1 is none,
            what distilled models need.
        guidance_scale_2: the same below the boundary of a model with two experts; None is `guidance_scale`.
        negative_prompt: what v_negative is asked for.
        num_frames, height, width, fps: the video made when the caller does not say.
        max_sequence_length: prompt tokens, padded or cut to this length.
    """

    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 1.0
    sampler: Sampler = "renoise"
    guidance_scale: float = 1.0
    guidance_scale_2: float | None = None
    negative_prompt: str = ""
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

    @property
    def sampling(self) -> dict[str, Any]:
        """What makes the video from the noise: all but sizes, rate and text length."""
        rest = {"num_frames", "height", "width", "fps", "max_sequence_length"}
        return {name: value for name, value in asdict(self).items() if name not in rest}

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is looked at, anywhere on the way."""
        return self.guidance_scale != 1 or self.guidance_scale_2 not in (None, 1)

    def check(self) -> None:
        """Raise InputError for the first entry that no sampler can work with."""
        if not isinstance(self.timesteps, tuple):
            raise InputError(f"timesteps must be a list of numbers, not {self.timesteps!r:.40}")
        for timestep in self.timesteps:
            check_number(timestep, "timesteps", above=0)
        check_number(self.shift, "shift", above=0)
        check_number(self.fps, "fps", above=0)
        for name in ("num_frames", "height", "width", "max_sequence_length"):
            check_number(getattr(self, name), name, whole=True, least=1)
        check_number(self.guidance_scale, "guidance_scale")
        if self.guidance_scale_2 is not None:
            check_number(self.guidance_scale_2, "guidance_scale_2")
        ts = self.timesteps
        if not ts or ts[0] != 1000 or ts[-1] <= 0 or any(a <= b for a, b in pairwise(ts)):
            raise InputError(f"timesteps must fall from 1000 and stay above 0, not {list(ts)}")
        if self.sampler not in get_args(Sampler):
            raise InputError(f"sampler must be {' or '.join(get_args(Sampler))}, not {self.sampler!r}")
        for name in ("guidance_scale", "guidance_scale_2"):
            scale = getattr(self, name)
            if scale is not None and not 1 <= scale <= arguments.LARGEST_NUMBER:
                most = f"{arguments.LARGEST_NUMBER:g}"
                raise InputError(f"{name} must be 1 (no guidance) or more, at most {most}, not {scale}")
        check_text(arguments.text("negative_prompt", self.negative_prompt), "negative_prompt", LONGEST_PROMPT)

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read a `reasoner.json`; InputError names the entry that cannot be used."""
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


class Reasoner(ABC):
    """A family of video models behind the five calls of the method (encode, noise, predict_clean, sample, decode).

    Velocity convention (flow matching): x = (1 - sigma) x0 + sigma noise, v = noise - x0, so x0 = x - sigma v.
    """

    transformer: Any  # the LoRA goes on this one
    vae: Any
    text_encoder: nn.Module  # all that encodes prompt and image
    settings: Settings
    device: torch.device
    dtype: torch.dtype  # of the transformer; latents between its calls are float32
    latent_channels: int
    temporal_stride: int  # frames per latent frame: F = temporal_stride * (T - 1) + 1
    spatial_stride: int  # pixels per latent cell
    latents_mean: Tensor  # (1, C, 1, 1, 1) float32: latents = (vae latents - mean) / std
    latents_std: Tensor
    patch: tuple[int, int]  # latent cells per token, down and across
    notes: Mapping[str, str] = MappingProxyType({})  # what was assumed at loading, for run.json

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

    def with_sampling(self, num_inference_steps: int | None = None, **changes: Any) -> Self:
        """The same Reasoner, networks shared, with other `settings`: those given and not None.

        num_inference_steps: timesteps evenly spaced. Raises InputError for what no sampler can work with.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        if num_inference_steps is not None:
            given["timesteps"] = even_timesteps(num_inference_steps)
        other = copy.copy(self)
        other.settings = replace(self.settings, **given)
        other.settings.check()
        return other

    def check_target(self, target: Target) -> None:  # noqa: B027 (most families take any)
        """Raise InputError where no gradient would come from this target to the LoRA."""

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

    def timestep(self, sigma: float | Tensor, batch: int) -> Tensor:
        """(batch,) float32: 1000 sigma, of a number or of (batch,)."""
        if isinstance(sigma, Tensor):
            return (1000 * sigma).to(self.device, torch.float32).expand(batch)
        # Filled on the device: copying a number there cannot be part of a CUDA graph.
        return torch.full((batch,), 1000 * sigma, dtype=torch.float32, device=self.device)

    @property
    def draws_later(self) -> bool:
        """Whether sampling draws noise after z1, so that one z1 can become several videos."""
        return self.settings.sampler == "renoise" and len(self.settings.timesteps) > 1

    def check_samples(self, samples: int) -> None:
        """Raise InputError where so many videos of one z1 would all be the same."""
        if samples > 1 and not self.draws_later:
            raise InputError(
                f"final_samples {samples} needs a Reasoner that draws noise after the first step, which this one, "
                f"of sampler {self.settings.sampler!r} with {len(self.settings.timesteps)} steps, does not: give 1"
            )

    def noise(self, condition: Condition, generator: torch.Generator | None = None, samples: int = 1) -> Noise:
        """Draw z1 and every later draw of the sampler, in this order, in float32 on the generator's device.

        samples: of so many videos that start from z1 (see `check_samples`).
        """
        one = self.latent_shape(condition.num_frames, condition.height, condition.width)
        shape = (len(condition.prompt_embeds), *one[1:])
        where = generator.device if generator is not None else torch.device("cpu")
        later = len(self.settings.timesteps) - 1 if self.settings.sampler == "renoise" else 0

        def draw(count: int) -> tuple[Tensor, ...]:
            return tuple(torch.randn(shape, generator=generator, device=where).to(self.device) for _ in range(count))

        (z1,) = draw(1)
        return Noise(z1, draw(later), tuple(draw(later) for _ in range(samples - 1)))

    @abstractmethod
    def encode(self, prompt: str, image: ImageInput | None, num_frames: int, height: int, width: int) -> Condition:
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
        return without.lerp(velocity, self.guidance_scale(sigma))

    def guidance_scale(self, sigma: float | Tensor) -> float:
        """The scale of the guidance at a noise level."""
        return self.settings.guidance_scale

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

    def mean_velocity(self, condition: Condition, latents: Tensor, sigma: float, until: float) -> Tensor:
        """The guided v that carries `latents` from `sigma` to `until` in one step: the one at `sigma`.

        Models that learnt the mean over the step (MeanFlow) say more.
        """
        return self.guided_velocity(condition, latents, sigma)

    @torch.no_grad()
    def sample(self, condition: Condition, noise: Noise) -> Tensor:
        """Clean latents (B, C, T, h, w) by the sampler of `settings`, from the same noise (see ``few_step.py``)."""
        return self._sample(condition, noise)

    def predict_target(self, condition: Condition, noise: Noise, target: Target) -> Tensor:
        """The latents that the Teacher looks at, differentiable.

        "first_step": `predict_clean`. "last_step", "full": what `sample` gives, with a gradient through the last
        prediction only, or through all; those before the last are then computed again in the backward.
        """
        if target == "first_step":
            return self.predict_clean(condition, noise)
        rest = count(len(self.settings.sigmas) - 1, -1)  # predictions that follow this one

        def differentiable(predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*args: Any) -> Tensor:
                if not next(rest):
                    return predict(*args)
                if target == "full":
                    return checkpoint(predict, *args, use_reentrant=False, preserve_rng_state=False)
                with torch.no_grad():
                    return predict(*args)

            return run

        return self._sample(condition, noise, differentiable)

    def _sample(
        self,
        condition: Condition,
        noise: Noise,
        through: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda predict: predict,
    ) -> Tensor:
        """`sample`, each prediction made by `through(predict)`."""
        sigmas = self.settings.sigmas
        if self.settings.sampler == "renoise":
            return few_step.sample(through(partial(self.predict_clean_at, condition)), sigmas, noise)
        latents = few_step.euler(through(partial(self.mean_velocity, condition)), sigmas, noise.z1)
        return with_first_frame(latents, condition.first_frame)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (1, C, T, h, w) -> frames (F, 3, H, W) float32 in [0, 1] by the standard VAE, without gradient."""

    @property
    def networks(self) -> dict[str, nn.Module]:
        """ "transformer", "vae" and "text_encoder": what can be moved for itself while it is not needed."""
        return {"transformer": self.transformer, "vae": self.vae, "text_encoder": self.text_encoder}

    def to(self, device: torch.device | str, *, networks: bool = True) -> Self:
        """Work on `device` (the dtype is chosen when loading); `networks=False` leaves the networks where they are."""
        self.device = torch.device(device)
        for network in self.networks.values() if networks else ():
            network.to(self.device)
        self.latents_mean, self.latents_std = self.latents_mean.to(self.device), self.latents_std.to(self.device)
        return self

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> Tensor:
        """Frames ([B,] F, H, W, 3), 0 to 255 -> normalised latents (B or 1, C, T, h, w) float32.

        They are the posterior's mode.
        """
        videos = frames if frames.ndim == 5 else frames[None]
        pixels = torch.from_numpy(videos.astype(np.float32)).permute(0, 4, 1, 2, 3) / 127.5 - 1
        latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        return (latents - self.latents_mean) / self.latents_std

    def encode_image(self, image: ImageInput, height: int, width: int) -> Tensor:
        """An image, in the video's size (see `fit_image`) -> normalised latents (1, C, 1, h, w) float32."""
        return self.encode_video(np.array(fit_image(image, height, width))[None])


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
