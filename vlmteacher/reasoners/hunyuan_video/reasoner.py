"""HunyuanVideo of diffusers, text- and image-to-video.

The parts are called as `HunyuanVideoPipeline` and `HunyuanVideoImageToVideoPipeline` call them, except that prompts are
not padded. The released models are guidance-distilled or need no guidance: the guidance scale that the former take as
an input is `SamplerSettings.embedded_guidance`; `guidance_scale` is the pipelines' ``true_cfg_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlmteacher.checkpoints.pretrained import cast, load_network, load_processor, load_tokenizer, read_config
from vlmteacher.errors import InputError
from vlmteacher.media import ImageInput, fit_image
from vlmteacher.ops.linear import frozen
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, Noise, with_first_frame
from vlmteacher.reasoners.hunyuan_video.attention import drop_masks
from vlmteacher.reasoners.hunyuan_video.presets import PRESETS
from vlmteacher.reasoners.hunyuan_video.text import EVERY_NTH, EVERY_NTH_NEGATIVE, IMAGE_TOKENS, PromptEncoder
from vlmteacher.reasoners.parts import load_transformers
from vlmteacher.reasoners.sampling import SamplerSettings

GUIDANCE = 6.0  # the embedded guidance of all published examples
IMAGE_IN_NOISE = 0.001  # share of the image, repeated over time, in the z1 of the image-to-video pipeline


class HunyuanVideoReasoner(Reasoner):
    """`HunyuanVideoTransformer3DModel` + `AutoencoderKLHunyuanVideo` + a Llama or LLaVA and CLIP's text encoder.

    ``image_condition_type`` in the transformer's config says how an image comes in. "token_replace": as a clean first
    latent frame at t = 0. "latent_concat": as 17 further channels, latents and mask, and the frames of the first latent
    frame are cut from the video. In both, LLaVA's image tokens are further text, and z1 holds 0.1% of the image.

    Args:
        transformer, vae: the parts of a diffusers pipeline; they are frozen here, and the blocks run without masks.
        prompts: its text encoders and tokenizers, which are frozen too.
        settings: sampler and default sizes.
    """

    def __init__(
        self, transformer: Any, vae: Any, prompts: PromptEncoder, settings: SamplerSettings | None = None
    ) -> None:
        encoders = nn.ModuleList([prompts.text_encoder, prompts.text_encoder_2])
        self.transformer, self.vae, self.text_encoder = (frozen(part) for part in (transformer, vae, encoders))
        self.prompts = prompts
        self.condition_type: str | None = transformer.config.image_condition_type
        self.image_conditioning = self.condition_type == "token_replace"
        self.settings = settings or SamplerSettings()
        self.dtype = transformer.dtype
        self.latent_channels = vae.config.latent_channels
        self.temporal_stride = vae.temporal_compression_ratio
        self.spatial_stride = vae.spatial_compression_ratio
        if self.condition_type == "latent_concat":
            self.lead_frames = self.temporal_stride
        self.patch = (transformer.config.patch_size, transformer.config.patch_size)
        self.latents_mean = torch.zeros(1, self.latent_channels, 1, 1, 1)
        self.latents_std = torch.full_like(self.latents_mean, 1 / vae.config.scaling_factor)
        vae.enable_tiling()  # beyond 256 pixels, as in all published examples: whole frames take tens of gigabytes
        drop_masks(transformer)
        self.to(transformer.device)

    def blank_condition(self, num_frames: int, height: int, width: int) -> Condition:
        config, length = self.transformer.config, self.settings.max_sequence_length
        _, channels, frames, *size = self.latent_shape(num_frames, height, width)
        first_frame, inputs = None, {"pooled_projections": torch.empty(1, config.pooled_projection_dim).to(self.dtype)}
        if self.condition_type is not None:
            length += IMAGE_TOKENS // EVERY_NTH[self.condition_type]
        if self.condition_type == "token_replace":
            first_frame = torch.empty(1, channels, 1, *size)
        if self.condition_type == "latent_concat":
            inputs["known_latents"] = torch.empty(1, channels + 1, frames, *size, dtype=self.dtype)
        inputs["encoder_attention_mask"] = torch.ones(1, length, dtype=torch.bool)
        embeds = torch.empty(1, length, config.text_embed_dim, dtype=self.dtype)
        return Condition(embeds, first_frame, num_frames, height, width, inputs)

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
        if image is None and self.condition_type is not None:
            raise InputError("this Reasoner makes videos of an image (it is HunyuanVideo-I2V): give the first frame")
        if image is not None and self.condition_type is None:
            raise InputError("this Reasoner takes no image (it is HunyuanVideo T2V): give only a prompt")
        first_frame, known, limit = None, {}, self.settings.max_sequence_length
        if image is not None:
            first_frame = self.encode_image(image, height, width)
        if first_frame is not None and self.condition_type == "latent_concat":
            _, channels, *size = self.latent_shape(num_frames, height, width)
            latents = torch.zeros(1, channels + 1, *size, device=self.device)  # and their mask
            latents[:, :, :1] = torch.cat([first_frame, torch.ones_like(first_frame[:, :1])], 1)
            first_frame, known = None, {"known_latents": latents.to(self.dtype)}

        def condition(text: str, what: str, image: Any, every: int) -> Condition:
            if image is None:
                encoded = self.prompts.of_prompt(text, limit, what)
            else:
                encoded = self.prompts.of_prompt_and_image(text, image, every, limit, what)
            embeds, pooled = (each.to(self.device, self.dtype) for each in (encoded.embeds, encoded.pooled))
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=self.device)
            inputs = {"pooled_projections": pooled, "encoder_attention_mask": mask, **known}
            return Condition(embeds, first_frame, num_frames, height, width, inputs, cut=encoded.cut)

        shown = None if image is None else fit_image(image, height, width)
        positive = condition(prompt, "prompt", shown, EVERY_NTH.get(self.condition_type or "", 1))
        if not self.settings.guided:
            return positive
        black = None if image is None else Image.new("RGB", (width, height))
        negative = condition(self.settings.negative_prompt, "negative_prompt", black, EVERY_NTH_NEGATIVE)
        return replace(positive, negative=negative)

    def noise(self, condition: Condition, generator: torch.Generator | None = None, samples: int = 1) -> Noise:
        """See `Reasoner.noise`; z1 holds a share of the image, as in the image-to-video pipeline."""
        noise = super().noise(condition, generator, samples)
        image = condition.first_frame
        if self.condition_type == "latent_concat":
            image = condition.inputs["known_latents"][:, : self.latent_channels, :1].float()
        return noise if image is None else replace(noise, z1=noise.z1.lerp(image, IMAGE_IN_NOISE))

    def velocity(
        self, condition: Condition, latents: Tensor, sigma: float | Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """See `Reasoner.velocity`; of a first frame's tokens it is not used."""
        inputs, batch = dict(condition.inputs), len(latents)
        network: Any = self.transformer if transformer is None else transformer
        latents = with_first_frame(latents, condition.first_frame).to(self.dtype)
        if (known := inputs.pop("known_latents", None)) is not None:
            latents = torch.cat([latents, known], 1)
        if network.config.guidance_embeds:
            scale = self.settings.embedded_guidance
            scale = GUIDANCE if scale is None else scale
            # Rounded to the transformer's dtype before it is multiplied, as the pipeline does.
            inputs["guidance"] = 1000 * torch.full((batch,), scale, dtype=self.dtype, device=self.device)
        return network(
            hidden_states=latents,
            timestep=self.timestep(sigma, batch),
            encoder_hidden_states=condition.prompt_embeds,
            return_dict=False,
            **inputs,
        )[0].float()


