"""The Wan family of diffusers: Wan 2.1 T2V, I2V, FLF2V, Wan 2.2 TI2V-5B, A14B, and their few-step distillations.

diffusers' pipelines run under ``no_grad``; their parts are called here as `WanPipeline` and `WanImageToVideoPipeline`
call them. The first frame enters by one of three ways, which depends on the transformer:

- TI2V-5B (``expand_timesteps``): as a clean first latent frame with a timestep of its own, 0;
- I2V: as further channels, a mask and the latents of a video that begins with the image; 2.1 also gets CLIP's features.
  A last frame, which FLF2V needs and A14B takes, ends that video;
- T2V: there is none.

A14B has two experts: `transformer`, which is optimised, for the noise levels from the boundary upwards, and
`transformer_2` for the levels below, which are reached in sampling only.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.media import ImageInput, fit_image, read_image
from vlmteacher.ops.linear import frozen
from vlmteacher.prompts import check_cut, tokenize
from vlmteacher.ranks import summed
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, with_first_frame
from vlmteacher.reasoners.own_tokens import own_tokens
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.settings import Target

TEXT_TOKENS = 512  # the length of the text that diffusers' attention assumes where image features precede it
CLIP_TOKENS = 257  # ViT-H/14 at 224 pixels, with the class token


class WanReasoner(Reasoner):
    """`WanTransformer3DModel` + `AutoencoderKLWan` + a UMT5-class text encoder.

    Attributes:
        architecture: diffusers' class of the transformer.
        default_settings: of a model of which nothing is known.

    Args:
        transformer, vae, text_encoder, tokenizer: the parts of a diffusers Wan pipeline; they are frozen here.
        image_conditioning: the model takes a timestep per token, so the first latent frame can be clean (t = 0) while
            the others are noisy (see `keeps_first_frame`).
        settings: sampler and default sizes.
        transformer_2, boundary_ratio: the low-noise expert, and the noise level below which it predicts.
        image_encoder, image_processor: CLIP's, for a transformer with an ``image_dim``.

    Raises InputError when the parts do not fit together.
    """

    architecture = "WanTransformer3DModel"
    default_settings = SamplerSettings()

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        image_conditioning: bool,
        settings: SamplerSettings | None = None,
        *,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        image_encoder: Any = None,
        image_processor: Any = None,
    ) -> None:
        check_channels(transformer, vae)
        if transformer_2 is not None:
            check_channels(transformer_2, vae, "transformer_2")
            if transformer_2.config.in_channels != transformer.config.in_channels:
                raise InputError(
                    f"one expert takes {transformer.config.in_channels} channels and the other"
                    f" {transformer_2.config.in_channels}: one is of an image-to-video model, one is not"
                )
        if (transformer.config.image_dim is None) != (image_encoder is None):
            raise InputError(
                "a transformer with an image_dim (Wan 2.1 I2V) needs an image_encoder, and only such a one takes it"
            )
        if (transformer_2 is None) != (boundary_ratio is None):
            raise InputError(
                "two experts (Wan 2.2 A14B) need a transformer_2 and a boundary_ratio: one of them is missing"
            )
        parts = {
            "transformer": transformer,
            "transformer_2": transformer_2,
            "vae": vae,
            "text_encoder": text_encoder,
            "image_encoder": image_encoder,
        }
        self._networks = {name: frozen(part) for name, part in parts.items() if part is not None}
        self.transformer, self.transformer_2, self.vae = transformer, transformer_2, vae
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.boundary_ratio = boundary_ratio
        self.image_conditioning = image_conditioning
        self.image_channels: bool = transformer.config.in_channels != vae.config.z_dim
        # CLIP's features of both images have positions of their own in FLF2V models. Other I2V models have no place for
        # the second image's, but those without CLIP do not need it.
        self.needs_last_image: bool = transformer.config.pos_embed_seq_len is not None
        self.takes_last_image = self.needs_last_image or (self.image_channels and image_encoder is None)
        self.settings = settings or self.default_settings
        self.dtype = transformer.dtype
        self.latent_channels = vae.config.z_dim
        self.temporal_stride = vae.config.scale_factor_temporal
        self.spatial_stride = vae.config.scale_factor_spatial
        self.patch = tuple(transformer.config.patch_size[1:])
        self.latents_mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.latents_std = torch.tensor(vae.config.latents_std, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.to(transformer.device)

    @classmethod
    def keeps_first_frame(cls, pipeline: str, entries: Mapping[str, Any]) -> bool:
        """Whether a model keeps the image as its first latent frame: Wan's pipelines say it by ``expand_timesteps``.

        pipeline: diffusers' class. entries: of its ``model_index.json``.
        """
        return bool(entries.get("expand_timesteps"))

    @property
    def networks(self) -> dict[str, nn.Module]:
        return self._networks

    def check(self, num_frames: int, height: int, width: int) -> None:
        """See `Reasoner.check`; the transformer has a limited number of positions on each axis."""
        super().check(num_frames, height, width)
        config = self.transformer.config
        tokens = zip(self.latent_shape(num_frames, height, width)[2:], config.patch_size, strict=True)
        given = {"num_frames": num_frames, "height": height, "width": width}
        for (name, value), (latents, patch) in zip(given.items(), tokens, strict=True):
            if latents // patch > config.rope_max_seq_len:
                stride = self.temporal_stride if name == "num_frames" else self.spatial_stride
                most = (config.rope_max_seq_len * patch - (name == "num_frames")) * stride + (name == "num_frames")
                raise InputError(f"{name} must be at most {most}, not {value}: the transformer has no more positions")

    def check_target(self, target: Target) -> None:
        if target == "last_step" and not self._high_noise(self.settings.sigmas[-1]):
            raise InputError('target "last_step" is made by the low-noise expert, which has no LoRA: take "first_step"')

    def encode_inputs(
        self,
        prompt: str,
        image: ImageInput | None,
        last_image: ImageInput | None,
        num_frames: int,
        height: int,
        width: int,
    ) -> Condition:
        """See `Reasoner.encode_inputs`."""
        if self.image_encoder is not None and self.settings.max_sequence_length != TEXT_TOKENS:
            raise InputError(
                f"max_sequence_length must be {TEXT_TOKENS} for a model with CLIP's image features (Wan 2.1 I2V), not"
                f" {self.settings.max_sequence_length}"
            )
        first_frame, inputs = self.encode_images(image, last_image, num_frames, height, width)

        def condition(text: str, what: str) -> Condition:
            cut = check_cut(self.tokenizer, clean_prompt(text), self.settings.max_sequence_length, what)
            return Condition(self.encode_prompt(text), first_frame, num_frames, height, width, inputs, cut=cut)

        return self.with_negative(condition, prompt)

    def encode_images(
        self, image: ImageInput | None, last_image: ImageInput | None, num_frames: int, height: int, width: int
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The first latent frame, where the model keeps one, and the transformer's further inputs of the images.

        Raises InputError for a missing or an unwanted image.
        """
        if image is None and self.image_channels:
            raise InputError("this Reasoner needs an image (it is an image-to-video model): give the first frame")
        if last_image is None and self.needs_last_image:
            raise InputError("this Reasoner needs a last frame (it is a first-and-last-frame model): give last_image")
        if image is None:
            return None, {}
        if self.image_channels:
            return None, self._encode_image_channels(image, last_image, num_frames, height, width)
        if self.image_conditioning:
            return self.encode_image(image, height, width), {}
        raise InputError("this Reasoner takes no image (it is a text-to-video model): give only a prompt")

    def blank_condition(self, num_frames: int, height: int, width: int) -> Condition:
        config, length = self.transformer.config, self.settings.max_sequence_length
        _, channels, frames, *size = self.latent_shape(num_frames, height, width)
        inputs = {}
        if self.image_channels:
            inputs["image_latents"] = torch.empty(1, config.in_channels - channels, frames, *size)
        if config.image_dim is not None:
            images = 1 + self.needs_last_image
            inputs["encoder_hidden_states_image"] = torch.empty(images, CLIP_TOKENS, config.image_dim, dtype=self.dtype)
        first_frame = torch.empty(1, channels, 1, *size) if self.image_conditioning else None
        embeds = torch.empty(1, length, config.text_dim, dtype=self.dtype)
        return Condition(embeds, first_frame, num_frames, height, width, inputs)

    def check_trainable(self) -> None:
        if self.image_channels or self.boundary_ratio is not None:
            raise InputError("a Wan model that takes images as channels or has two experts (A14B) cannot be trained")

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Tensor:
        """See `Reasoner.encode_prompt`."""
        tokens = tokenize(self.tokenizer, clean_prompt(prompt), self.settings.max_sequence_length)
        tokens = tokens.to(self.text_encoder.device)  # which may be the CPU: it runs once an instance
        hidden = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        # The transformer attends to all positions without a mask and was trained with zeros beyond the prompt.
        return (hidden * tokens.attention_mask[..., None]).to(self.device, self.dtype)

    def _encode_image_channels(
        self, image: ImageInput, last_image: ImageInput | None, num_frames: int, height: int, width: int
    ) -> dict[str, Tensor]:
        """The inputs of an I2V transformer beside the noisy latents: `image_latents` as channels, CLIP's features.

        `image_latents` are a mask, which is 1 on the images and has one channel for each frame of a latent frame, and
        the latents of a video of the images, in mid grey between them or after the only one.
        """
        images = [read_image(each) for each in (image, last_image) if each is not None]
        video = grey_video(num_frames, height, width)
        known = torch.zeros(num_frames)
        for place, each in zip((0, -1), images, strict=False):
            video[place] = np.array(fit_image(each, height, width))
            known[place] = 1
        latents = self.encode_video(video)
        stride = self.temporal_stride  # the first latent frame is of one frame, which counts for all of its channels
        by_channel = torch.cat([known[:1].expand(stride), known[1:]]).view(-1, stride).T
        mask = by_channel[None, :, :, None, None].to(latents).expand(-1, -1, -1, *latents.shape[3:])
        inputs = {"image_latents": torch.cat([mask, latents], 1)}
        if self.image_encoder is not None:
            pixels = self.image_processor(images=images, return_tensors="pt").pixel_values
            pixels = pixels.to(self.image_encoder.device, self.image_encoder.dtype)
            features = self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
            inputs["encoder_hidden_states_image"] = features.to(self.device, self.dtype)  # a row for each image
        return inputs

    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """See `Reasoner.velocity`; the tokens of a first frame are clean and have timestep 0.

        Of two experts, the one of the noise level predicts; for levels (B,), the one of the lowest.
        """
        # WanPipeline repeats the timestep for each token of a text-only video; one for all tokens gives the same.
        network: Any = self._expert(sigma) if transformer is None else transformer
        timestep = self.timestep(sigma, len(latents))
        if network._parallel_config is not None:
            latents = summed(latents, self.ranks)
        if condition.first_frame is not None:
            latents = with_first_frame(latents, condition.first_frame)
            frames, height, width = latents.shape[2:]
            per_frame = (height // self.patch[0]) * (width // self.patch[1])
            timestep = torch.stack([torch.zeros_like(timestep), timestep], 1)
            if not getattr(network, "takes_two_timesteps", False):
                timestep = own_tokens(network, by_token(timestep, per_frame, frames * per_frame), 1)
        inputs = dict(condition.inputs)
        if "image_latents" in inputs:
            latents = torch.cat([latents, inputs.pop("image_latents")], 1)
        return network(
            hidden_states=latents.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=condition.prompt_embeds,
            return_dict=False,
            **inputs,
        )[0].float()

    def guidance_scale(self, sigma: float | Tensor) -> float:
        low = self.settings.guidance_scale_2
        return self.settings.guidance_scale if low is None or self._high_noise(sigma) else low

    def _high_noise(self, sigma: float | Tensor) -> bool:
        lowest = float(sigma.min()) if isinstance(sigma, Tensor) else sigma
        return self.boundary_ratio is None or lowest >= self.boundary_ratio

    def _expert(self, sigma: float | Tensor) -> nn.Module:
        """The transformer of a noise level. Where networks are offloaded, the two experts take turns on the device."""
        if self.boundary_ratio is None:
            return self.transformer
        pair = (self.transformer, self.transformer_2)
        expert, other = pair if self._high_noise(sigma) else pair[::-1]
        if expert.device.type != self.device.type:
            other.to("cpu")
            expert.to(self.device)
        return expert


def grey_video(num_frames: int, height: int, width: int) -> np.ndarray:
    """A video (F, H, W, 3) float32 of mid grey, which the VAE gets as 0."""
    return np.full((num_frames, height, width, 3), 127.5, dtype=np.float32)


def by_token(values: Tensor, first: int, tokens: int) -> Tensor:
    """Repeat values (B, 2, ...) to (B, tokens, ...): the first for `first` tokens, the second for the rest."""
    rest = values.shape[2:]
    return torch.cat([values[:, :1].expand(-1, first, *rest), values[:, 1:].expand(-1, tokens - first, *rest)], 1)


def clean_prompt(prompt: str) -> str:
    """Clean text as diffusers' Wan pipelines do: encoding (if ftfy is installed), HTML entities, single spaces."""
    try:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    except ImportError:
        pass
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def check_channels(transformer: Any, vae: Any, name: str = "transformer") -> None:
    """Raise InputError, with the numbers of channels, unless transformer and VAE have the same latents."""
    taken, channels = transformer.config.in_channels, vae.config.z_dim
    with_image = 2 * channels + vae.config.scale_factor_temporal
    if taken not in (channels, with_image) or transformer.config.out_channels != channels:
        raise InputError(
            f"the {name} takes {taken} channels and gives {transformer.config.out_channels}, but the VAE has"
            f" {channels}: it must take {channels}, or {with_image} with the image as channels, and give {channels}"
        )
    for statistic in ("latents_mean", "latents_std"):
        if len(getattr(vae.config, statistic, None) or ()) != channels:
            raise InputError(
                f"the VAE's config has no {statistic} of {channels} values: take the config.json of the model's own VAE"
            )
