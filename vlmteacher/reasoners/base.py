"""The contract of a Reasoner: a video model that is optimised at test time."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
from vlmteacher.prompts import check_prompt
from vlmteacher.ranks import ALONE, Ranks
from vlmteacher.reasoners import sampling
from vlmteacher.reasoners.condition import Condition, Noise, with_first_frame
from vlmteacher.reasoners.sampling import SamplerSettings, even_timesteps
from vlmteacher.reasoners.vae import decode_latents
from vlmteacher.settings import Target


class Reasoner(ABC):
    """A video model behind the five calls of the method: encode, noise, predict_clean, sample, decode.

    Velocity convention (flow matching): x = (1 - sigma) x0 + sigma noise, v = noise - x0, so x0 = x - sigma v.
    Shapes: B batch, C latent channels, T latent frames, h x w latent cells; F frames of H x W pixels.
    """

    transformer: Any  # gets the LoRA
    vae: Any
    text_encoder: nn.Module
    settings: SamplerSettings
    device: torch.device
    dtype: torch.dtype  # of the transformer; latents are float32 between its calls
    latent_channels: int
    temporal_stride: int  # frames per latent frame: F = temporal_stride * (T - 1) + 1
    spatial_stride: int  # pixels per latent cell
    lead_frames: int = 0  # decoded frames before the video's first, which are cut
    latents_mean: Tensor  # (1, C, 1, 1, 1) float32: latents = (vae latents - mean) / std
    latents_std: Tensor
    patch: tuple[int, int]  # latent cells per token, down and across
    temporal_patch: int = 1  # latent frames per token
    image_conditioning: bool = False  # a given image becomes the video's first latent frame
    takes_last_image: bool = False  # a last frame can be given beside the first, or alone
    surrogate_decoder: str | None = None  # its file on the hub, where channels and strides do not tell which it is
    ranks: Ranks = ALONE  # processes that share the tokens of the transformers
    notes: Mapping[str, str] = MappingProxyType({})  # assumptions made at loading, for run.json

    @property
    def frame_step(self) -> int:
        """A video has ``frame_step * k + 1`` frames."""
        return self.temporal_stride

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
        """Return a Reasoner that shares the networks and has other `settings`; a change of None keeps the setting.

        num_inference_steps: replaces the timesteps by that many evenly spaced ones. Raises InputError for invalid
        settings.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        if num_inference_steps is not None:
            given["timesteps"] = even_timesteps(num_inference_steps)
        other = copy.copy(self)
        other.settings = replace(self.settings, **given)
        other.settings.check()
        return other

    def check_target(self, target: Target) -> None:  # noqa: B027 (most families take any)
        """Raise InputError for a target through which no gradient reaches the LoRA."""

    def check(self, num_frames: int, height: int, width: int) -> None:
        """Raise InputError, with the two nearest valid values, for a size that the model cannot make."""
        rows, columns = (self.spatial_stride * side for side in self.patch)
        step = self.frame_step
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
        """The shape (1, C, T, h, w) of the latents of a video of this size."""
        stride, last = self.spatial_stride, num_frames + self.lead_frames - 1
        return 1, self.latent_channels, last // self.temporal_stride + 1, height // stride, width // stride

    def decoded_indices(self, frame_indices: Sequence[int]) -> list[int]:
        """The places of the video's frames among all that its latents decode to."""
        return [self.lead_frames + index for index in frame_indices]

    def noise_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """The shape of `Noise.z1`: that of the latents, for models that predict no further ones."""
        return self.latent_shape(num_frames, height, width)

    def timestep(self, sigma: float | Tensor, batch: int) -> Tensor:
        """1000 sigma as (batch,) float32, from a number or a tensor (batch,)."""
        if isinstance(sigma, Tensor):
            return (1000 * sigma).to(self.device, torch.float32).expand(batch)
        # Filled on the device: a copy from the host cannot be part of a CUDA graph.
        return torch.full((batch,), 1000 * sigma, dtype=torch.float32, device=self.device)

    @property
    def draws_later(self) -> bool:
        """Whether the sampler draws noise after z1, so that one z1 can give several videos."""
        return self.settings.sampler == "renoise" and len(self.settings.timesteps) > 1

    def check_samples(self, samples: int) -> None:
        """Raise InputError if several videos are asked of one z1 that can give only one."""
        if samples > 1 and not self.draws_later:
            raise InputError(
                f"final_samples {samples} needs a Reasoner that draws noise after the first step, which this one, "
                f"of sampler {self.settings.sampler!r} with {len(self.settings.timesteps)} steps, does not: give 1"
            )

    def noise(self, condition: Condition, generator: torch.Generator | None = None, samples: int = 1) -> Noise:
        """Draw z1 and every later draw of the sampler, in this order, in float32 on the generator's device.

        samples: the number of videos that start from z1 (see `check_samples`).
        """
        later = len(self.settings.timesteps) - 1 if self.settings.sampler == "renoise" else 0

        def draws(count: int) -> tuple[Tensor, ...]:
            return tuple(self.draw(condition, generator) for _ in range(count))

        (z1,) = draws(1)
        return Noise(z1, draws(later), tuple(draws(later) for _ in range(samples - 1)))

    def draw(self, condition: Condition, generator: torch.Generator | None) -> Tensor:
        """Draw noise of the shape of `Noise.z1` in float32 on the generator's device."""
        shape = (len(condition.prompt_embeds), *self.noise_shape(*condition.size)[1:])
        where = generator.device if generator is not None else torch.device("cpu")
        return torch.randn(shape, generator=generator, device=where).to(self.device)

    def check_last_image(self, last_image: ImageInput | None) -> None:
        """Raise InputError for a last frame that the model does not take."""
        if last_image is not None and not self.takes_last_image:
            raise InputError(
                "this Reasoner takes no last frame: leave out last_image, or give a model of first and last frames"
            )

    @torch.no_grad()
    def encode(
        self,
        prompt: str,
        image: ImageInput | None,
        num_frames: int,
        height: int,
        width: int,
        *,
        last_image: ImageInput | None = None,
    ) -> Condition:
        """Encode prompt and images without gradient, once for an instance; images are fitted to the video's size.

        image, last_image: the first and the last frame, or None. Raises InputError: a size that the model cannot make,
        a missing or an unwanted image, an invalid prompt.
        """
        self.check(num_frames, height, width)
        check_prompt(prompt)
        self.check_last_image(last_image)
        return self.encode_inputs(prompt, image, last_image, num_frames, height, width)

    @abstractmethod
    def encode_inputs(
        self,
        prompt: str,
        image: ImageInput | None,
        last_image: ImageInput | None,
        num_frames: int,
        height: int,
        width: int,
    ) -> Condition:
        """The family's part of `encode`: prompt and size are valid, and last_image is None unless the model takes it.

        Raises InputError for a missing or an unwanted image.
        """

    def with_negative(self, condition: Callable[[str, str], Condition], prompt: str) -> Condition:
        """The `Condition` of a prompt, with that of the negative prompt where the settings have guidance.

        condition: makes one from a text and the text's name in messages.
        """
        positive = condition(prompt, "prompt")
        if not self.settings.guided:
            return positive
        return replace(positive, negative=condition(self.settings.negative_prompt, "negative_prompt"))

    @abstractmethod
    def blank_condition(self, num_frames: int, height: int, width: int) -> Condition:
        """Return a `Condition` of uninitialised tensors in the shapes that `encode` gives, on torch's default device.

        It has an image where the model takes one, a last frame where it needs one, the longest text that the model
        reads, and no negative prompt.
        """

    def encode_prompt(self, prompt: str) -> Tensor:
        """Encode a prompt, which may be empty, to (1, L, D). Raises InputError for families that need more than it."""
        raise InputError(f"a {type(self).__name__} does not encode a prompt alone: give a model that can be trained")

    def check_trainable(self) -> None:
        """Raise InputError for a model that `vlmteacher distill` cannot train."""
        raise InputError(f"a {type(self).__name__} cannot be trained: take one of another family")

    @abstractmethod
    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """Predict v (B, C, T, h, w) float32 of noisy `latents` at noise level `sigma`, without guidance.

        sigma: a number or (B,). transformer: a network of the same class that runs instead of the Reasoner's own.
        """

    def guided_velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """Predict v_negative + g (v - v_negative) for a condition with a negative one, else v (see `velocity`)."""
        velocity = self.velocity(condition, latents, sigma, transformer=transformer)
        if condition.negative is None:
            return velocity
        without = self.velocity(condition.negative, latents, sigma, transformer=transformer)
        return without.lerp(velocity, self.guidance_scale(sigma))

    def guidance_scale(self, sigma: float | Tensor) -> float:
        """The guidance scale g at a noise level."""
        return self.settings.guidance_scale

    def predict_clean_at(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """Predict x0 = x - sigma v with the guided v; a known first latent frame is put back. Differentiable."""
        velocity = self.guided_velocity(condition, latents, sigma, transformer=transformer)
        scale = sigma.view(-1, 1, 1, 1, 1) if isinstance(sigma, Tensor) else sigma
        return with_first_frame(latents - scale * velocity, condition.first_frame)

    def predict_clean(self, condition: Condition, noise: Noise) -> Tensor:
        """Predict clean latents in one step, z0 = z1 - u(z1, t = 1, c): differentiable (Algorithm 1, step 3)."""
        return self.video(self.predict_clean_at(condition, noise.z1, 1.0), condition)

    def video(self, latents: Tensor, condition: Condition) -> Tensor:
        """The video's latents (B, C, T, h, w) of those of the sampler.

        The sampler's have further frames after the video's where a model denoises more than the video.
        """
        return latents[:, :, : self.latent_shape(*condition.size)[2]]

    def mean_velocity(self, condition: Condition, latents: Tensor, sigma: float, until: float) -> Tensor:
        """Predict the guided v of one step from `sigma` to `until`: that at `sigma`.

        Models that have learnt the mean velocity of a step (MeanFlow) override this.
        """
        return self.guided_velocity(condition, latents, sigma)

    @torch.no_grad()
    def sample(self, condition: Condition, noise: Noise) -> Tensor:
        """Sample clean latents (B, C, T, h, w) from `noise` by the sampler of `settings`, without gradient."""
        return self._sample(condition, noise)

    def predict_target(self, condition: Condition, noise: Noise, target: Target) -> Tensor:
        """The latents (B, C, T, h, w) on which the Teacher's losses are computed, differentiable.

        "first_step": those of `predict_clean`. "last_step": those of `sample`, with a gradient through the last
        prediction. "full": the same with a gradient through all predictions, recomputed in the backward but the last.
        """
        if target == "first_step":
            return self.predict_clean(condition, noise)
        remaining = count(len(self.settings.sigmas) - 1, -1)  # predictions that follow this one

        def differentiable(predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*args: Any) -> Tensor:
                if not next(remaining):
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
        """`sample` with gradients, each prediction made by `through(predict)`."""
        sigmas = self.settings.sigmas
        if self.settings.sampler == "renoise":
            latents = sampling.sample(through(partial(self.predict_clean_at, condition)), sigmas, noise)
        else:
            latents = sampling.euler(through(partial(self.mean_velocity, condition)), sigmas, noise.z1)
            latents = with_first_frame(latents, condition.first_frame)
        return self.video(latents, condition)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (1, C, T, h, w) to frames (F, 3, H, W) float32 in [0, 1] by the VAE, without gradient."""
        video = decode_latents(self.vae, (latents * self.latents_std + self.latents_mean).to(self.vae.dtype))
        return ((video[0].float() + 1) / 2).clamp(0, 1).transpose(0, 1)[self.lead_frames :]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that offloading moves one by one: "transformer", "vae" and "text_encoder"."""
        return {"transformer": self.transformer, "vae": self.vae, "text_encoder": self.text_encoder}

    def to(self, device: torch.device | str, *, networks: bool = True) -> Self:
        """Compute on `device` from now on; `networks=False` leaves the networks where they are."""
        self.device = torch.device(device)
        for network in self.networks.values() if networks else ():
            network.to(self.device)
        self.latents_mean, self.latents_std = self.latents_mean.to(self.device), self.latents_std.to(self.device)
        return self

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> Tensor:
        """Encode frames ([B,] F, H, W, 3) in [0, 255] to normalised latents (B or 1, C, T, h, w) float32.

        The latents are the mode of the VAE's posterior.
        """
        videos = frames if frames.ndim == 5 else frames[None]
        pixels = torch.from_numpy(videos.astype(np.float32)).permute(0, 4, 1, 2, 3) / 127.5 - 1
        latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        return (latents - self.latents_mean) / self.latents_std

    def encode_image(self, image: ImageInput, height: int, width: int) -> Tensor:
        """Encode an image, fitted to the video's size (`fit_image`), to normalised latents (1, C, 1, h, w) float32."""
        return self.encode_video(np.array(fit_image(image, height, width))[None])