def _check_parts(name: str, kind: str, transformer: Any, vae: Any, prompts: PromptEncoder) -> None:
    """Raise InputError for parts of a pipeline of class `kind` that belong to different models."""
    config, channels = transformer.config, vae.config.latent_channels
    condition, image = config.image_condition_type, "ImageToVideo" in kind
    if image == (condition is None):
        takes = "no image" if condition is None else f"an image ({condition})"
        raise InputError(f"{name} is a {kind}, and its transformer takes {takes} by its image_condition_type")
    language = getattr(prompts.text_encoder.config, "text_config", prompts.text_encoder.config)
    for wanted, got, what in (
        (
            config.in_channels,
            2 * channels + 1 if condition == "latent_concat" else channels,
            "channels, with its VAE it would be given",
        ),
        (config.text_embed_dim, language.hidden_size, "values per word, and its text encoder makes"),
        (
            config.pooled_projection_dim,
            prompts.text_encoder_2.config.hidden_size,
            "values for the whole text, and its CLIP makes",
        ),
    ):
        if wanted != got:
            raise InputError(f"the transformer of {name} takes {wanted} {what} {got}: they belong to different models")


def settings_by_configs(transformer: Any, shift: Any) -> SamplerSettings:
    """The sampler settings of a checkpoint of an unknown name. Raises InputError."""
    preset = {"token_replace": "i2v", "latent_concat": "i2v-33ch"}.get(transformer.config.image_condition_type, "t2v")
    settings = replace(PRESETS[f"hunyuan-video-{preset}"], shift=shift)
    settings.check()
    return settings


