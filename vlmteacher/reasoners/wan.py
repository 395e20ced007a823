"""The Wan family of diffusers: Wan 2.1 T2V, Wan 2.2 TI2V-5B and their few-step distillations.

The pipelines themselves run under ``no_grad``; their parts are called here as `WanPipeline` and
`WanImageToVideoPipeline` (``expand_timesteps``) of diffusers call them.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.reasoners.base import Condition, Reasoner, Settings, with_first_frame

if TYPE_CHECKING:
    from PIL.Image import Image


class WanReasoner(Reasoner):
    """`WanTransformer3DModel` + `AutoencoderKLWan` + a UMT5-class text encoder.

    Args:
        transformer, vae, text_encoder, tokenizer: the parts of a diffusers Wan pipeline; they are frozen here.
        image_conditioning: the pipeline's ``expand_timesteps``: the model takes a timestep per token, so that a clean
            first latent frame (t = 0) can stand beside noisy ones.
        settings: sampler and default sizes.
    """

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        image_conditioning: bool,
        settings: Settings | None = None,
    ) -> None:
        self.transformer, self.vae, self.text_encoder = (
            part.eval().requires_grad_(False) for part in (transformer, vae, text_encoder)
        )
        self.tokenizer = tokenizer
        self.image_conditioning = image_conditioning
        self.settings = settings or Settings()
        self.dtype = transformer.dtype
        self.latent_channels = vae.config.z_dim
        self.temporal_stride = vae.config.scale_factor_temporal
        self.spatial_stride = vae.config.scale_factor_spatial
        self.patch = tuple(transformer.config.patch_size[1:])
        self.latents_mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.latents_std = torch.tensor(vae.config.latents_std, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.to(transformer.device)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer, "vae": self.vae, "text_encoder": self.text_encoder}

    def to(self, device: torch.device | str, *, networks: bool = True) -> WanReasoner:
        self.device = torch.device(device)
        for network in self.networks.values() if networks else ():
            network.to(self.device)
        self.latents_mean, self.latents_std = self.latents_mean.to(self.device), self.latents_std.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, prompt: str, image: Image | None, num_frames: int, height: int, width: int) -> Condition:
        """See `Reasoner.encode`. The image is resized to `width` x `height` when it has another size."""
        self.check(num_frames, height, width)
        if not prompt.strip():
            raise InputError("the prompt is empty: say what the video must show")
        if image is not None and not self.image_conditioning:
            raise InputError("this Reasoner takes no image (its pipeline has no expand_timesteps): give only a prompt")
        first_frame = None if image is None else self._encode_image(image, height, width)
        return Condition(self.encode_prompt(prompt), first_frame, num_frames, height, width)

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Tensor:
        """(1, L, D) embeddings; the empty prompt, which guidance looks at, is taken too."""
        tokens = self.tokenizer(
            clean_prompt(prompt),
            padding="max_length",
            max_length=self.settings.max_sequence_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.text_encoder.device)  # it may stay on the CPU: it runs once an instance
        hidden = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        # The transformer attends to all positions without a mask and was trained with zeros beyond the prompt.
        return (hidden * tokens.attention_mask[..., None]).to(self.device, self.dtype)

    def _encode_image(self, image: Image, height: int, width: int) -> Tensor:
        from PIL import Image as PILImage

        image = image.convert("RGB")
        if image.size != (width, height):
            image = image.resize((width, height), PILImage.Resampling.LANCZOS)
        return self.encode_video(np.array(image)[None])

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> Tensor:
        """Frames (F, H, W, 3) uint8 -> normalised latents (1, C, T, h, w) float32, the mode of the VAE's posterior."""
        pixels = torch.from_numpy(frames.astype(np.float32)).permute(3, 0, 1, 2)[None] / 127.5 - 1
        latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        return (latents - self.latents_mean) / self.latents_std

    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """See `Reasoner.velocity`; with a first frame its tokens are clean and have timestep 0."""
        # WanPipeline repeats the timestep for each token of a text-only video; one for all gives the same at less cost.
        network: Any = self.transformer if transformer is None else transformer
        timestep = torch.as_tensor(1000 * sigma, dtype=torch.float32, device=self.device).expand(len(latents))
        if condition.first_frame is not None:
            latents = with_first_frame(latents, condition.first_frame)
            frames, height, width = latents.shape[2:]
            per_frame = (height // self.patch[0]) * (width // self.patch[1])
            timestep = torch.stack([torch.zeros_like(timestep), timestep], 1)
            if not getattr(network, "takes_two_timesteps", False):
                timestep = by_token(timestep, per_frame, frames * per_frame)
        return network(
            hidden_states=latents.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=condition.prompt_embeds,
            return_dict=False,
        )[0].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = (latents * self.latents_std + self.latents_mean).to(self.vae.dtype)
        video = self.vae.decode(latents, return_dict=False)[0]
        return ((video[0].float() + 1) / 2).clamp(0, 1).transpose(0, 1)


def by_token(values: Tensor, first: int, tokens: int) -> Tensor:
    """(B, 2, ...) -> (B, tokens, ...): the first of the two for the `first` first tokens, the other for the rest."""
    rest = values.shape[2:]
    return torch.cat([values[:, :1].expand(-1, first, *rest), values[:, 1:].expand(-1, tokens - first, *rest)], 1)


def clean_prompt(prompt: str) -> str:
    """The text cleaning of diffusers' Wan pipelines: mended encoding (if ftfy is there), entities, single spaces."""
    try:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    except ImportError:
        pass
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def load_wan(path_or_id: str, index: dict[str, Any], settings: Settings, dtype: torch.dtype, **hub: Any) -> WanReasoner:
    """The Reasoner of a diffusers Wan pipeline, local or on the hub, whose model_index.json is `index`."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    if (index.get("transformer_2") or [None])[0]:
        raise InputError(f"{path_or_id} has two transformers (A14B): only Wan models with one can be taught")
    transformer = WanTransformer3DModel.from_pretrained(path_or_id, subfolder="transformer", torch_dtype=dtype, **hub)
    # diffusers' Wan examples keep the VAE in float32; it runs once or twice an instance.
    vae = AutoencoderKLWan.from_pretrained(path_or_id, subfolder="vae", torch_dtype=torch.float32, **hub)
    if transformer.config.in_channels != vae.config.z_dim:
        raise InputError(
            f"the transformer of {path_or_id} takes {transformer.config.in_channels} channels and its VAE makes"
            f" {vae.config.z_dim}: image models that append the image as channels (Wan 2.1 I2V) cannot be taught"
        )
    return WanReasoner(
        transformer,
        vae,
        UMT5EncoderModel.from_pretrained(path_or_id, subfolder="text_encoder", dtype=dtype, **hub),
        AutoTokenizer.from_pretrained(path_or_id, subfolder="tokenizer", **hub),
        bool(index.get("expand_timesteps")),
        settings,
    )
