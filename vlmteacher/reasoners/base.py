"""What a Reasoner is: a few-step video model that the Teacher corrects at test time."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmteacher.errors import InputError
from vlmteacher.media import ImageInput, fit_image
from vlmteacher.reasoners import sampling
from vlmteacher.reasoners.condition import Condition, Noise, with_first_frame
from vlmteacher.reasoners.sampling import SamplerSettings, even_timesteps
from vlmteacher.reasoners.vae import decode_latents
from vlmteacher.settings import Target


class Reasoner(ABC):
    """A family of video models behind the five calls of the method (encode, noise, predict_clean, sample, decode).

    Velocity convention (flow matching): x = (1 - sigma) x0 + sigma noise, v = noise - x0, so x0 = x - sigma v.
    """

    transformer: Any  # the LoRA goes on this one
    vae: Any
    text_encoder: nn.Module  # all that encodes prompt and image
    settings: SamplerSettings
    device: torch.device
    dtype: torch.dtype  # of the transformer; latents between its calls are float32
    latent_channels: int
    temporal_stride: int  # frames per latent frame: F = temporal_stride * (T - 1) + 1
    spatial_stride: int  # pixels per latent cell
    latents_mean: Tensor  # (1, C, 1, 1, 1) float32: latents = (vae latents - mean) / std
    latents_std: Tensor
    patch: tuple[int, int]  # latent cells per token, down and across
    image_conditioning: bool = False  # a given image becomes the video's first latent frame
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
    def blank_condition(self, num_frames: int, height: int, width: int) -> Condition:
        """A `Condition` in the shapes that `encode` gives, of uninitialised tensors on torch's default device.

        With an image where the model takes one, as much text as the model reads, and no negative prompt.
        """

    def encode_prompt(self, prompt: str) -> Tensor:
        """(1, L, D) embeddings of a prompt, which may be empty. Raises InputError where a prompt is more than that."""
        raise InputError(f"a {type(self).__name__} does not encode a prompt alone: give a model that can be trained")

    def check_trainable(self) -> None:
        """Raise InputError for a model that `vlmteacher distill` cannot train."""
        raise InputError(f"a {type(self).__name__} cannot be trained: take one of another family")

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
        """Clean latents (B, C, T, h, w) by the sampler of `settings`, from the same noise (see ``sampling.py``)."""
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
            return sampling.sample(through(partial(self.predict_clean_at, condition)), sigmas, noise)
        latents = sampling.euler(through(partial(self.mean_velocity, condition)), sigmas, noise.z1)
        return with_first_frame(latents, condition.first_frame)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (1, C, T, h, w) -> frames (F, 3, H, W) float32 in [0, 1] by the standard VAE, without gradient."""
        video = decode_latents(self.vae, (latents * self.latents_std + self.latents_mean).to(self.vae.dtype))
        return ((video[0].float() + 1) / 2).clamp(0, 1).transpose(0, 1)

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