def load_hunyuan_video(
    path_or_id: str,
    index: dict[str, Any],
    settings: SamplerSettings | None,
    dtype: torch.dtype,
    local_files_only: bool,
    **parts: Sequence[str],
) -> HunyuanVideoReasoner:
    """Load the Reasoner of a diffusers HunyuanVideo pipeline, local or on the hub; `index`: its model_index.json.

    settings: None follows the configs of transformer and scheduler. parts: see `load_transformers`. Raises InputError.
    """
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPTextModel, LlamaModel, LlavaForConditionalGeneration

    load = partial(load_network, name=path_or_id, local_files_only=local_files_only)
    kind = index["_class_name"]
    image = kind == "HunyuanVideoImageToVideoPipeline"
    transformer = load_transformers(
        HunyuanVideoTransformer3DModel, path_or_id, ["transformer"], dtype, local_files_only, **parts
    )["transformer"]
    vae = load(AutoencoderKLHunyuanVideo, subfolder="vae", dtype=torch.float32)
    prompts = PromptEncoder(
        load(LlavaForConditionalGeneration if image else LlamaModel, subfolder="text_encoder", dtype=dtype),
        load_tokenizer(path_or_id, "tokenizer", local_files_only),
        load(CLIPTextModel, subfolder="text_encoder_2", dtype=dtype),
        load_tokenizer(path_or_id, "tokenizer_2", local_files_only),
        load_processor(CLIPImageProcessor, path_or_id, "image_processor", local_files_only) if image else None,
    )
    _check_parts(path_or_id, kind, transformer, vae, prompts)
    if settings is None:
        _, scheduler = read_config(path_or_id, "scheduler", "scheduler_config.json", local_files_only)
        settings = settings_by_configs(transformer, scheduler.get("shift"))
    return HunyuanVideoReasoner(transformer, vae, prompts, settings)


def adopt_hunyuan_video(pipeline: Any, settings: SamplerSettings | None) -> HunyuanVideoReasoner:
    """The Reasoner of a loaded HunyuanVideo pipeline's own parts; settings: None follows its configs."""
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_processor")
    prompts = PromptEncoder(*(getattr(pipeline, name, None) for name in names))
    settings = settings or settings_by_configs(pipeline.transformer, pipeline.scheduler.config.shift)
    return HunyuanVideoReasoner(pipeline.transformer, pipeline.vae, prompts, settings)


def build_hunyuan_video(
    configs: Mapping[str, Any], settings: SamplerSettings, dtype: torch.dtype
) -> HunyuanVideoReasoner:
    """Build the Reasoner without weights from the configs of its parts and the class of its pipeline."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        LlamaConfig,
        LlamaModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = configs["text_encoder"]
    language: nn.Module
    if configs["pipeline"] == "HunyuanVideoImageToVideoPipeline":
        language = LlavaForConditionalGeneration(LlavaConfig(**config))
    else:
        language = LlamaModel(LlamaConfig(**config))
    clip = CLIPTextModel(CLIPTextConfig(**configs["text_encoder_2"]))
    return HunyuanVideoReasoner(
        cast(HunyuanVideoTransformer3DModel.from_config(configs["transformer"]), dtype),
        AutoencoderKLHunyuanVideo.from_config(configs["vae"]),
        PromptEncoder(language.to(dtype), None, clip.to(dtype), None),
        settings,
    )
